"""Recurrent layers on generated Triton kernels, under Triton's interpreter, against the reference."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_bln import Recurrent, recompute_population, set_mode
from lightning_bln.cells import registry
from lightning_bln.modes import fan_out
from lightning_bln.recurrence.triton import run
from tests.on_triton.helpers import interpreted

pytestmark = interpreted

ROUNDED = {"sgu": 1e-7, "dsgu": 1e-7}
"""torch's gradient of a hard sigmoid holds a sixth in float32."""
NORMS = ("bln", "layer", "batch", None)
MODES = ("cccc", "ppcc", "pppp", "pccp", "cpcp", "ppcp")


def pair(cell: str, norm: str | None, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A layer on the reference, and the same on Triton."""
    torch.manual_seed(0)
    one = Recurrent(cell, 3, options.pop("units", 9), norm=norm, dtype=dtype, backend="reference", **options)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    two = deepcopy(one)
    two.backend = "triton"
    return one, two


def flat(found: Any) -> list[Tensor]:
    """Outputs and last states."""
    output, state = found
    first = output.data if isinstance(output, PackedSequence) else output
    return [first, *(state if isinstance(state, tuple) else (state,))]


def trained(layer: nn.Module, x: Any, seed: int = 1) -> dict[str, Tensor | None]:
    """Outputs, gradients and what populations have gathered, after a training step."""
    parts = [one.clone().requires_grad_() for one in (x if isinstance(x, list) else [x])]
    torch.manual_seed(seed)
    found = flat(layer(pack_sequence(parts, enforce_sorted=False) if isinstance(x, list) else parts[0]))
    loss = sum((one * torch.linspace(0.5, 2.5, one.numel()).view_as(one).to(one)).sin().sum() for one in found)
    loss.backward()
    named: dict[str, Tensor | None] = {f"output {k}": one.detach() for k, one in enumerate(found)}
    named |= {f"x {k}": one.grad for k, one in enumerate(parts)}
    named |= {name: one.grad for name, one in layer.named_parameters()}
    return named | dict(layer.named_buffers())


def compare(layers: tuple[Any, Any], x: Any, tolerance: float = 1e-11) -> None:
    """Compare a training step of both, relative to the largest number of each tensor."""
    expected, found = trained(layers[0], x), trained(layers[1], x)
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        two = found[name]
        assert (one is None) is (two is None), name
        if one is not None and two is not None and one.numel():
            assert one.shape == two.shape, name
            scale = max(1.0, float(one.abs().max()))
            assert float((one - two).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("cell", list(registry))
def test_every_cell_trains_as_the_reference_does(cell: str) -> None:
    for norm in ("bln", None):
        compare(pair(cell, norm, units=19), torch.randn(3, 5, 3, dtype=torch.float64), ROUNDED.get(cell, 1e-11))


@pytest.mark.parametrize("cell", ["lstm", "gru", "mgu"])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layer"},
        {"norm": "batch"},
        {"gate_statistics": "joint"},
        {"num_layers": 2, "bidirectional": True},
        {"zoneout": 0.3, "recurrent_dropout": 0.3},
        {"norm_hidden": False},
        {"norm_input": False, "norm_cell": False},
        {"bias": False},
        {"units": 1},
        {"units": 40},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()),
)
def test_options(cell: str, options: dict[str, Any]) -> None:
    compare(pair(cell, **{"norm": "bln", **options}), torch.randn(3, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["bln", None])
@pytest.mark.parametrize("cell", ["lstm", "gru", "mgu", "slstm"])
def test_sequences_of_uneven_length(cell: str, norm: str | None) -> None:
    compare(pair(cell, norm), [torch.randn(length, 3, dtype=torch.float64) for length in (3, 5, 1, 5)], 1e-10)


@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (1, 7), (4, 1), (2, 17), (2, 40)])
def test_sizes(steps: int, samples: int) -> None:
    compare(pair("lstm", "bln"), torch.randn(steps, samples, 3, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("joint", ["separate", "joint"])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize("cell", ["lstm", "mgu"])
def test_modes(cell: str, norm: str, joint: str) -> None:
    one, _ = pair(cell, norm, gate_statistics=joint)
    recompute_population(one, [torch.randn(4, 8, 3, dtype=torch.float64) for _ in range(2)])
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    for mode in MODES:
        set_mode(one.eval(), mode)
        two = deepcopy(one)
        two.backend = "triton"
        with torch.no_grad():
            for a, b in zip(flat(one(x)), flat(two(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize("cell", ["lstm", "mgu"])
def test_gradients_in_evaluation(cell: str, norm: str) -> None:
    one, _ = pair(cell, norm)
    recompute_population(one, [torch.randn(4, 8, 3, dtype=torch.float64) for _ in range(2)])
    for mode in ("pppp", "ppcc", "pcpc", "cccc"):
        set_mode(one.eval(), mode)
        two = deepcopy(one)
        two.backend = "triton"
        one.zero_grad()
        compare((one, two), torch.randn(4, 5, 3, dtype=torch.float64))


@pytest.mark.parametrize("cell", ["lstm", "gru", "mgu"])
def test_single_precision(cell: str) -> None:
    compare(pair(cell, "bln", torch.float32, units=19), torch.randn(6, 5, 3), 1e-5)


def test_a_gradient_of_a_gradient() -> None:
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    found = []
    for layer in pair("gru", "bln"):
        inputs = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(inputs)[0].square().sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
        found.append(layer.weight_hh_l0.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_given_states_and_states_that_come_back() -> None:
    one, two = pair("lstm", "bln")
    x, state = torch.randn(4, 3, 3, dtype=torch.float64), None
    for _ in range(2):
        (_, first), (_, second) = one(x, state), two(x, state)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        state = tuple(value.detach() for value in second)


def test_results_repeat() -> None:
    _, layer = pair("lstm", "bln", torch.float32)
    x = torch.randn(4, 5, 3)
    first, second = trained(layer, x), trained(layer, x)
    assert torch.equal(first["output 0"], second["output 0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["bln", None])
def test_narrow_numbers_with_statistics_in_float32(norm: str | None, dtype: torch.dtype) -> None:
    one, _ = pair("lstm", norm, torch.float32, units=16)
    x = torch.randn(5, 8, 3)
    narrow = deepcopy(one).to(dtype)
    narrow.backend = "triton"
    expected, found = trained(one, x), trained(narrow, x.to(dtype))
    for name, value in expected.items():
        other = found[name]
        if value is not None and other is not None and value.numel() and value.is_floating_point():
            scale = max(0.1, float(value.abs().max()))
            assert float((other.float() - value).abs().max()) <= 0.06 * scale, name
    if norm:
        assert narrow.norm_hh_l0.population.mean.dtype is torch.float32


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_kernel_that_fails_costs_no_run(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = run.launch

    def fail(function: Any, *arguments: Any) -> None:
        if function.fn.__name__ == which:
            raise run.KernelFailed("out of registers")
        launch(function, *arguments)

    monkeypatch.setattr(run, "launch", fail)
    monkeypatch.setattr(run, "FAILED", set())
    layers, x = pair("gru", "bln"), torch.randn(3, 5, 3, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match="a Triton kernel of GRU failed, and torch operations run in its place: out of"
    ):
        compare(layers, x)
    compare(layers, x)


def test_the_modes_of_a_fan_out() -> None:
    one, two = pair("gru", "bln")
    recompute_population(one, [torch.randn(4, 8, 3, dtype=torch.float64) for _ in range(2)])
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    found = []
    for layer in (one.eval(), two.eval()):
        with torch.no_grad(), fan_out(layer, ["pppp", "ppcc", "cccc"]):
            found.append(flat(layer(x.repeat(1, 3, 1))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_has_no_kernel_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match="backend='triton', but a projected output"):
        Recurrent("lstm", 3, 8, proj_size=4, backend="triton")(x)
    with pytest.raises(ValueError, match="the batch has 200 samples, and a Triton kernel takes 128 at most"):
        Recurrent("lstm", 3, 8, backend="triton")(torch.randn(2, 200, 3))
    monkeypatch.setattr("lightning_bln.kernels.triton.available.is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="a tensor is on cpu, and the Triton kernels run on CUDA devices"):
        Recurrent("lstm", 3, 8, norm=None, backend="triton")(x)
