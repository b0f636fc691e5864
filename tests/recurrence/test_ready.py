"""Inputs of every form to layers and cells whose call is prepared: what comes out is what a fresh copy gives."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_bln import BLNGRU, BLNLSTM, BLNRNN, recompute_population
from lightning_bln.cells import BLNGRUCell, BLNLSTMCell, BLNRNNCell
from lightning_bln.kernels import available
from lightning_bln.recurrence.prepared.directions import KEPT

pytestmark = pytest.mark.skipif(available()["cpu"] is None, reason="the compiled kernels are not installed")

KINDS = (BLNLSTM, BLNGRU, BLNRNN, BLNLSTMCell, BLNGRUCell, BLNRNNCell)
INPUTS = {
    "plain": lambda x: x,
    "one sample": lambda x: x[..., :1, :],
    "unbatched": lambda x: x[..., 0, :],
    "a parameter": nn.Parameter,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[..., :1, :].expand_as(x),
    "negated": lambda x: torch._neg_view(x),
    "of another dtype": lambda x: x.float(),
    "too wide": lambda x: torch.cat([x, x], -1),
    "empty": lambda x: x[..., :0, :],
    "of too many axes": lambda x: x[None],
    "on another device": lambda x: x.to("meta"),
    "an array": lambda x: np.zeros(x.shape),
    "nothing": lambda x: None,
}
STATES = {
    "none": lambda state: None,
    "plain": lambda state: state,
    "a list": lambda state: list(state) if isinstance(state, tuple) else state,
    "a tuple of one": lambda state: state if isinstance(state, tuple) else (state,),
    "strided": lambda state: each(state, lambda one: torch.stack([one, one], -1)[..., 0]),
    "negated": lambda state: each(state, torch._neg_view),
    "of another dtype": lambda state: each(state, Tensor.float),
    "of a sample more": lambda state: each(state, lambda one: torch.cat([one, one[..., :1, :]], -2)),
    "without an axis": lambda state: each(state, lambda one: one[0]),
    "too many": lambda state: (state, state, state) if isinstance(state, Tensor) else (*state, state[0]),
    "text": lambda state: "zeros",
}
STARTS = {"zero": 0, "some": 2, "far": 100, "negative": -1, "a float": 1.0, "true": True}


def each(state: Tensor | tuple[Tensor, ...], change) -> Tensor | tuple[Tensor, ...]:
    """A change of one state or of all."""
    return change(state) if isinstance(state, Tensor) else tuple(map(change, state))


def build(kind: type, norm: str | None, time_statistics: str) -> tuple[nn.Module, Tensor, Tensor | tuple[Tensor, ...]]:
    """A layer whose call is prepared, with an input and first states that fit."""
    torch.manual_seed(0)
    layer = kind(3, 5, norm=norm, time_statistics=time_statistics, dtype=torch.float64)
    x = torch.randn(*(() if kind.__name__.endswith("Cell") else (4,)), 2, 3, dtype=torch.float64)
    if norm:
        recompute_population(layer, [x + 1, x - 1])
    layer.eval()
    with torch.no_grad():
        layer(x), layer(x)
        found = layer(x)
    assert KEPT[layer][False].calls
    return layer, x, each(found[1] if x.ndim == 3 else found, lambda one: one + 0.5)


def outcome(layer: nn.Module, x: object, hx: object, start: object) -> list[Tensor] | tuple[type, str]:
    """All tensors that a layer gives, or its error."""
    try:
        with torch.no_grad():
            found = layer(x, hx, start=start)
    except Exception as error:
        return type(error), str(error)
    parts = found if isinstance(found, tuple) else (found,)
    return [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]


def assert_same_outcome(layer: nn.Module, x: object, hx: object, start: object) -> None:
    """Compare a prepared layer with a copy of which nothing is kept, and that runs on torch operations."""
    fresh = deepcopy(layer)
    fresh.backend = "reference"
    one, two = outcome(layer, x, hx, start), outcome(fresh, x, hx, start)
    if isinstance(one, tuple) or isinstance(two, tuple):
        assert one == two
        return
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", ["bln", None])
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_and_state(kind: type, norm: str | None) -> None:
    layer, x, state = build(kind, norm, "separate" if norm else "shared")
    for make in INPUTS.values():
        for change in STATES.values():
            assert_same_outcome(layer, make(x), change(state), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("time_statistics", ["separate", "shared"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_start(kind: type, start: str, time_statistics: str) -> None:
    layer, x, state = build(kind, "bln", time_statistics)
    for _ in range(2):
        assert_same_outcome(layer, x, state, STARTS[start])


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_arrays_of_their_own(kind: type) -> None:
    layer, x, state = build(kind, "bln", "shared")
    first, second = outcome(layer, x, state, 0), outcome(layer, x, state, 0)
    places = [one.untyped_storage().data_ptr() for one in (*first, *second)]
    assert len({*places}) == len(places)
    for one in first:
        one.zero_()
    for one, two in zip(second, outcome(layer, x, state, 0), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_is_prepared_goes_past_all_else(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, state = build(kind, "bln", "shared")
    expected = outcome(layer, x, state, 0)

    def fail(*_: object) -> None:
        raise AssertionError("the way for other inputs")

    for name in ("lightning_bln.recurrent.Directions", "lightning_bln.recurrence.cell_modules.Directions"):
        monkeypatch.setattr(name, fail)
    for one, two in zip(outcome(layer, x, state, 0), expected, strict=True):
        assert torch.equal(one, two)
    layer.train()
    assert outcome(layer, x, state, 0) == (AssertionError, "the way for other inputs")


def test_a_subclass_that_runs_its_layers_in_its_own_way() -> None:
    class Doubled(BLNLSTM):
        def _layers(self, *arguments: object) -> object:
            outputs, last = super()._layers(*arguments)
            return 2 * outputs, last

    layer = Doubled(3, 5, norm=None).eval()
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        first = layer(x)[0]
        for _ in range(3):
            assert torch.equal(layer(x)[0], first)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_state_that_comes_back_without_start_is_noticed(kind: type) -> None:
    layer, x, state = build(kind, "bln", "separate")
    with torch.no_grad():
        _, last = layer(x, state)
        with pytest.warns(UserWarning, match="comes back without start="):
            layer(x, last)
