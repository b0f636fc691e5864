"""Recurrent layers as torch's own, their norms in the weights."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    Recurrent,
    SweepResult,
    fold,
    recompute_population,
    set_mode,
)
from lightning_bln.models import SequenceClassifier
from lightning_bln.models.recurrent import RecurrentNetwork
from lightning_bln.recurrence.cell_modules import BLNGRUCell, BLNLSTMCell, BLNRNNCell, RecurrentCell

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PLAIN: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
MODES = {"bln": "pppp", "batch": "ppcp", "layer": "cppp", None: "ppcc"}


def populated(layer: Any, mode: str = "pppp") -> Any:
    """The layer with random parameters and a population of inputs that are not centred, in evaluation mode."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.4)
    if getattr(layer, "norm", None) is not None:
        dtype = next(layer.parameters()).dtype
        recompute_population(layer.train(), [(2 * torch.randn(6, 8, 3) + 3).to(dtype) for _ in range(2)])
        set_mode(layer, mode)
    return layer.eval()


def assert_same(found: Any, expected: Any, dtype: torch.dtype) -> None:
    if isinstance(expected, Tensor):
        scale = float(expected.detach().abs().max().clamp(min=1.0))  # relu lets states grow
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)
        return
    if isinstance(expected, PackedSequence):
        assert torch.equal(found.batch_sizes, expected.batch_sizes)
        return assert_same(found.data, expected.data, dtype)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, dtype)


def inputs_of(layer: Recurrent, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """A batch, the same with first states, a packed one in any order, and a single sequence."""
    x = (2 * torch.randn(8, 8, 3) + 3).to(dtype)
    packed = pack_sequence([x[:length, 0] for length in (2, 8, 5)], enforce_sorted=False)

    def first(*batch: int) -> Any:
        number = layer.num_layers * layer.num_directions
        states = [torch.randn(number, *batch, layer.state_size(name), dtype=dtype) for name in layer.cell.states]
        return tuple(states) if len(states) > 1 else states[0]

    return [(x,), (x, first(8)), (packed,), (packed, first(3)), (x[:, 0],), (x[:, 0], first())]


@pytest.mark.exact
@pytest.mark.parametrize("cell", PLAIN)
@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate_statistics", ["separate", "joint"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_recurrent_layer_becomes_torchs(cell, norm, dtype, gate_statistics, bidirectional, bias) -> None:
    rng = random.Random(f"{cell}{norm}{dtype}{gate_statistics}{bidirectional}{bias}")
    options: dict[str, Any] = {"gate_statistics": gate_statistics, "bidirectional": bidirectional, "bias": bias}
    options |= {"num_layers": rng.choice([1, 2, 3]), "batch_first": rng.random() < 0.5, "dtype": dtype}
    options |= {"proj_size": rng.choice([0, 2])} if cell == "lstm" else {}
    options |= {"nonlinearity": rng.choice(["tanh", "relu"])} if cell == "rnn" else {}
    options |= {"recurrent_dropout": 0.3, "input_dropout": 0.1, "population": rng.choice(["pooled", "paper"])}
    options |= rng.choice([{}, {}, {"norm_input": False}, {"norm_hidden": False}])
    if cell == "rnn" and options["nonlinearity"] == "relu":
        options["num_layers"] = 1  # more of them grow without bound
    layer = Recurrent(cell, 3, 5, norm=norm, norm_cell=False, time_statistics="shared", **options)
    populated(layer, MODES[norm])
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    plain = fold(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(plain) is PLAIN[cell]
    assert not plain.training
    assert plain.bias == (bias or norm is not None)
    for arguments in inputs_of(layer, dtype):
        with torch.no_grad():
            assert_same(plain(*arguments), layer(*arguments), dtype)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    other = PLAIN[cell](3, 5, **{name: getattr(plain, name) for name in SETTINGS[cell]}, dtype=dtype)
    other.load_state_dict(plain.state_dict())


SETTINGS = dict.fromkeys(PLAIN, ("num_layers", "bias", "batch_first", "dropout", "bidirectional"))
SETTINGS["lstm"] += ("proj_size",)
SETTINGS["rnn"] += ("nonlinearity",)


@pytest.mark.parametrize(("kind", "plain"), [(BLNLSTM, nn.LSTM), (BLNGRU, nn.GRU), (BLNRNN, nn.RNN)])
def test_named_layers_fold_inside_a_model(kind, plain) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {} if kind is not BLNLSTM else {"norm_cell": False}
            self.recurrent = kind(3, 5, batch_first=True, time_statistics="shared", **options)
            self.norm, self.linear = BatchLayerNorm(5, positions="shared"), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(self.recurrent(x)[0]))

    model = Tagger().double()
    recompute_population(model, [torch.randn(6, 8, 3, dtype=torch.float64) for _ in range(2)])
    set_mode(model, "pppp")
    folded, report = fold(model.eval(), report=True)
    assert [type(one) for one in folded.children()] == [plain, nn.Identity, nn.Linear]
    assert f"recurrent: {kind.__name__} -> {plain.__name__}" in str(report)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert_same(folded(x), model(x), torch.float64)


def test_the_candidate_s_hidden_bias_of_a_gru_stays_inside_the_reset_gate() -> None:
    layer = populated(BLNGRU(3, 4, time_statistics="shared", dtype=torch.float64))
    plain: Any = fold(layer)
    assert not torch.allclose(plain.bias_hh_l0[8:], layer.bias_hh_l0[8:])
    hidden, x = torch.randn(1, 1, 4, dtype=torch.float64), torch.randn(1, 1, 3, dtype=torch.float64)
    assert_same(plain(x, hidden), layer(x, hidden), torch.float64)


@pytest.mark.parametrize(
    ("kind", "plain"), [(BLNLSTMCell, nn.LSTMCell), (BLNGRUCell, nn.GRUCell), (BLNRNNCell, nn.RNNCell)]
)
@pytest.mark.parametrize("norm", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_single_steps_become_torchs(kind, plain, norm, bias) -> None:
    cell: RecurrentCell = kind(3, 5, bias, norm=norm, dtype=torch.float64, **CELL_OPTIONS.get(kind, {}))
    nn.init.normal_(cell.weight_ih)
    if norm is not None:
        recompute_population(cell, [torch.randn(8, 3, dtype=torch.float64) + 3 for _ in range(3)])
        set_mode(cell, MODES[norm])
    made = fold(cell.eval())
    assert type(made) is plain
    x = torch.randn(4, 3, dtype=torch.float64)
    state = cell(x)
    assert_same(made(x), state, torch.float64)
    assert_same(made(x, state), cell(x, state), torch.float64)


CELL_OPTIONS: dict[type, dict[str, Any]] = {BLNLSTMCell: {"norm_cell": False}}


@pytest.mark.parametrize(
    ("cell", "mode", "options", "reason"),
    [
        ("gru", "ppcc", {}, "mode='ppcc' takes statistics from each input; pppp would fold"),
        ("gru", "ppcc", {"norm": "layer"}, "mode='ppcc' takes statistics from each input; pppp would fold"),
        (
            "lstm",
            "ppcc",
            {"time_statistics": "separate", "norm_cell": True},
            "mode='ppcc' takes statistics from each input; pppp would fold; statistics of each time step; train with "
            "time_statistics='shared'; a norm on the cell state; train with norm_cell=False",
        ),
    ],
)
def test_the_report_says_why_a_recurrent_layer_stays(cell, mode, options, reason) -> None:
    options = {"time_statistics": "shared", **({"norm_cell": False} if cell == "lstm" else {}), **options}
    layer = populated(Recurrent(cell, 3, 5, **options), mode)
    folded, report = fold(layer, report=True)
    assert type(folded) is Recurrent
    assert str(report) == f"model: Recurrent left alone ({reason})"
    x = torch.randn(4, 2, 3)
    assert torch.equal(folded(x)[0], layer(x)[0])


def test_the_report_names_the_score_of_the_mode_that_folds() -> None:
    layer = populated(BLNGRU(3, 5, time_statistics="shared"), "ppcc")
    result = SweepResult({"ppcc": {"val_loss": 0.0734}, "pppp": {"val_loss": 0.0736}}, monitor="val_loss")
    _, report = fold(layer, report=True, result=result)
    assert "pppp would fold: val_loss 0.0736 instead of 0.0734" in str(report)


def test_an_empty_population_is_a_reason() -> None:
    layer = BLNGRU(3, 5, time_statistics="shared")
    set_mode(layer, "pppp")
    assert "no population is frozen; call recompute_population before" in str(fold(layer, report=True)[1])


def test_hooks_are_a_reason() -> None:
    layer = populated(BLNGRU(3, 5, time_statistics="shared"))
    layer.register_forward_hook(lambda *_: None)
    assert "it has hooks, which a plain layer would not run" in str(fold(layer, report=True)[1])


def test_parametrized_weights_are_baked_in_the_copy_alone() -> None:
    layer = populated(BLNLSTM(3, 5, norm_cell=False, time_statistics="shared", dtype=torch.float64))
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = layer(x)
    assert_same(fold(layer)(x), expected, torch.float64)
    assert hasattr(layer, "parametrizations")
    assert_same(layer(x), expected, torch.float64)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_network_that_reads_packed_sequences_folds(bidirectional: bool) -> None:
    options: dict[str, Any] = {"norm_cell": False, "time_statistics": "shared", "bidirectional": bidirectional}
    model = populated(RecurrentNetwork(3, 2, 5, **options))
    recompute_population(model.train(), [torch.randn(6, 8, 3) for _ in range(2)])
    set_mode(model, "pppp")
    plain = fold(model.eval())
    assert all(type(one).__module__.startswith("torch.") for one in plain.children())
    x, lengths = torch.randn(3, 7, 3), torch.tensor([7, 3, 5])
    for arguments in [(x,), (x, lengths)]:
        assert_same(plain(*arguments), model(*arguments), torch.float32)


def test_a_lightning_module_folds_or_says_why() -> None:
    model = SequenceClassifier(3, 2, 5, cell="gru", norm=None).eval()
    plain: Any = fold(model)
    x = torch.randn(3, 7, 3)
    assert type(plain.network.recurrent) is nn.GRU
    assert_same(plain(x), model(x), torch.float32)
    _, report = fold(SequenceClassifier(3, 2, 5), report=True)
    assert "network.recurrent: Recurrent left alone" in str(report)


@pytest.mark.parametrize(("cell", "seed"), [*itertools.product(PLAIN, range(3))])
def test_folded_layers_are_half_precision_of_exact_weights(cell, seed) -> None:
    layer = Recurrent(cell, 3, 5, norm_cell=False, time_statistics="shared", dtype=torch.float64)
    half = populated(layer).bfloat16()
    plain, exact = fold(half), fold(copy.deepcopy(half).double())
    for one, other in zip(plain.parameters(), exact.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other.bfloat16())
