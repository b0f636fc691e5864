"""Recurrent layers that torch has no counterpart for: their maps given, in every form of a program."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_bln import BLNGRU, BLNLSTM, Recurrent, fold, recompute_population, set_mode
from lightning_bln.cells import BLNLSTMCell, Cell, Extra, RecurrentCell, registry
from lightning_bln.folding import FrozenCell, FrozenRecurrent
from lightning_bln.kernels import available
from lightning_bln.recurrence.prepared.directions import KEPT
from tests.export.helpers import exports
from tests.folding.test_folded_recurrent import MODES, assert_same, populated

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")

SIZES = ((6, 8), (3, 2), (11, 1))
"""Steps and samples; the population has seen six steps."""
REASONS = {
    "norm_cell": ("lstm", {"time_statistics": "shared"}, "a norm on the cell state; train with norm_cell=False"),
    "steps": ("gru", {}, "statistics of each time step; train with time_statistics='shared'"),
    "both": (
        "lstm",
        {},
        "statistics of each time step; train with time_statistics='shared'; a norm on the cell state; train with "
        "norm_cell=False",
    ),
    "zoneout": (
        "rnn",
        {"zoneout": 0.1, "time_statistics": "shared"},
        "zoneout=0.1, which acts in evaluation, too; train with zoneout=0",
    ),
    "cell": ("mgu", {"time_statistics": "shared"}, "cell MGU, which torch does not have"),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"time_statistics": "shared", "num_layers": 2, "bidirectional": True, "gate_statistics": "joint"},
    {"batch_first": True, "zoneout": 0.2},
    {"bias": False, "norm_hidden": False},
)


def made(cell: str, norm: str | None = "bln", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A layer in the mode that makes its norms affine."""
    torch.manual_seed(0)
    return populated(Recurrent(cell, 3, 5, norm=norm, dtype=dtype, **options), MODES[norm])


def inputs(steps: int, samples: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sequences; batch-first layers read as many samples as steps."""
    return (2 * torch.randn(steps, samples, 3) + 3).to(dtype)


@pytest.mark.parametrize("name", REASONS)
def test_the_report_says_why_torch_has_no_such_layer(name: str) -> None:
    cell, options, reason = REASONS[name]
    layer = made(cell, **options)
    folded, report = fold(layer, report=True)
    assert type(folded) is FrozenRecurrent
    assert str(report) == f"model: Recurrent -> FrozenRecurrent ({reason})"


@pytest.mark.exact
@pytest.mark.parametrize("cell", list(registry))
@pytest.mark.parametrize(("norm", "number"), [("bln", 0), ("bln", 1), ("layer", 2), ("batch", 3), (None, 1)])
def test_every_cell_computes_what_it_did(cell: str, norm: str | None, number: int) -> None:
    options = OPTIONS[number]
    layer = made(cell, norm, **options)
    found = fold(layer)
    assert isinstance(found, (FrozenRecurrent, nn.LSTM, nn.GRU, nn.RNN))
    script = torch.jit.script(found) if isinstance(found, FrozenRecurrent) else None
    reference = copy.deepcopy(found)
    if script is not None:
        reference.backend = "reference"
    with torch.no_grad():
        for steps, samples in SIZES:
            x = inputs(steps, samples)
            expected = layer(x)
            for one in (found, reference, script):
                if one is not None:
                    compare(one(x), expected, torch.float64)
        state = expected[1]
        compare(found(x, state), layer(x, state), torch.float64)
        if script is not None:
            given = list(state) if isinstance(state, tuple) and len(state) > 2 else state
            compare(script(x, given), layer(x, state), torch.float64)


def compare(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Compare outputs and states, of which scripts may give lists."""
    assert_same(found[0], expected[0], dtype)
    states = [value if isinstance(value, Tensor) else tuple(value) for value in (found[1], expected[1])]
    assert_same(*states, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mgu", "slstm"])
def test_layers_and_scripts_compute_what_the_layer_did(cell: str, norm: str, dtype: torch.dtype) -> None:
    layer = made(cell, norm, dtype, num_layers=2)
    found = fold(layer)
    script = torch.jit.script(found)
    with torch.no_grad():
        for steps, samples in SIZES:
            x = inputs(steps, samples, dtype)
            compare(found(x), layer(x), dtype)
            compare(script(x), layer(x), dtype)
        compare(script(x[:, 0]), layer(x[:, 0]), dtype)


@pytest.mark.parametrize("cell", ["lstm", "gru", "mgu", "slstm"])
def test_single_steps(cell: str) -> None:
    torch.manual_seed(0)
    layer = RecurrentCell(cell, 3, 5, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.4)
    recompute_population(layer, [inputs(8, 1)[:, 0] for _ in range(3)])
    set_mode(layer.eval(), "pppp")
    found = fold(layer)
    assert type(found) is (nn.GRUCell if cell == "gru" else FrozenCell)
    script = torch.jit.script(found)
    for x in (inputs(4, 1)[:, 0], inputs(1, 1)[0, 0]):
        expected = layer(x)
        state: Any = expected
        if cell == "slstm":
            assert_same(tuple(script(x)), expected, torch.float64)
            assert_same(tuple(script(x, list(state))), layer(x, state), torch.float64)
        else:
            assert_same(script(x), expected, torch.float64)
            assert_same(script(x, state), layer(x, state), torch.float64)
        assert_same(found(x, state), layer(x, state), torch.float64)


def test_sequences_in_parts_packed_and_of_uneven_length() -> None:
    layer = made("lstm")
    found, x = fold(layer), inputs(9, 4)
    compare(found(x[3:], None, start=3), layer(x[3:], None, start=3), torch.float64)
    packed = pack_sequence([x[:5, 0], x[:9, 1], x[:2, 2]], enforce_sorted=False)
    compare(found(packed), layer(packed), torch.float64)
    _, last = found(x)
    with pytest.warns(UserWarning, match="comes back without start="):
        found(x, last)


@pytest.mark.skipif(available()["cpu"] is None, reason="the compiled kernels are not installed")
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mgu"])
def test_it_runs_on_the_kernels(cell: str) -> None:
    found, x = fold(made(cell)), inputs(6, 4)
    assert found.backend_reason is None
    with torch.no_grad():
        first = [found(x) for _ in range(3)][-1]
    if cell != "mgu":
        assert KEPT[found][False].calls
        found.norm_ih_l0.mean.add_(1.0)
        reference = copy.deepcopy(found)
        reference.backend = "reference"
        with torch.no_grad():
            assert not torch.equal(found(x)[0], first[0])
            compare(found(x), reference(x), torch.float64)


@exports
@pytest.mark.parametrize("cell", ["lstm", "gru", "mgu"])
def test_programs_with_open_axes(cell: str) -> None:
    found = fold(made(cell, dtype=torch.float32))
    axes = {0: torch.export.Dim("steps", min=1, max=64), 1: torch.export.Dim("samples", min=1, max=64)}
    program = torch.export.export(found, (inputs(6, 4, torch.float32),), dynamic_shapes=(axes,))
    for steps, samples in SIZES:
        x = inputs(steps, samples, torch.float32)
        compare(program.module()(x), found(x), torch.float32)


def test_traces_within_a_model() -> None:
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(5, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][-1])

    model = Model(fold(made("mgu"))).eval()
    x = inputs(6, 4)
    with torch.no_grad():
        assert_same(torch.jit.trace(model, x)(x), model(x), torch.float64)
        script = torch.jit.script(model)
        for steps, samples in SIZES:
            x = inputs(steps, samples)
            assert_same(script(x), model(x), torch.float64)


def test_a_scripted_file_needs_no_library(tmp_path: Any) -> None:
    layer = made("lstm")
    x = inputs(9, 2)
    torch.jit.script(fold(layer)).save(str(tmp_path / "layer.pt"))
    torch.save((x, layer(x)[0]), tmp_path / "data.pt")
    program = (
        "import sys; sys.modules['lightning_bln'] = None\n"
        "import torch\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(torch.jit.load(sys.argv[1])(x)[0], expected, rtol=0, atol=1e-10)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "layer.pt"), str(tmp_path / "data.pt")]
    assert subprocess.run(command, check=False).returncode == 0


def test_it_has_no_population_and_no_mode() -> None:
    layer = made("lstm")
    found = fold(layer)
    assert found.mode is None
    with pytest.raises(ValueError, match="no layer with a statistics mode"):
        set_mode(found, "cccc")
    x = inputs(6, 4)
    compare(found(x), layer(x), torch.float64)
    assert fold(found, report=True)[1].entries[0].notes == ("it is frozen",)


def test_copies_pickles_and_state_dicts() -> None:
    layer = made("mgu")
    found, x = fold(layer), inputs(6, 4)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    for other in (copy.deepcopy(found), torch.load(file, weights_only=False)):
        compare(other(x), found(x), torch.float64)
    other = fold(made("mgu", norm="bln"))
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(found.state_dict())
    compare(other(x), found(x), torch.float64)


def test_the_layer_stays_as_it_was() -> None:
    layer = made("lstm")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    found = fold(layer)
    with torch.no_grad():
        for value in (*found.parameters(), *found.buffers()):
            value.add_(1.0)
    assert type(layer) is Recurrent
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_ties_and_start_do_not_matter() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = BLNGRU(3, 5, time_statistics="shared", dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.recurrent(x, start=4)[0]

    model = Reads()
    populated(model.recurrent)
    folded, report = fold(model, report=True)
    assert "FrozenRecurrent (it is called with start, which no plain layer takes)" in str(report)
    x = inputs(6, 4)
    assert_same(folded(x), model(x), torch.float64)
    two = nn.ModuleList([model.recurrent, copy.deepcopy(model.recurrent)])
    two[1].weight_hh_l0 = two[0].weight_hh_l0
    folded, report = fold(two, report=True)
    assert "0, 1: BLNGRU -> FrozenRecurrent (its parameters are tied to others)" in str(report)
    assert folded[0].weight_hh_l0 is folded[1].weight_hh_l0


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mgu"])
def test_it_trains_with_its_maps(cell: str) -> None:
    one, two = fold(made(cell)).train(), fold(made(cell)).train()
    two.backend = "reference"
    x = inputs(6, 4)
    for _ in range(3):
        for layer in (one, two):
            layer.zero_grad()
            layer(x)[0].square().sum().backward()
        for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
            if left.requires_grad:
                torch.testing.assert_close(left.grad, right.grad, rtol=1e-9, atol=1e-9, msg=name)


class Branching(Cell):
    gates = ("a",)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        v = x + project(state.h)
        return self.State(h=torch.zeros_like(v.a) if bool(v.a.abs().max() > 1.5) else torch.tanh(v.a))


class Counting(Cell):
    gates = ("a",)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        v = x + project(state.h)
        return self.State(h=torch.tanh(v.a) / int(v.a.shape[-2]))


@pytest.mark.parametrize("cell", [Branching, Counting])
def test_a_script_of_what_hangs_on_numbers_is_refused(cell: type[Cell]) -> None:
    found = fold(Recurrent(cell, 3, 5, norm=None))
    with pytest.raises(ValueError, match=f"{cell.__name__} cannot be scripted, since what it does depends on numbers"):
        torch.jit.script(found)


class WithName(Cell):
    gates = ("a",)
    parameters: ClassVar[dict[str, Extra]] = {"cell": Extra(), "zoneout": Extra(), "names": Extra()}

    def step(self, x: Any, state: Any, project: Any) -> Any:
        return self.State(h=torch.tanh((x + project(state.h)).a * self.cell + self.zoneout * self.names))


def test_a_cells_parameters_may_have_any_name() -> None:
    found, x = fold(Recurrent(WithName, 3, 5, norm=None, dtype=torch.float64)), inputs(4, 2)
    compare(torch.jit.script(found)(x), found(x), torch.float64)


def test_scripts_refuse_what_does_not_fit() -> None:
    script = torch.jit.script(fold(made("lstm")))
    x, one = inputs(4, 3), torch.zeros(1, 1, 5, dtype=torch.float64)
    for wrong in ((one, one), (one.expand(2, 3, 5), one.expand(2, 3, 5))):
        with pytest.raises(torch.jit.Error, match="hx does not fit"):
            script(x, wrong)
    for ranks in (x[0, 0], x[None]):
        with pytest.raises(torch.jit.Error, match="axes"):
            script(ranks)


def test_a_subclass_with_ways_of_its_own_stays() -> None:
    class Doubled(BLNLSTM):
        def _layers(self, *arguments: Any) -> Any:
            outputs, last = super()._layers(*arguments)
            return 2 * outputs, last

    class Helped(BLNLSTM):
        def head(self, x: Tensor) -> Tensor:
            return self(x)[0][-1]

    class Sized(BLNLSTM):
        def __init__(self) -> None:
            super().__init__(3, 5)

    for kind, name in ((Doubled, "_layers"), (Helped, "head")):
        layer = populated(kind(3, 5))
        folded, report = fold(layer, report=True)
        assert type(folded) is kind
        assert f"{kind.__name__} has {name} of its own" in str(report)
    assert type(fold(populated(Sized()))) is FrozenRecurrent


def test_where_the_trace_does_not_reach_the_report_says_what_is_taken() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = BLNGRU(3, 5, time_statistics="shared")

        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 1e9 else self.recurrent(x)[0]

    model = Reads()
    populated(model.recurrent)
    folded, report = fold(model, report=True)
    assert type(folded.recurrent) is nn.GRU
    assert "taken to be called without start= and stream()" in str(report)


def test_maps_are_no_narrower_than_a_population() -> None:
    found = fold(made("lstm", dtype=torch.float32)).bfloat16()
    assert {value.dtype for value in found.buffers()} == {torch.float32}
    assert found.weight_ih_l0.dtype is torch.bfloat16


def test_zero_weights_and_narrow_dtypes() -> None:
    layer = made("lstm")
    with torch.no_grad():
        layer.norm_hh_l0.weight[:7] = 0.0
        layer.norm_cell_l0.weight.neg_()
    x = inputs(6, 4)
    compare(fold(layer)(x), layer(x), torch.float64)
    half = made("gru", dtype=torch.float32).bfloat16()
    found = fold(half)
    torch.testing.assert_close(found(x.bfloat16())[0], half(x.bfloat16())[0], rtol=0.05, atol=0.05)


def test_a_model_of_lstm_and_cell_folds_whole() -> None:
    model = nn.ModuleList([populated(BLNLSTM(3, 5)), BLNLSTMCell(3, 5)])
    recompute_population(model[1], [torch.randn(8, 3)])
    set_mode(model, "pppp")
    assert [type(one) for one in fold(model)] == [FrozenRecurrent, FrozenCell]
