"""Norms of arrays whose channels come first in memory against torch operations: outputs, gradients, populations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import ALL_MODES, BatchLayerNorm, ConvBLN2d, Normalization, recompute_population, set_mode
from lightning_bln.modes import FanOut
from tests.kernels.helpers import TOLERANCE, assert_close, built, graph_of
from tests.kernels.test_accuracy import DATA, TIMES, assert_as_accurate, draw, threads

pytestmark = built

SHAPES = [
    (6, 5, 4, 4),
    (1, 3, 5, 7),  # one sample
    (5, 1, 3, 3),  # one channel
    (1, 1, 2, 1),
    (2, 4, 1, 1),  # one position
    (7, 4, 9),
    (3, 6, 2, 3, 5),
    (13, 3, 40, 41),  # more positions than a tile is wide
    (3, 300, 5, 5),  # more channels than eight anchors
    (9, 20, 16, 17),  # on several threads
]
NORMS = ["bln", "layer", "batch"]
POSITIONS = ["separate", "shared"]


def pair(channels: int, **options: Any) -> tuple[Normalization, Normalization]:
    """The same layer on the reference and on the kernels, away from where it starts."""
    oracle = Normalization(channels, channel_dim=1, backend="reference", **options)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter))
    layer = copy.deepcopy(oracle)
    layer.backend = "cpu"
    return oracle, layer


def run(layer: Normalization, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, gradients and population; unless the batch is one of features anyhow, no copy has been made."""
    x = x.detach().requires_grad_()
    y = layer(x)
    assert ("DensePlanesBackward" in graph_of(y)) == (layer.backend == "cpu" and x[0, 0].numel() > 1)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    assert y.is_contiguous() == x.is_contiguous() == grads[0].is_contiguous()
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = {f"gradient of {name}": value for name, value in zip(names, grads, strict=True)} | {"output": y.detach()}
    with torch.no_grad():
        found["output without gradients"] = copy.deepcopy(layer)(x)
    return found | {name: value for name, value in layer.named_buffers() if value.numel()}


def compare(shape: tuple[int, ...], dtype: torch.dtype, mode: str = "train", **options: Any) -> None:
    oracle, layer = pair(shape[1], dtype=dtype, **options)
    if mode != "train":
        batch = torch.randn(shape, dtype=dtype)
        for one in (oracle, layer):
            one(batch)
            set_mode(one.eval(), mode)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    assert_close(run(layer, x, grad), run(oracle, x, grad), TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:norm='batch' and a batch of one")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.exact), 2, pytest.param(3, marks=pytest.mark.exact)]
)
def test_the_layer_equals_the_reference(number, norm, shape, positions, dtype) -> None:
    with threads(number):
        for affine in (True, False):
            compare(shape, dtype, norm=norm, positions=positions, affine=affine)


@pytest.mark.filterwarnings("ignore:norm='batch' and a batch of one")
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_layer_in_every_mode(norm, positions, mode) -> None:
    for number, shape in [(1, (6, 5, 4, 4)), (1, (1, 3, 7)), (2, (9, 20, 16, 17))]:
        with threads(number):
            compare(shape, torch.float64, mode, norm=norm, positions=positions, momentum=0.5)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("norm", NORMS)
def test_errors_are_those_of_torch_operations(norm, data) -> None:
    for number, *shape in [(1, 8, 9, 65), (1, 33, 9, 3), (2, 33, 40, 65), (1, 6, 5, 300)]:
        for positions in POSITIONS:
            for mode in ("train", "cppc", "pcpc", "cccc"):
                # features last while numbers are drawn, so that a constant column is a channel
                batches = [draw(data, shape[0], shape[2], shape[1]).mT.contiguous() for _ in range(2)]
                oracle, _ = pair(shape[1], norm=norm, positions=positions, momentum=1.0, scale=False)
                if mode != "train":
                    oracle(batches[0])
                    set_mode(oracle.eval(), mode)
                layer, exact, grad = copy.deepcopy(oracle), copy.deepcopy(oracle).double(), torch.randn(shape)
                layer.backend = "cpu"
                results = []
                with threads(number):
                    results.append(run(layer, batches[1], grad))
                results.append(run(oracle, batches[1], grad))
                results.append(run(exact, batches[1].double(), grad.double()))
                results = [{k: v for k, v in one.items() if "grad" in k or k == "output"} for one in results]
                assert_as_accurate(*results, TIMES, (number, shape, positions, mode))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_all_modes_at_once(norm, positions) -> None:
    oracle, layer = pair(5, norm=norm, positions=positions, momentum=0.5, dtype=torch.float64)
    batch, x = torch.randn(2, 6, 5, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        for one in (oracle, layer):
            one.eval()(one.train()(batch))
        each = []
        for mode in ALL_MODES:
            set_mode(oracle.eval(), mode)
            each.append(oracle(x))
        expected = torch.cat(each)
        layer.eval().fan = FanOut(ALL_MODES)
        torch.testing.assert_close(layer(x), expected)  # one input for all modes
        layer.fan.is_fanned = True
        torch.testing.assert_close(layer(x.repeat(len(ALL_MODES), 1, 1, 1)), expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_second_derivatives(positions) -> None:
    layer = BatchLayerNorm(3, channel_dim=1, positions=positions, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(layer, torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("positions", POSITIONS)
def test_other_layouts(positions) -> None:
    x = torch.randn(6, 4, 8, 10)
    inputs = [
        x.to(memory_format=torch.channels_last),
        x[:, ::2].repeat(1, 2, 1, 1)[:, :4],
        torch.randn(6, 8, 8, 10)[:, ::2],
        torch.randn(12, 4, 8, 10)[::2],
        x.transpose(2, 3),
        x[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.randn(1, 4, 8, 10).expand(6, 4, 8, 10),
        torch.randn(6, 4, 8, 1).expand(6, 4, 8, 10),
        torch.randn(6, 1, 8, 10).expand(6, 4, 8, 10),
    ]
    for value in inputs:
        oracle, layer = pair(4, positions=positions)
        value.requires_grad_()
        grads = torch.randn(value.shape), torch.randn(value.mT.shape).mT, torch.ones(1).expand(value.shape)
        for grad in grads:
            y, expected = layer(value), oracle(value)
            torch.testing.assert_close(y, expected)
            if torch.empty_like(value).stride() == value.stride():  # neither overlaps nor lies apart
                assert y.stride() == value.stride()
            for found, other in zip(
                torch.autograd.grad(y, [value, *layer.parameters()], grad),
                torch.autograd.grad(expected, [value, *oracle.parameters()], grad),
                strict=True,
            ):
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("positions", POSITIONS)
def test_results_are_the_same_from_run_to_run(positions, number) -> None:
    x, grad = torch.randn(2, 10, 16, 12, 12)
    with threads(number):
        layers = [Normalization(16, channel_dim=1, positions=positions, backend="cpu") for _ in range(2)]
        first, second = (run(layer, x, grad) for layer in layers)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("needs", ["x", "parameters"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_some_alone(norm, positions, needs) -> None:
    oracle, layer = pair(4, norm=norm, positions=positions, dtype=torch.float64)
    x, grad, results = torch.randn(5, 4, 6, dtype=torch.float64), torch.randn(5, 4, 6, dtype=torch.float64), []
    for one in (oracle, layer):
        leaves = [x.requires_grad_()] if needs == "x" else [*one.parameters()]
        one.requires_grad_(needs == "parameters")
        value = x if needs == "x" else x.detach()
        results.append(torch.autograd.grad(one(value), leaves, grad))
    torch.testing.assert_close(*results)


def test_blocks_of_images_take_no_copy() -> None:
    block = ConvBLN2d(3, 8, 3, positions="shared")
    assert "DensePlanesBackward" in graph_of(block(torch.randn(4, 3, 10, 10)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("mode", ["pppp", "ccpp", "ppcc", "cccc"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_what_is_no_number_spreads_no_further_than_on_torch_operations(positions, mode, value) -> None:
    oracle = BatchLayerNorm(5, channel_dim=1, positions=positions, backend="reference")
    recompute_population(oracle, [torch.randn(3, 5, 4, 6)])
    set_mode(oracle.eval(), mode)
    layer, data = copy.deepcopy(oracle), torch.randn(2, 5, 4, 6)
    layer.backend, data[0, 2, 1, 3] = "cpu", value
    wrong = []
    for one in (oracle, layer):
        x = data.clone().requires_grad_()
        y = one(x)
        y.sum().backward()
        wrong.append((~y.isfinite(), ~x.grad.isfinite()))
    for expected, found in zip(*wrong, strict=True):
        expected[0, 2, 1, 3] = True
        assert not (found & ~expected).any()
