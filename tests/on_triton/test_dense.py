"""Norms of whole arrays on Triton kernels, under its interpreter, against torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import ALL_MODES, BatchLayerNorm, ConvBLN2d, Normalization, freeze_population, set_mode
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels import available
from lightning_bln.modes import FanOut
from tests.on_triton.helpers import TOLERANCE, assert_close, interpreted, pair, run

pytestmark = [interpreted, pytest.mark.filterwarnings("ignore:norm='batch' and a batch of one")]

NORMS = ("bln", "layer", "batch")
POSITIONS = ("separate", "shared")
float64, float32 = torch.float64, torch.float32

LAST = [(7, 5), (1, 4), (3, 1), (5, 3, 6), (2, 1, 3, 4), (33, 2, 17)]
"""Shapes with features last; some axes are one long, some no power of two."""
FIRST = [(3, 4, 5, 7), (1, 3, 2, 2), (2, 1, 3, 3), (2, 35, 37), (2, 2, 1, 1)]
"""Shapes of images, channels first."""


def compare(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype, mode: str = "train", **options: Any) -> None:
    """Assert that both backends give the same in training, or in a mode of evaluation."""
    oracle, layer = pair(shape[channel_dim], channel_dim=channel_dim, dtype=dtype, **options)
    if mode != "train":
        batch = 2 * torch.randn(shape, dtype=dtype) + 1
        oracle(batch)
        freeze_population(oracle)
        layer.load_state_dict(oracle.state_dict())
        for one in (oracle, layer):
            set_mode(one.eval(), mode)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    assert_close(run(layer, x, grad), run(oracle, x, grad), TOLERANCE[dtype])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "channel_dim"), [*((s, -1) for s in LAST), *((s, 1) for s in FIRST)], ids=str)
def test_training_equals_the_reference(shape, channel_dim, norm, positions) -> None:
    compare(shape, channel_dim, float64, norm=norm, positions=positions)


@pytest.mark.parametrize("dtype", [float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("positions", "norm"), [("separate", "bln"), ("shared", "bln"), ("separate", "layer")])
@pytest.mark.parametrize(("shape", "channel_dim"), [((9, 3, 33), -1), ((4, 5, 6, 7), 1)], ids=str)
def test_narrower_dtypes(shape, channel_dim, positions, norm, dtype) -> None:
    compare(shape, channel_dim, dtype, norm=norm, positions=positions)


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
@pytest.mark.parametrize(
    ("shape", "channel_dim", "positions"),
    [((5, 3, 6), -1, "separate"), ((3, 4, 2, 5), 1, "separate"), ((4, 3, 5, 2), 1, "shared")],
    ids=str,
)
def test_every_mode(shape, channel_dim, positions, mode) -> None:
    compare(shape, channel_dim, float64, mode, positions=positions)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("mode", ["pppp", "cpcp", "pcpc"])
def test_modes_of_the_halves(norm, mode) -> None:
    compare((5, 3, 6), -1, float64, mode, norm=norm)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"scale": 0.7}, {"eps": 0.1}], ids=str)
def test_options(options) -> None:
    compare((6, 2, 5), -1, float64, **options)


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 2, 2100), -1), ((300, 5), -1), ((70, 3, 40), 1)], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_parts_of_statistics_merge(shape, channel_dim, positions) -> None:
    """Rows of several tiles, features of several parts, and positions of several tiles."""
    compare(shape, channel_dim, float64, positions=positions)


def test_a_wide_feature_axis() -> None:
    compare((4, 8192), -1, float32)


def test_large_means_keep_their_digits() -> None:
    """Errors against float64 are at most those of torch operations."""
    x, grad = 1e3 + torch.randn(64, 96), torch.randn(64, 96)
    oracle, layer = pair(96, affine=False)
    exact = Normalization(96, affine=False, backend="reference", dtype=float64)
    expected = run(exact, x.double(), grad.double())
    own, other = run(layer, x, grad), run(oracle, x, grad)
    for name in ("output", "gradient of x"):
        errors = [(found[name].double() - expected[name]).abs().max().item() for found in (own, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-7, name
        assert errors[0] < 1e-4, name


LAYOUTS: dict[str, Any] = {
    "channels last": lambda: (torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), 1),
    "transposed": lambda: (torch.randn(6, 7).t(), -1),
    "every second row": lambda: (torch.randn(10, 2, 6)[::2], -1),
    "some features": lambda: (torch.randn(5, 2, 9)[..., 2:7], -1),
    "some channels": lambda: (torch.randn(4, 7, 3, 3)[:, 1:5], 1),
    "expanded": lambda: (torch.randn(5, 1, 4).expand(5, 3, 4), -1),
    "steps first": lambda: (torch.randn(5, 3, 4).transpose(0, 1), -1),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(name, positions) -> None:
    x, channel_dim = LAYOUTS[name]()
    x = x.double() if name != "expanded" else x
    tolerance = TOLERANCE[x.dtype]
    oracle, layer = pair(x.shape[channel_dim], channel_dim=channel_dim, positions=positions, dtype=x.dtype)
    for grad in (torch.randn(x.shape, dtype=x.dtype), torch.ones((), dtype=x.dtype).expand(x.shape)):
        assert_close(run(layer, x, grad), run(oracle, x, grad), tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_spreads_as_on_torch_operations(value) -> None:
    x, grad = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    x[2, 1, 3] = value
    for mode in ("train", "pppp"):
        oracle, layer = pair(4)
        if mode != "train":
            for one in (oracle, layer):
                one(torch.arange(60.0).view(5, 3, 4).sin())
                freeze_population(one)
                set_mode(one.eval(), mode)
        found, expected = (run(one, x, grad) for one in (layer, oracle))
        for name in ("output", "gradient of x", "gradient of weight", "gradient of bias"):
            assert torch.equal(found[name].isfinite(), expected[name].isfinite()), (mode, name)


def test_gradients_of_gradients() -> None:
    oracle, layer = pair(4, dtype=float64)
    x, grad, second = (torch.randn(5, 3, 4, dtype=float64) for _ in range(3))
    found = []
    for one in (oracle, layer):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(leaf), leaf, grad, create_graph=True)
        found.append(torch.autograd.grad(first, [leaf, one.weight], second))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["train", "cccc", "pppp"])
def test_the_gradient_is_that_of_differences(mode) -> None:
    layer = BatchLayerNorm(3, backend="triton", dtype=float64)
    if mode != "train":
        layer(torch.randn(4, 2, 3, dtype=float64))
        freeze_population(layer)
        set_mode(layer.eval(), mode)
    assert torch.autograd.gradcheck(layer, torch.randn(3, 2, 3, dtype=float64, requires_grad=True))


@pytest.mark.parametrize(("shape", "channel_dim"), [((5, 3, 6), -1), ((3, 4, 2, 5), 1)], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_moments_are_gathered_without_the_library(positions, shape, channel_dim, monkeypatch) -> None:
    """As on a device, where the C++ kernels cannot merge them."""
    monkeypatch.setattr("lightning_bln.merging.can_merge", lambda *_: False)
    compare(shape, channel_dim, float64, positions=positions)


def test_results_are_the_same_from_run_to_run() -> None:
    _, layer = pair(40)
    x, grad = torch.randn(90, 40), torch.randn(90, 40)
    first, second = run(layer, x, grad), run(layer, x, grad)
    for name in ("output", "gradient of x", "gradient of weight", "gradient of bias"):
        assert torch.equal(first[name], second[name])


def test_all_modes_in_one_forward() -> None:
    oracle, layer = pair(4, dtype=float64)
    x = torch.randn(5, 3, 4, dtype=float64)
    for one in (oracle, layer):
        one(2 * x + 1)
        freeze_population(one)
        one.eval().fan = FanOut(ALL_MODES)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), oracle(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ["conv-act-norm", "conv-norm-act"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution_blocks(memory_format, order) -> None:
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        block = ConvBLN2d(2, 5, 3, order=order, backend=backend, dtype=float64).to(memory_format=memory_format)
        x = torch.randn(4, 2, 6, 7, dtype=float64).to(memory_format=memory_format).requires_grad_()
        y = block(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not HAS_CUSTOM_OPS, reason="torch.compile takes the operator from torch 2.4 on")
@pytest.mark.parametrize("channel_dim", [-1, 1])
def test_compiled_is_one_operator(channel_dim) -> None:
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    oracle, layer = pair(4, channel_dim=channel_dim, dtype=float64)
    x = torch.randn((5, 4, 4), dtype=float64)
    expected = run_plainly(oracle, x)
    for chosen in (backend, "aot_eager"):
        torch._dynamo.reset()
        found = run_plainly(torch.compile(layer, backend=chosen, fullgraph=True), x)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)
    assert "lightning_bln.triton_norm" in graphs[0]


def run_plainly(layer: Any, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])]


def test_available_says_that_it_is_interpreted() -> None:
    assert str(available()["triton"]).endswith(", interpreter")
