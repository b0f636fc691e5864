"""Chunks of modes compute what precedes the first layer with a mode once, as long as that gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BatchLayerNorm, recompute_population
from lightning_bln.modes import fan_out
from lightning_bln.sweep.prefix_cache import Prefix


class Counted(nn.Linear):
    """Counts its forwards."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    Counted.calls = 0


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Sequential(Counted(4, 6), nn.Tanh(), Counted(6, 6)), BatchLayerNorm(6), Counted(6, 6), BatchLayerNorm(6)
    )
    recompute_population(model, [torch.randn(8, 4)])
    Counted.calls = 0
    return model.eval()


def at_once(model: nn.Module, x: Tensor) -> Tensor:
    """All modes in one forward."""
    with fan_out(model, ALL_MODES):
        return model(x)


def in_chunks(model: nn.Module, x: Tensor, *, written: bool = False) -> Tensor:
    """All modes in chunks of four, which share what comes before them."""
    prefix, parts = Prefix(model), []
    for start in range(0, 16, 4):
        with fan_out(model, ALL_MODES[start : start + 4]) as fan, prefix.shared(fan):
            parts.append(model(x))
        if written:
            next(iter(prefix.calls.values())).output.add_(1)
    return torch.cat(parts)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_comes_first_runs_once_and_gives_the_same(guard: Any) -> None:
    model, x = network(), torch.randn(5, 4)
    with guard():
        whole = at_once(model, x)
        assert Counted.calls == 3
        found = in_chunks(model, x)
    assert torch.equal(found, whole)
    assert Counted.calls == 3 + 2 + 4


def test_a_forward_is_the_modules_own_again() -> None:
    model = network()
    model[0][0].forward = own = model[0][0].forward
    with torch.no_grad():
        in_chunks(model, torch.randn(5, 4))
    assert model[0][0].__dict__["forward"] is own
    assert "forward" not in model[0].__dict__


def test_other_input_is_computed() -> None:
    model, x = network(), torch.randn(5, 4)
    prefix = Prefix(model)
    with torch.no_grad():
        for value in (x, x.clone(), x + 1):  # the second is equal, the third is not
            with fan_out(model, ["pppp", "cccc"]) as fan, prefix.shared(fan):
                found = model(value)
            with fan_out(model, ["pppp", "cccc"]):
                assert torch.equal(found, model(value))
    assert Counted.calls == 2 + 1 + 0 + 1 + 2 + 1 + 3 * 3


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_has_been_written_into_is_computed_again(guard: Any) -> None:
    model, x = network(), torch.randn(5, 4)
    with guard():
        assert torch.equal(in_chunks(model, x, written=True), at_once(model, x))


def test_with_gradients_nothing_is_kept() -> None:
    model = network()
    prefix = Prefix(model)
    with fan_out(model, ["pppp", "cccc"]) as fan, prefix.shared(fan):
        model(torch.randn(5, 4)).sum().backward()
    assert not prefix.calls
    assert model[0][0].weight.grad is not None
