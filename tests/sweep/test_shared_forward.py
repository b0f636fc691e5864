"""Modes share one forward where that gives the same, in chunks where memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, using_mode
from lightning_bln._torch import OutOfMemoryError
from lightning_bln.modes import StatisticsMode, mode_layers
from lightning_bln.per_mode import PerMode, part_of
from lightning_bln.sweep.shared_forward import UNKNOWN, SharedForward
from tests.sweep.networks import MODELS, first, prepared

MODES = [StatisticsMode(mode) for mode in ALL_MODES]


def alone(model: nn.Module, mode: str, x: Tensor) -> Any:
    """The output of a plain forward, from a fixed random state."""
    torch.manual_seed(0)
    with torch.no_grad(), using_mode(model, mode):
        return model(x)


def one_by_one(model: nn.Module, shared: SharedForward, x: Tensor) -> list[Any]:
    """The output in every mode, one after the other."""
    shared.begin(len(MODES))
    found = []
    for place, mode in enumerate(MODES):
        with shared.alone(mode, MODES[place + 1 :]):
            found.append(alone(model, mode, x))
    return found


def forwards(model: nn.Module, shared: SharedForward, batches: list) -> list[int]:
    """For each batch, how often the first layer with a mode runs in the steps of all modes."""
    layer, counts = mode_layers(model)[0], []
    plain = type(layer).forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return plain(layer, *args, **kwargs)

    layer.forward = counted  # type: ignore[method-assign]
    for x, _ in batches:
        counts.append(0)
        one_by_one(model, shared, x)
    del layer.forward
    return counts


def assert_as_alone(model: nn.Module, found: list[Any], x: Tensor) -> None:
    for mode, output in zip(MODES, found, strict=True):
        torch.testing.assert_close(first(output), first(alone(model, mode, x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_gets_what_it_gives_alone(name: str) -> None:
    model, batches, _ = prepared(name)
    shared = SharedForward(model.eval())
    for x, _ in batches:
        assert_as_alone(model, one_by_one(model, shared, x), x)


@pytest.mark.parametrize("name", MODELS)
def test_modes_are_together_in_one_step(name: str) -> None:
    model, batches, _ = prepared(name)
    shared = SharedForward(model.eval())
    for x, _ in batches:
        shared.begin(len(MODES))
        torch.manual_seed(0)
        with torch.no_grad(), shared.together(MODES):
            joint = first(model(x))
        assert isinstance(joint, PerMode)
        assert_as_alone(model, [part_of(joint, place) for place in range(len(MODES))], x)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("recurrent", "one layer")])
def test_modes_share_one_forward_where_it_only_computes(name: str) -> None:
    model, batches, shares = prepared(name)
    shared = SharedForward(model.eval())
    counts = forwards(model, shared, [*batches, batches[0]])
    if shares:
        assert counts == [2, 1, 1, 1]  # the first forward, of few modes, shows how large activations are
    else:
        assert all(count >= len(MODES) for count in counts)


def test_a_step_of_all_modes_serves_each_alone() -> None:
    model, batches, _ = prepared("perceptron")
    shared, x = SharedForward(model.eval()), batches[0][0]
    shared.begin(len(MODES))
    with torch.no_grad(), shared.together(MODES):
        model(x)
    assert sum(map(len, shared.recordings.values())) == 1
    layer = mode_layers(model)[0]
    layer.forward = None  # type: ignore[method-assign, assignment]
    found = []
    for mode in MODES:
        with shared.alone(mode):
            found.append(alone(model, mode, x))
    del layer.forward
    assert_as_alone(model, found, x)


def test_another_input_is_computed() -> None:
    model, batches, _ = prepared("perceptron")
    shared, x = SharedForward(model.eval()), batches[0][0]
    shared.begin(len(MODES))
    found = []
    for place, mode in enumerate(MODES):
        with shared.alone(mode, MODES[place + 1 :]):
            found.append(alone(model, mode, x + place))
    for place, (mode, output) in enumerate(zip(MODES, found, strict=True)):
        assert torch.equal(output, alone(model, mode, x + place))


def test_what_has_been_written_into_is_not_replayed() -> None:
    model, batches, _ = prepared("perceptron")
    shared, x = SharedForward(model.eval()), batches[0][0]
    shared.begin(len(MODES))
    with torch.no_grad(), shared.together(MODES):
        model(x).add_(1)
    found = []
    for mode in MODES:
        with shared.alone(mode):
            found.append(alone(model, mode, x))
    assert_as_alone(model, found, x)


def test_a_mode_that_writes_into_its_output_leaves_the_others_theirs() -> None:
    model, batches, _ = prepared("perceptron")
    shared, x = SharedForward(model.eval()), batches[0][0]
    shared.begin(len(MODES))
    for place, mode in enumerate(MODES):
        with shared.alone(mode, MODES[place + 1 :]):
            found = alone(model, mode, x)
        torch.testing.assert_close(found, alone(model, mode, x))
        found.fill_(7)


def test_layers_have_their_mode_back_after_an_error() -> None:
    model, _, _ = prepared("perceptron")
    shared, before = SharedForward(model.eval()), [layer.mode for layer in mode_layers(model)]

    def fail() -> None:
        with shared.together(MODES):
            raise KeyError

    shared.begin(len(MODES))
    with pytest.raises(KeyError):
        fail()
    assert [layer.mode for layer in mode_layers(model)] == before
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.sweep.shared_forward.BYTES", 5 * 8 * 5 * 4)
    model, batches, _ = prepared("perceptron")
    shared = SharedForward(model.eval())
    assert shared.chunk == UNKNOWN
    counts = forwards(model, shared, batches[:2])
    assert shared.chunk == 5
    assert counts[1] == 4
    assert_as_alone(model, one_by_one(model, shared, batches[0][0]), batches[0][0])


def test_chunks_stay_in_the_cpus_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.sweep.shared_forward.CPU_BYTES", 6 * 8 * 5 * 4)
    model, batches, _ = prepared("perceptron")
    shared = SharedForward(model.eval())
    forwards(model, shared, batches[:1])
    assert shared.chunk == 6
    monkeypatch.setattr("lightning_bln.sweep.shared_forward.CPU_BYTES", 1)
    assert shared.chunk == 4


class Small(nn.Module):
    """Has memory for so many samples of all modes."""

    limit = 64

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, PerMode) and x.modes * len(x) > self.limit:
            raise OutOfMemoryError("out of memory")
        return x


def test_out_of_memory_means_smaller_chunks() -> None:
    model, batches, _ = prepared("perceptron")
    model[2] = Small()
    shared = SharedForward(model.eval())
    shared.largest = 1
    x = batches[0][0]
    assert_as_alone(model, one_by_one(model, shared, x), x)
    assert shared.chunk == 8
    assert forwards(model, shared, [batches[0]]) == [2]
    model[2].limit = 8
    for _ in range(8):
        assert_as_alone(model, one_by_one(model, shared, x), x)
    assert shared.chunk == 1
    assert shared.reason == "OutOfMemoryError: out of memory"


def test_what_holds_hooks_inside_is_not_recorded() -> None:
    seen: list[Tensor] = []
    model, batches, _ = prepared("perceptron")
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    shared = SharedForward(model.eval())
    for x, _ in batches:
        assert_as_alone(model, one_by_one(model, shared, x), x)
        assert not shared.recordings
    assert len(seen) == len(batches) * 2 * len(MODES)


def test_the_reason_tells_the_first_line_of_an_error() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, PerMode):
                raise ValueError("16 modes are too many\nfor this layer")
            return x

    model, batches, _ = prepared("perceptron")
    model[2] = Picky()
    shared = SharedForward(model.eval())
    forwards(model, shared, batches)
    assert shared.reason == "ValueError: 16 modes are too many"
