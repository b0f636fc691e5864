"""A packed sequence is one value to a sweep: every mode gets what it gives alone, shared or not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_bln import ALL_MODES, BLNGRU, BLNLSTM, BLNRNN, recompute_population, sweep_modes, using_mode
from lightning_bln.modes import StatisticsMode, fan_out
from lightning_bln.per_mode import part_of
from lightning_bln.recurrence.fan_out import join_packed, split_packed
from lightning_bln.sweep.pytree import is_close, is_same_input, tensors, trees_match, versions
from lightning_bln.sweep.shared_forward import SharedForward
from tests.sweep.packed_networks import LENGTHS, NETWORKS, packed

MODES = [StatisticsMode(mode) for mode in ALL_MODES]


@dataclass
class Batch:
    x: PackedSequence
    y: Tensor


def flat(value: Any) -> list[Tensor]:
    """All tensors of an output; a packed one padded, and as it is stored."""
    if isinstance(value, PackedSequence):
        return [*pad_packed_sequence(value), value.data, value.batch_sizes]
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for one in values for tensor in flat(one)]


def with_population(model: nn.Module, batches: list[Any], predict: Any = None) -> nn.Module:
    torch.manual_seed(0)
    recompute_population(model, batches, predict=predict)
    return model.eval()


def one_by_one(model: nn.Module, shared: SharedForward, batch: tuple[Any, ...]) -> list[Any]:
    """The output in every mode, one after the other."""
    shared.begin(len(MODES))
    found = []
    for place, mode in enumerate(MODES):
        with shared.alone(mode, MODES[place + 1 :]), using_mode(model, mode):
            found.append(model(*batch))
    return found


def together(model: nn.Module, shared: SharedForward, batch: tuple[Any, ...]) -> list[Any]:
    """The output in every mode, of one forward."""
    shared.begin(len(MODES))
    with shared.together(MODES):
        joint = model(*batch)
    return [part_of(joint, place) for place in range(len(MODES))]


@pytest.mark.parametrize("evaluate", [one_by_one, together])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("first", [0, 1])
def test_every_mode_gets_what_it_gives_alone(name: str, first: int, evaluate: Any) -> None:
    make, batch_of = NETWORKS[name]
    torch.manual_seed(first)
    batches = [batch_of(LENGTHS[first + step]) for step in range(3)]
    model = make()
    with_population(model, [*batches[:2]], lambda batch: model(*batch))
    shared = SharedForward(model)
    with torch.no_grad():
        for batch in batches:
            found = evaluate(model, shared, batch)
            for mode, ours in zip(MODES, found, strict=True):
                with using_mode(model, mode):
                    torch.testing.assert_close(flat(ours), flat(model(*batch)), rtol=1e-4, atol=1e-5)
    assert shared.reason is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BLNLSTM, {}),
        (BLNLSTM, {"bidirectional": True}),
        (BLNGRU, {"num_layers": 2}),
        (BLNGRU, {"backend": "reference"}),
        (BLNRNN, {"bidirectional": True, "num_layers": 2}),
    ],
)
def test_scores_of_packed_batches_equal_evaluating_each_mode_alone(kind: Any, options: dict) -> None:
    batches = [packed(lengths) for lengths in LENGTHS]
    model = with_population(kind(4, 8, **options), batches[:2])
    result = sweep_modes(model, batches, lambda x: model(x)[0], {"power": lambda out: out.data.square().mean()})
    assert result.reason is None
    sizes = [len(lengths) for lengths in LENGTHS]
    for mode in ALL_MODES:
        with torch.no_grad(), using_mode(model, mode):
            power = [float(model(x)[0].data.square().mean()) for x in batches]
        expected = sum(one * size for one, size in zip(power, sizes, strict=True)) / sum(sizes)
        assert result.scores[mode]["power"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), lambda x, y: {"x": x, "y": y}, Batch, lambda x, y: [[x], y]])
def test_batches_may_hold_packed_sequences_and_labels(wrap: Any) -> None:
    def predict(batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(batch, Batch):
            batch = vars(batch)
        x, y = batch.values() if isinstance(batch, dict) else batch
        return model(x[0] if isinstance(x, list) else x)[1].squeeze(0), y

    batches = [wrap(packed(lengths), torch.tensor(lengths)) for lengths in LENGTHS]
    model = BLNGRU(4, 1)
    with_population(model, batches, predict)
    metrics = {"error": lambda out, y: (out[:, 0] - y).abs().mean()}
    result = sweep_modes(model, batches, predict, metrics)
    assert result.reason is None
    for mode in ALL_MODES:
        alone = sweep_modes(model, batches, predict, metrics, [mode])
        assert result.scores[mode]["error"] == pytest.approx(alone.scores[mode]["error"], rel=1e-5)


def test_a_packed_batch_is_the_input_from_which_a_population_comes() -> None:
    batches = [packed(lengths) for lengths in LENGTHS]
    model = BLNLSTM(4, 3)
    other = deepcopy(model)
    recompute_population(model, batches)
    recompute_population(other, batches, predict=other)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


@settings(max_examples=25, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), is_sorted=st.booleans(), again=st.booleans())
def test_fan_out_over_any_lengths_runs_each_mode(lengths: list[int], is_sorted: bool, again: bool) -> None:
    x, modes = packed(tuple(lengths), is_sorted), ALL_MODES[::5]
    model = with_population(BLNGRU(4, 4, bidirectional=again), [x])
    given_x = join_packed([x] * len(modes))
    with torch.no_grad():
        with fan_out(model, modes) as fan:
            fanned = model(x)
            fan.is_fanned = True
            repeated_first = model(given_x)
        for out, _ in (fanned, repeated_first):
            assert torch.equal(out.batch_sizes, x.batch_sizes * len(modes))
        for place, mode in enumerate(modes):
            with using_mode(model, mode):
                expected, last = model(x)
            for out, states in (fanned, repeated_first):
                assert is_close(split_packed(out, len(modes))[place], expected)
                torch.testing.assert_close(states.chunk(len(modes), 1)[place], last)


@settings(max_examples=50, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), is_sorted=st.booleans(), number=st.integers(2, 16))
def test_joined_sequences_unpack_to_one_batch_after_another(lengths: list[int], is_sorted: bool, number: int) -> None:
    parts = [packed(tuple(lengths), is_sorted) for _ in range(number)]
    parts = [parts[0]._replace(data=part.data) for part in parts]
    joined = join_packed(parts)
    unpacked, found = pad_packed_sequence(joined)
    torch.testing.assert_close(unpacked, torch.cat([pad_packed_sequence(part)[0] for part in parts], 1), rtol=0, atol=0)
    assert found.tolist() == pad_packed_sequence(parts[0])[1].tolist() * number
    for part, again in zip(parts, split_packed(joined, number), strict=True):
        assert is_close(part, again)


def test_walks_take_a_packed_sequence_as_one() -> None:
    x = packed((3, 1, 2))
    other, longer = x._replace(data=x.data.clone()), packed((3, 2, 2))
    assert len(tensors({"x": [x]})) == 4
    assert trees_match([x], [other], is_same_input)
    assert trees_match([x], [other], is_close)
    for changed in (x._replace(data=x.data + 1), packed((3, 2, 1)), longer, x.data):
        assert not trees_match([x], [changed], is_close)
        assert not trees_match([x], [changed], is_same_input)
    before = versions(x)
    other.data.add_(1)
    assert versions(x) == before
    x.data.add_(1)
    assert versions(x) != before


def test_modes_with_sequences_of_other_lengths_have_no_parts() -> None:
    with pytest.raises(ValueError, match=r"4 packed sequences of lengths \[3, 1, 2, 1\] are not the same lengths"):
        split_packed(packed((3, 1, 2, 1)), 2)
    with pytest.raises(ValueError, match="fanned out before it was packed"):
        split_packed(packed((2, 2), is_sorted=True), 2)


def test_a_form_may_change_from_batch_to_batch() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = BLNGRU(4, 3)

        def forward(self, x: PackedSequence) -> Any:
            out, _ = self.rnn(x)
            return out if len(set(x.batch_sizes.tolist())) > 1 else pad_packed_sequence(out)

    batches = [packed(lengths) for lengths in ((3, 3), (2, 2), (4, 1), (2, 2))]
    model = with_population(Sometimes(), batches[:1])
    shared = SharedForward(model)
    with torch.no_grad():
        for x in batches:
            for found in (one_by_one(model, shared, (x,)), together(model, shared, (x,))):
                for mode, ours in zip(MODES, found, strict=True):
                    with using_mode(model, mode):
                        torch.testing.assert_close(flat(ours), flat(model(x)), rtol=1e-4, atol=1e-5)
    assert shared.reason is None
