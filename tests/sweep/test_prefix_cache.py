"""Chunks of modes compute what precedes the first layer with a mode once, as long as that gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BatchLayerNorm, recompute_population
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.prefix_cache import Prefix
from lightning_bln.sweep.shared_forward import SharedForward

MODES = [StatisticsMode(mode) for mode in ALL_MODES]


class Counted(nn.Linear):
    """Counts its forwards; to a prefix it is one of torch's own."""

    __module__ = nn.Linear.__module__
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


class Remembers(Counted):
    """Changes an attribute of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(x)


class Draws(Counted):
    """Draws a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(())


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    Counted.calls = Remembers.calls = Draws.calls = 0


def network(kind: type[Counted] = Counted) -> nn.Module:
    model = nn.Sequential(
        nn.Sequential(kind(4, 6), nn.Tanh(), kind(6, 6)), BatchLayerNorm(6), kind(6, 6), BatchLayerNorm(6)
    )
    recompute_population(model, [torch.randn(8, 4)])
    kind.calls = 0
    return model.eval()


def at_once(model: nn.Module, x: Tensor, modes: list[StatisticsMode] = MODES) -> Tensor:
    """All modes in one forward."""
    with SharedForward(model).stacked(modes):
        found: Any = model(x)
    return found.stacked()


def in_chunks(model: nn.Module, x: Tensor, *, written: bool = False) -> Tensor:
    """All modes in chunks of four, which share what comes before them."""
    prefix, parts, shared = Prefix(model), [], SharedForward(model)
    for start in range(0, 16, 4):
        with shared.stacked(MODES[start : start + 4]), prefix.shared():
            found: Any = model(x)
            parts.append(found.stacked())
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


def test_a_shared_forward_in_chunks_has_a_prefix() -> None:
    model, x = network(), torch.randn(5, 4)
    shared = SharedForward(model, chunk=4)
    shared.largest = 1
    shared.begin(len(MODES))
    with torch.no_grad():
        for start in range(0, 16, 4):
            with shared.together(MODES[start : start + 4]):
                model(x)
    assert Counted.calls == 2 + 4


@pytest.mark.parametrize("kind", [Remembers, Draws])
def test_what_does_more_than_compute_runs_each_time(kind: Any) -> None:
    model, x = network(kind), torch.randn(5, 4)
    with torch.no_grad():
        in_chunks(model, x)
    assert kind.calls == 4 * 3


def test_what_hooks_look_at_runs_each_time() -> None:
    model, x = network(), torch.randn(5, 4)
    model[0][1].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        in_chunks(model, x)
    assert Counted.calls == 4 * 3


def test_a_forward_is_the_modules_own_again() -> None:
    model = network()
    model[0][0].forward = own = model[0][0].forward
    with torch.no_grad():
        in_chunks(model, torch.randn(5, 4))
    assert model[0][0].__dict__["forward"] is own
    assert "forward" not in model[0].__dict__


def test_other_input_is_computed() -> None:
    model, x = network(), torch.randn(5, 4)
    prefix, shared, modes = Prefix(model), SharedForward(model), MODES[::15]
    counts = []
    with torch.no_grad():
        for value in (x, x.clone(), x + 1):  # the second is equal, the third is not
            Counted.calls = 0
            with shared.stacked(modes), prefix.shared():
                found: Any = model(value)
            counts.append(Counted.calls)
            assert torch.equal(found.stacked(), at_once(model, value, modes))
    assert counts == [2 + 1, 0 + 1, 2 + 1]


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_an_input_that_has_been_written_into_is_another(guard: Any) -> None:
    model = network()
    with guard():
        x = torch.randn(5, 4)
        prefix, found = Prefix(model), []
        for _ in range(2):
            with prefix.shared():
                found.append(model(x))
            x.mul_(2)
    assert torch.equal(found[0], model(x / 4))
    assert torch.equal(found[1], model(x / 2))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_has_been_written_into_is_computed_again(guard: Any) -> None:
    model, x = network(), torch.randn(5, 4)
    with guard():
        assert torch.equal(in_chunks(model, x, written=True), at_once(model, x))


def test_with_gradients_nothing_is_kept() -> None:
    model = network()
    prefix = Prefix(model)
    with prefix.shared():
        model(torch.randn(5, 4)).sum().backward()
    assert not prefix.calls
    assert model[0][0].weight.grad is not None
