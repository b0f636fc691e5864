"""Populations from the first batch to the last step: gathered together, frozen, copied, read in parts, outlived."""

from __future__ import annotations

import pickle
import threading
import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bln import (
    ALL_MODES,
    BLNLSTM,
    AveragedModel,
    BatchLayerNorm,
    ConvBLN1d,
    Normalization,
    Population,
    Recurrent,
    freeze_population,
    recompute_population,
    set_mode,
)
from lightning_bln._torch import OutOfMemoryError
from lightning_bln.population import FROZEN
from lightning_bln.recurrence.cell_modules import RecurrentCell
from tests.naive_lstm import Steps, run_lstm

ONE_BY_ONE = "batch by batch"


@pytest.fixture(autouse=True)
def _loud() -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{ONE_BY_ONE}.*")
        warnings.filterwarnings("error", message=".*comes back without start=.*")
        warnings.filterwarnings("error", message=".*trained since.*")
        yield


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def populations(model: nn.Module) -> list[Population]:
    return [module for module in model.modules() if isinstance(module, Population)]


def frozen(model: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: getattr(one, name).clone() for name in FROZEN} for one in populations(model)]


def same(a: Any, b: Any, **options: Any) -> None:
    torch.testing.assert_close(a, b, **options)


# consistent populations


def lstm_and_steps() -> tuple[BLNLSTM, Steps, Tensor]:
    """An LSTM with a population of 20 samples that came in batches of four, and the same without the library."""
    layer = BLNLSTM(3, 5, dtype=torch.float64)
    x = double(7, 20, 3)
    _, steps = run_lstm(layer, x, batch_size=4)
    recompute_population(layer, list(x.split(4, 1)))
    return layer.eval(), steps, x


def test_statistics_of_a_step_are_those_of_states_that_the_population_produced() -> None:
    layer, steps, _ = lstm_and_steps()
    for name in ("ih", "hh", "cell"):
        population = getattr(layer, f"norm_{name}_l0").population
        for t, expected in enumerate(steps[name]):
            found = [getattr(population, key)[t] for key in FROZEN[:4]]
            same(found, [*expected])
        same(population.batch_size, torch.full_like(population.batch_size, 4.0))


@pytest.mark.parametrize("mode", [str(mode) for mode in ALL_MODES])
def test_evaluation_is_that_of_the_equations(mode: str) -> None:
    layer, steps, _ = lstm_and_steps()
    set_mode(layer, mode)
    x = double(9, 6, 3)  # two steps more than the population has
    expected, _ = run_lstm(layer, x, batch_size=4, population=steps, mode=mode)
    same(layer(x)[0], expected)


@pytest.mark.parametrize("estimator", ["pooled", "paper"])
@pytest.mark.parametrize(
    "build",
    [
        lambda **k: BatchLayerNorm(3, **k),
        lambda **k: BatchLayerNorm(3, positions="shared", **k),
        lambda **k: Recurrent("gru", 3, 4, 2, batch_first=True, **k),
        lambda **k: Recurrent("lstm", 3, 4, batch_first=True, bidirectional=True, norm="batch", **k),
        lambda **k: Recurrent("mgu", 3, 4, batch_first=True, time_statistics="shared", **k),
    ],
)
def test_batches_together_are_one_batch_of_their_size(build: Any, estimator: str) -> None:
    layer = build(population=estimator, dtype=torch.float64)
    whole, x = deepcopy(layer), double(24, 5, 3)
    recompute_population(layer, list(x.split(6)))
    for population in populations(whole):
        population.stands_for = 4
    recompute_population(whole, [x], samples=None)
    same(frozen(layer), frozen(whole))
    assert all(bool((one["batch_size"] == 6).all()) for one in frozen(layer))


def test_in_a_joint_batch_a_step_counts_the_sequences_that_run_there() -> None:
    lengths = ([5, 3, 2], [4, 4, 1], [5, 1, 1])
    batches = [[double(length, 3) for length in one] for one in lengths]
    layer = BLNLSTM(3, 4, dtype=torch.float64)
    whole = deepcopy(layer)
    recompute_population(layer, [pack_sequence(one) for one in batches])
    population = layer.norm_ih_l0.population
    assert population.count[:, 0].tolist() == [9, 6, 5, 4, 2]
    same(population.batch_size[:, 0], torch.tensor([3.0, 2.0, 5 / 3, 4 / 3, 1.0], dtype=torch.float64))
    for one in populations(whole):
        one.stands_for = 3
    recompute_population(
        whole, [pack_sequence([x for one in batches for x in one], enforce_sorted=False)], samples=None
    )
    same(frozen(layer), frozen(whole))


# forms of batches


class Padded(nn.Module):
    """Takes padded sequences and their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BLNLSTM(3, 4, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor | list[int]) -> Tensor:
        packed = pack_padded_sequence(x, torch.as_tensor(lengths), batch_first=True, enforce_sorted=False)
        return self.layer(packed)[1][0]


SEQUENCES = [torch.randn(length, 3, dtype=torch.float64) for length in (4, 2, 6, 3, 3, 1)]


def padded(part: slice, as_list: bool = False) -> tuple[Tensor, Any]:
    own = SEQUENCES[part]
    lengths = [len(one) for one in own]
    return pad_sequence(own, batch_first=True), lengths if as_list else torch.tensor(lengths)


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


X = torch.randn(12, 5, 3, dtype=torch.float64)
PARTS = X.split(4)

FORMS: dict[str, tuple[Any, Any]] = {
    "tensors": (list(PARTS), None),
    "an iterator": (iter(PARTS), None),
    "inputs and labels": ([(x, torch.zeros(4)) for x in PARTS], None),
    "named tuples": ([Batch(x, torch.zeros(4)) for x in PARTS], None),
    "lists of one": ([[x] for x in PARTS], None),
    "dicts": ([{"x": x, "name": ["a"] * 4, "size": 5} for x in PARTS], lambda m: lambda b: m(b["x"])),
    "nested": ([({"x": [x]}, 1) for x in PARTS], lambda m: lambda b: m(b[0]["x"][0])),
    "of other sizes": (list(X.split([5, 5, 2])), None),
    "a loader": (DataLoader(TensorDataset(X), 4), None),
    "a loader with workers": (DataLoader(TensorDataset(X), 4, num_workers=2, persistent_workers=True), None),
    "a batch sampler": (DataLoader(TensorDataset(X), batch_sampler=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]), None),
    "batches as samples": (DataLoader(list(PARTS), batch_size=None), None),
}


@pytest.mark.parametrize("name", FORMS)
def test_batches_of_any_form_go_together(name: str) -> None:
    batches, predict = FORMS[name]
    layer = Recurrent("lstm", 3, 4, batch_first=True, dtype=torch.float64)
    expected = deepcopy(layer)
    recompute_population(expected, list(PARTS))
    recompute_population(layer, batches, predict=None if predict is None else predict(layer))
    same(frozen(layer), frozen(expected))


def test_time_may_come_first() -> None:
    layer = BLNLSTM(3, 4, dtype=torch.float64)
    first = deepcopy(layer)
    first.batch_first = True
    recompute_population(layer, [x.transpose(0, 1) for x in PARTS])
    recompute_population(first, list(PARTS))
    same(frozen(layer), frozen(first))


@pytest.mark.parametrize("as_list", [False, True])
def test_padded_batches_of_other_lengths_go_together(as_list: bool) -> None:
    model = Padded()
    packed = deepcopy(model.layer)
    batches = [padded(slice(start, start + 2), as_list) for start in (0, 2, 4)]
    recompute_population(model, batches, predict=lambda batch: model(*batch))
    recompute_population(packed, [pack_sequence(SEQUENCES[i : i + 2], enforce_sorted=False) for i in (0, 2, 4)])
    same(frozen(model), frozen(packed))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(X)


def test_a_loader_gives_its_collate_function_all_samples() -> None:
    sizes: list[int] = []

    def collate(samples: list[Tensor]) -> Tensor:
        sizes.append(len(samples))
        return torch.stack(samples)

    layer = BatchLayerNorm(3, dtype=torch.float64)
    recompute_population(layer, DataLoader(Stream(), 4, collate_fn=collate))
    assert sizes[-1] == max(sizes) == 12
    for options, largest in (({"samples": 6}, 8), ({"limit": 1}, 4), ({"samples": None}, 4)):
        sizes.clear()
        recompute_population(layer, DataLoader(Stream(), 4, collate_fn=collate), **options)
        assert max(sizes) == largest


@dataclass
class Record:
    x: Tensor


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(3, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    "batch",
    [Record(X), {"x": X}, {"a", "b"}, ("text", X), (X, torch.ones(12), torch.ones(12))],
    ids=["a dataclass", "a dict", "a set", "a text first", "three entries"],
)
def test_a_batch_that_does_not_say_what_to_call_names_predict(batch: Any) -> None:
    model = Several()
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="predict="):
        recompute_population(model, [batch])
    same(
        dict(model.norm.population.named_buffers()),
        {k: before[f"norm.population.{k}"] for k in dict(model.norm.population.named_buffers())},
    )


# batches that do not go together


class Graph(nn.Module):
    """Adds to each node its neighbours, named by their place in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(3, dtype=torch.float64)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return self.norm(nodes.index_add(0, edges[1], nodes[edges[0]]))


class Centred(nn.Module):
    """Looks at the batch before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x - x.mean(0))


class Carrying(nn.Module):
    """Carries its state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BLNLSTM(3, 4, batch_first=True, dtype=torch.float64, time_statistics="shared")
        self.state: Any = None

    def forward(self, x: Tensor) -> Tensor:
        fits = self.state is not None and self.state[0].shape[1] == len(x)
        output, self.state = self.layer(x, self.state if fits else None)
        return output


class Narrow(nn.Module):
    """Takes batches of four."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.view(4, 5, 3))


class OneNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Squeezing(OneNorm):
    """Takes batches of one batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.squeeze(0))


class AfterTorch(OneNorm):
    """Has a norm of torch that always looks at the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm1d(5, track_running_stats=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.other(x))


def padded_alone(sequences: list[Tensor]) -> Tensor:
    return pad_sequence(sequences, batch_first=True)


def graph_batches() -> list[tuple[Tensor, Tensor]]:
    return [(double(6, 3), torch.randint(0, 6, (2, 8))) for _ in range(3)]


ALONE = {
    "graphs": (Graph, graph_batches, lambda m: lambda b: m(*b)),
    "what looks at the batch": (Centred, lambda: list(PARTS), None),
    "one scale hides another": (Centred, lambda: [x * SCALES for x in PARTS], None),
    "carried states": (Carrying, lambda: list(PARTS), None),
    "batches of one size": (Narrow, lambda: list(PARTS), None),
    "unmasked padding": (OneNorm, lambda: [double(*shape, 3) + 5 for shape in ((4, 5), (3, 5), (4, 7))], None),
    "padding by a collate function": (OneNorm, lambda: DataLoader(SEQUENCES, 2, collate_fn=padded_alone), None),
    "ready batches": (OneNorm, lambda: DataLoader(list(PARTS), 1, collate_fn=lambda batch: batch[0]), None),
    "batches of a batch": (Squeezing, lambda: DataLoader(list(PARTS), 1), None),
    "a batch norm of torch": (AfterTorch, lambda: DataLoader(TensorDataset(X), 4), None),
    "carried states of a loader": (Carrying, lambda: DataLoader(TensorDataset(X), 4), None),
}
SCALES = torch.tensor([1e5, 1.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ALONE)
def test_batches_that_do_not_join_are_taken_one_by_one_and_a_warning_says_so(name: str) -> None:
    build, batches, predict = ALONE[name]
    model, taken = build(), batches()
    alone = deepcopy(model)
    recompute_population(alone, taken, samples=None, predict=predict and predict(alone))
    with pytest.warns(UserWarning, match=ONE_BY_ONE):
        recompute_population(model, taken, predict=predict and predict(model))
    same(frozen(model), frozen(alone))
    assert all(one.stands_for == 1 and not one.ignores_batch for one in populations(model))


def test_a_state_that_predict_carries_is_not_joined_nor_lost_in_silence() -> None:
    layer, carried = BLNLSTM(3, 4, dtype=torch.float64), {"state": None, "start": 0}

    def predict(part: Tensor) -> None:
        _, carried["state"] = layer(part, carried["state"], start=carried["start"])
        carried["start"] += len(part)

    parts = list(double(12, 4, 3).split(4))
    with pytest.raises(ValueError, match="samples=None"):
        recompute_population(layer, parts, predict=predict)
    carried.update(state=None, start=0)
    recompute_population(layer, parts, predict=predict, samples=None)
    whole = deepcopy(layer)
    recompute_population(whole, [torch.cat(parts)], samples=None)
    same(frozen(layer), frozen(whole))
    with pytest.warns(UserWarning, match="first steps"):
        recompute_population(layer, parts, predict=predict, samples=None)


def test_batch_sizes_are_those_of_training_where_few_batches_reach() -> None:
    sequences = [double(3 if index < 32 else 9, 3) for index in range(40)]
    batches = [pack_sequence(sequences[start : start + 8]) for start in range(0, 40, 8)]
    layer = BLNLSTM(3, 4, dtype=torch.float64)
    recompute_population(layer, batches)
    same(layer.norm_hh_l0.population.batch_size, torch.full((9, 4), 8.0, dtype=torch.float64))
    mask = torch.ones(4, 6, dtype=torch.bool)
    pairs = [(double(4, 6, 3), mask & (torch.arange(6) < length)) for length in (3, 3, 6, 3)]
    norm = BatchLayerNorm(3, dtype=torch.float64)
    recompute_population(norm, pairs, predict=lambda pair: norm(*pair))
    same(norm.population.batch_size, torch.full((6,), 4.0, dtype=torch.float64))
    assert norm.population.count.tolist() == [16, 16, 16, 4, 4, 4]


class Words(OneNorm):
    """Finds its padding by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 3, padding_idx=0, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.embedding(ids), mask=ids != 0)


@pytest.mark.parametrize("most", [100, 32])
def test_batch_sizes_are_those_of_training_where_the_model_makes_the_mask(most: int) -> None:
    lengths = torch.full((64,), 4)
    lengths[:16] = 12
    ids = torch.randint(1, 20, (64, 12)) * (torch.arange(12) < lengths[:, None])
    model = Words()

    def predict(part: Tensor) -> None:
        if len(part) > most:
            raise MemoryError("too large")
        model(part)

    recompute_population(model, list(ids.split(8)), predict=predict)
    same(model.norm.population.batch_size, torch.full((12,), 8.0, dtype=torch.float64))
    assert model.norm.population.count.tolist() == [64] * 4 + [16] * 8


@pytest.mark.parametrize("norm", ["bln", "batch", "layer"])
def test_what_comes_after_a_norm_is_seen(norm: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (Normalization(4, norm=norm, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x, mask=torch.ones(x.shape[:2], dtype=torch.bool)).amax(1) / x.shape[1])

    with pytest.warns(UserWarning, match=ONE_BY_ONE):
        recompute_population(Two(), [double(6, length, 4) for length in (4, 8, 4)])


def test_a_layer_may_be_called_at_several_lengths() -> None:
    norm, layer = BatchLayerNorm(3, dtype=torch.float64), BLNLSTM(3, 4, batch_first=True, dtype=torch.float64)
    model = nn.ModuleList([norm, layer])

    def predict(pair: tuple[Tensor, Tensor]) -> None:
        for one in pair:
            norm(one)
        _, state = layer(pair[0][:, :3])
        layer(pair[0][:, 3:], state, start=3)

    recompute_population(model, [(double(k, 7, 3), double(k, 5, 3)) for k in (8, 8, 4)], predict=predict)
    assert norm.population.count.tolist() == [40] * 5 + [20] * 2
    same(layer.norm_hh_l0.population.batch_size, torch.full((7, 4), 20 / 3, dtype=torch.float64))


def test_random_numbers_of_others_are_no_state() -> None:
    def collate(samples: list[Any]) -> Tensor:
        return torch.stack([sample[0] for sample in samples]) + float(np.random.rand() * 1e-12)  # noqa: NPY002

    layer = BatchLayerNorm(3, dtype=torch.float64)
    recompute_population(layer, DataLoader(TensorDataset(X), 4, collate_fn=collate), predict=lambda x: layer(x))
    assert layer.population.count.tolist() == [12] * 5


def test_samples_are_counted_along_their_own_axis() -> None:
    layer = BLNLSTM(3, 4, dtype=torch.float64)
    recompute_population(layer, [double(50, 4, 3) for _ in range(20)], samples=60)
    assert layer.norm_ih_l0.population.count.unique().tolist() == [60]


def test_a_loader_may_use_its_memory_again() -> None:
    def batches() -> Any:
        memory = torch.zeros(4, 3, dtype=torch.float64)
        for index in range(5):
            memory[:, 0] = index
            yield memory

    layer = BatchLayerNorm(3, dtype=torch.float64)
    recompute_population(layer, batches())
    assert layer.population.batch_mean[0, 0] == 2.0


def test_a_single_batch_may_be_anything() -> None:
    layer = BatchLayerNorm(3, dtype=torch.float64)
    recompute_population(layer, [(X, object())])
    assert layer.population.count.tolist() == [12] * 5


def test_a_tensor_is_no_list_of_batches() -> None:
    with pytest.raises(ValueError, match=r"pass \[x\]"):
        recompute_population(BatchLayerNorm(3), torch.randn(4, 5, 3))


@pytest.mark.parametrize("error", [OutOfMemoryError, MemoryError])
def test_where_memory_is_short_fewer_go_together(error: type[Exception]) -> None:
    layer, sizes = BatchLayerNorm(3, dtype=torch.float64), []

    def predict(x: Tensor) -> None:
        if len(x) > 6:
            raise error("too large")
        sizes.append(len(x))
        layer(x)

    recompute_population(layer, list(X.split(2)), predict=predict)
    assert sizes[-2:] == [6, 6]
    population = layer.population
    same(population.batch_mean, X.mean(0))
    same(population.batch_var, X.var(0))
    assert population.batch_size.tolist() == [2.0] * 5


def test_an_error_leaves_the_population_as_it_was_though_it_is_written_in_place() -> None:
    layer = BatchLayerNorm(3, momentum=0.5, dtype=torch.float64)
    layer(X)
    before = deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="positions"):
        recompute_population(layer, [9 * X, X[:, :, None]], samples=None)
    same(dict(layer.state_dict()), before)


PARTS32 = [x.float() for x in PARTS]


def test_a_layer_that_nothing_calls_stays_as_it_is() -> None:
    model = nn.ModuleDict({"used": BatchLayerNorm(3), "spare": BLNLSTM(3, 4)})
    recompute_population(model["used"], list(PARTS32))
    with pytest.warns(UserWarning, match=r"spare\.norm_ih_l0\.population.*nothing called"):
        recompute_population(model, PARTS32, predict=lambda x: model["used"](x))
    assert model["used"].population.is_frozen
    assert not model["spare"].norm_ih_l0.population.is_frozen


# sequences in parts


KINDS = ("lstm", "gru", "rnn", "mgu", "mingru")


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5), kind=st.sampled_from(KINDS), data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_parts_are_the_whole_in_every_mode(lengths: list[int], kind: str, data: Any) -> None:
    layer = Recurrent(kind, 3, 4, data.draw(st.integers(1, 2)), dtype=torch.float64)
    recompute_population(layer, [double(5, 4, 3) for _ in range(3)])
    layer.eval()
    set_mode(layer, data.draw(st.sampled_from(ALL_MODES)))
    x = double(sum(lengths), 3, 3)
    whole, last = layer(x)
    outputs, state, start = [], None, 0
    for part in x.split(lengths):
        output, state = layer(part, state, start=start)
        outputs.append(output)
        start += len(part)
    same((torch.cat(outputs), state), (whole, last))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"time_statistics": "shared"}, {"population": "paper"}], ids=str)
def test_training_in_parts_gathers_what_training_on_the_whole_does(kind: str, backend: str, options: Any) -> None:
    layer = Recurrent(kind, 3, 4, dtype=torch.float64, backend=backend, **options)
    parts, x = deepcopy(layer), double(9, 5, 3)
    layer(x)
    _, state = parts(x[:4])
    parts(x[4:], state, start=4)
    if "population" not in options or "shared" not in options:
        for one, other in zip(populations(layer), populations(parts), strict=True):
            same(one.count, other.count)
            same(one.mean, other.mean)


@pytest.mark.parametrize("statistics", ["separate", "shared"])
def test_a_cell_takes_the_steps_of_a_layer(statistics: str) -> None:
    layer = BLNLSTM(3, 4, dtype=torch.float64, time_statistics=statistics)
    recompute_population(layer, [double(6, 4, 3)])
    cell = RecurrentCell("lstm", 3, 4, dtype=torch.float64, time_statistics=statistics)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x, state = double(8, 2, 3), None
    expected, _ = layer.eval()(x)
    cell.eval()
    for t, row in enumerate(x):
        state = cell(row, state, start=t)
        same(state[0], expected[t])


@pytest.mark.parametrize(("start", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)])
def test_a_start_that_counts_no_steps_is_refused(start: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="start="):
        BLNLSTM(3, 4)(torch.randn(2, 2, 3), start=start)


def test_a_bidirectional_layer_reads_whole_sequences() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        BLNLSTM(3, 4, bidirectional=True)(torch.randn(2, 2, 3), start=1)


def test_a_forgotten_start_is_noticed_once_and_only_where_it_matters() -> None:
    layer = BLNLSTM(3, 4)
    recompute_population(layer, [torch.randn(5, 4, 3)])
    layer.eval()
    x = torch.randn(2, 2, 3)
    _, state = layer(x)
    layer(x, state, start=2)
    layer(x, tuple(torch.zeros_like(one) for one in state))  # a state of the user's own
    _, state = layer(x)
    with pytest.warns(UserWarning, match="without start="):
        layer(x, tuple(one.detach() for one in state))
    _, state = layer(x)
    layer(x, state)
    shared = BLNLSTM(3, 4, time_statistics="shared")
    recompute_population(shared, [torch.randn(5, 4, 3)])
    layer(x, shared.eval()(x, shared(x)[1])[1])


@pytest.mark.parametrize("statistics", ["separate", "shared"])
def test_a_text_is_the_same_written_step_by_step_in_parts_and_whole(statistics: str) -> None:
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.layer = BLNLSTM(4, 8, time_statistics=statistics)
            self.out = nn.Linear(8, 5)

        def forward(self, ids: Tensor, state: Any = None, start: int = 0) -> tuple[Tensor, Any]:
            output, state = self.layer(self.embedding(ids), state, start=start)
            return self.out(output), state

    model, text = Writer().double(), torch.tensor([0, 1, 2, 3, 4, 2, 1] * 18)[:120]
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    rows = text.view(4, 30).t()
    for _ in range(15):  # truncated back-propagation through time
        state: Any = None
        for start in range(0, 24, 6):
            logits, state = model(rows[start : start + 6], state, start)
            state = tuple(one.detach() for one in state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[start + 1 : start + 7].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    recompute_population(model, [rows[:24]])
    model.eval()
    for mode in ALL_MODES:
        set_mode(model, mode)
        written = rows[:4, :1]
        while len(written) < 24:  # the whole again for each letter
            written = torch.cat([written, model(written)[0][-1:].argmax(-1)])
        for size in (1, 3):
            state, found, start = None, rows[:4, :1], 0
            while len(found) < 24:
                for part in found[start:].split(size):
                    logits, state = model(part, state, start)
                    start += len(part)
                found = torch.cat([found, logits[-1:].argmax(-1)])
            assert torch.equal(found, written), (mode, size)


# copies, threads, weights that move on


@pytest.mark.parametrize(
    "duplicate", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_lives_on_its_own(duplicate: Any) -> None:
    layer = BLNLSTM(3, 4)
    layer(torch.randn(5, 2, 3))
    twin = duplicate(layer)
    before = deepcopy(layer.state_dict())
    twin(torch.randn(5, 2, 3))
    twin.load_state_dict(twin.state_dict())
    same(dict(layer.named_buffers()), {name: before[name] for name, _ in layer.named_buffers()})


@pytest.mark.parametrize(
    "layer", [BatchLayerNorm(3, momentum=0.1), BLNLSTM(3, 4), Recurrent("mgu", 3, 4), ConvBLN1d(3, 4, 3)], ids=str
)
def test_buffers_stay_where_they_are_while_their_shape_does(layer: nn.Module) -> None:
    layer(torch.randn(5, 3, 3))
    freeze_population(layer)
    layer.share_memory()
    places = {name: buffer.data_ptr() for name, buffer in layer.named_buffers() if buffer.numel()}
    layer(torch.randn(5, 3, 3))
    freeze_population(layer)
    assert places == {name: buffer.data_ptr() for name, buffer in layer.named_buffers() if buffer.numel()}
    assert all(buffer.is_shared() for buffer in layer.buffers() if buffer.numel())


def test_explicit_buffers_gather() -> None:
    layer = BLNLSTM(3, 4)
    layer(torch.randn(5, 2, 3))
    explicit = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    own = deepcopy(explicit)
    torch.func.functional_call(layer, {**dict(layer.named_parameters()), **explicit}, (torch.randn(5, 2, 3),))
    same(dict(layer.named_buffers()), own)
    assert explicit["norm_ih_l0.population.count"].eq(4).all()


@pytest.mark.parametrize("build", [lambda: BatchLayerNorm(3), lambda: BLNLSTM(3, 4), lambda: Recurrent("mgu", 3, 4)])
def test_eight_threads_lose_no_batch(build: Any) -> None:
    layer = build()
    x = torch.randn(5, 4, 3)
    threads = [threading.Thread(target=lambda: [layer(x) for _ in range(25)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batch = 5 if isinstance(layer, BatchLayerNorm) else 4
    assert all(bool((one.count == 200 * batch).all()) for one in populations(layer))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [lambda: BatchLayerNorm(3), lambda: BLNLSTM(3, 4), lambda: Recurrent("mgu", 3, 4)])
def test_activation_checkpointing_gathers_once(build: Any, reentrant: bool) -> None:
    layer = build()
    plain = deepcopy(layer)
    x = torch.randn(5, 4, 3, requires_grad=True)
    output = checkpoint(lambda x: layer(x), x, use_reentrant=reentrant)
    (output if isinstance(output, Tensor) else output[0]).sum().backward()
    plain(x)
    same(dict(layer.named_buffers()), dict(plain.named_buffers()))


def test_averaged_weights_take_populations_along() -> None:
    model = BLNLSTM(3, 4)
    model(torch.randn(5, 4, 3))
    freeze_population(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(5, 4, 3))
    freeze_population(model)
    averaged.update_parameters(model)
    same(dict(averaged.module.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("build", [lambda: BatchLayerNorm(3), lambda: BLNLSTM(3, 4), lambda: Recurrent("mgu", 3, 4)])
def test_an_average_has_a_population_of_its_own_at_any_time(build: Any, use_buffers: bool) -> None:
    model = nn.Sequential(build())
    average = AveragedModel(model, use_buffers=use_buffers)  # before the first batch
    weights = []
    for length in (5, 7, 4, 9):  # populations grow
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model(torch.randn(length, 4, 3))
        average.update_parameters(model)
        weights.append([one.detach().clone() for one in model.parameters()])
        x = torch.randn(5, 4, 3)
        recompute_population(average, [x])
        alone = deepcopy(model)
        for parameter, values in zip(alone.parameters(), zip(*weights, strict=True), strict=True):
            parameter.data = torch.stack(values).mean(0)
        recompute_population(alone, [x])
        same(frozen(average), frozen(alone))
    average.eval()(x)
    average.update_parameters(model)
    with pytest.warns(UserWarning, match="trained since"):
        average(x)


@pytest.mark.parametrize("build", [lambda: BatchLayerNorm(3), lambda: BLNLSTM(3, 4), lambda: Recurrent("mgu", 3, 4)])
def test_a_population_of_other_weights_is_noticed_once(build: Any) -> None:
    layer = build()
    x = torch.randn(5, 4, 3)
    recompute_population(layer, [x])
    layer.eval()(x)
    layer.train()(x)
    layer.eval().mode = "cccc" if hasattr(layer, "mode") else None
    if not hasattr(layer, "mode"):
        set_mode(layer, "cccc")
    layer(x)  # reads no population
    set_mode(layer, "ppcc")
    with pytest.warns(UserWarning, match=r"trained since its population was frozen.*BLNStatsCallback"):
        layer(x)
    layer(x)
    layer.train()(x)
    recompute_population(layer, [x])
    layer.eval()(x)
    restored = build()
    restored(x)
    freeze_population(restored)
    restored(x)
    restored.load_state_dict(layer.state_dict())
    restored.eval()(x)


def test_a_population_that_follows_is_never_that_of_other_weights() -> None:
    layer = BatchLayerNorm(3, momentum=0.1)
    for _ in range(2):
        layer.train()(torch.randn(5, 3))
        layer.eval()(torch.randn(5, 3))
