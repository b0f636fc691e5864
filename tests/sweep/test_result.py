"""Results name the best mode, and tell the same as a table, a heat map and JSON."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from lightning_bln import ALL_MODES
from lightning_bln.sweep import SweepResult


def result(**options: Any) -> SweepResult:
    scores = {mode: {"loss": 0.1 * index, "acc": 1 - 0.1 * index} for index, mode in enumerate(ALL_MODES)}
    scores["pppp"]["loss"] = math.nan
    return SweepResult(scores, "loss", **options)


def test_best_by_either_direction_and_metric() -> None:
    assert result().best() == "pppc"
    assert result().best("acc", "max") == "pppp"
    assert result().best(among=["cccc", "pccc"]) == "pccc"
    assert result().best("acc", direction="max") == result().best("acc", mode="max") == "pppp"
    assert result(direction="max").best() == result(mode="max").best() == "cccc"
    assert result(mode="max").direction == result(direction="max").mode == "max"
    with pytest.raises(ValueError, match="monitor='f1'"):
        result().best("f1")


@pytest.mark.parametrize("make", [result, lambda **given: result().best(**given)])
def test_contradictory_directions_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="direction='max' and mode='min'"):
        make(direction="max", mode="min")
    with pytest.raises(ValueError, match="direction='up'"):
        make(direction="up")


def test_files_hold_the_direction_by_its_earlier_name() -> None:
    state = result(direction="max").to_dict()
    assert state["mode"] == "max"
    assert SweepResult.from_dict(state).direction == "max"


def test_json_round_trip(tmp_path: Path) -> None:
    made = result(incumbent="ppcc", chosen="pppc", regrouped={"pppc": (0.5, math.inf)}, note="so it is", reason="it is")
    text = made.to_json(tmp_path / "result.json")
    for source in (text, tmp_path / "result.json"):
        read = SweepResult.from_json(source)
        assert math.isnan(read.scores["pppp"]["loss"])
        assert read.to_dict() == made.to_dict()
    state = made.to_dict()
    del state["reason"]  # as in files of earlier versions
    assert SweepResult.from_dict(state).reason is None


def test_table_ranks_and_marks() -> None:
    lines = str(result(incumbent="ppcc", chosen="ppcp")).splitlines()
    assert lines[0].split() == ["mode", "loss", "acc"]
    assert lines[1].split() == ["pppc", "0.1000", "0.9000", "best"]
    assert lines[2].split() == ["ppcp", "0.2000", "0.8000", "chosen"]
    assert lines[-1].startswith("pppp")


def test_tables_mark_modes_that_fold() -> None:
    made = result(incumbent="pppc", foldable=["ppcc", "pppc"])
    assert made.foldable == ("pppp", "pppc", "ppcc")  # pppp folds whatever the norms
    lines = [line.split() for line in str(made).splitlines()]
    assert lines[1] == ["pppc", "0.1000", "0.9000", "best,", "incumbent,", "folds"]
    assert [line[0] for line in lines if line[-1] == "folds"] == ["pppc", "ppcc", "pppp"]


def test_the_best_mode_that_folds() -> None:
    made = result(foldable=["ppcc", "cccc"])
    assert made.best(among="foldable") == "ppcc"
    assert made.best(among="batch_independent") == "pppc"
    assert made.best("acc", "min", among="c***") == "cccc"
    with pytest.raises(ValueError, match="among='most', but it must be 'all', 'batch_independent', 'foldable'"):
        made.best(among="most")
    # the incumbent, which others fall back to, may not fold
    for scores in ({"cccc": {"loss": 1.0}}, {"pppp": {"loss": math.nan}, "cccc": {"loss": 1.0}}):
        with pytest.raises(ValueError, match="among='foldable', but no mode that folds has a score"):
            SweepResult(scores, "loss", incumbent="cccc").best(among="foldable")  # type: ignore[arg-type]


def test_files_keep_which_modes_fold() -> None:
    made = result(foldable=["ppcc"])
    assert SweepResult.from_json(made.to_json()).foldable == ("pppp", "ppcc")
    assert pickle.loads(pickle.dumps(made)).foldable == ("pppp", "ppcc")
    state = made.to_dict()
    del state["foldable"]  # as in files of earlier versions
    assert SweepResult.from_dict(state).foldable == ("pppp",)
    old = SweepResult.__new__(SweepResult)
    old.__setstate__({name: value for name, value in vars(made).items() if name != "foldable"})
    assert old.foldable == ("pppp",)


def test_note_and_reason_stand_below_the_table() -> None:
    assert result().table().caption is None
    made = result(note="So it is.", reason="a step draws random numbers")
    footer = ["So it is.", "Modes were evaluated one after the other: a step draws random numbers."]
    assert str(made).splitlines()[-2:] == footer
    assert made.table().caption == "\n".join(footer)


def test_heat_map_marks_the_best_and_the_incumbent() -> None:
    figure = result(incumbent="ppcc", chosen="pppc").plot()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts][:2] == ["nan", "0.1000"]
    assert sorted(patch.get_label() for patch in axes.patches) == ["best: pppc", "incumbent: ppcc"]


def labels_of(figure: Any) -> tuple[str, list[str], str, list[str]]:
    axes = figure.axes[0]
    ticks = [[one.get_text() for one in each] for each in (axes.get_yticklabels(), axes.get_xticklabels())]
    return axes.get_ylabel(), ticks[0], axes.get_xlabel(), ticks[1]


def places_of(figure: Any) -> dict[str, tuple[float, float]]:
    """The row and the column at the middle of each frame."""
    return {
        patch.get_label(): (patch.get_y() + patch.get_height() / 2, patch.get_x() + patch.get_width() / 2)
        for patch in figure.axes[0].patches
    }


@pytest.mark.parametrize(
    ("modes", "name"),
    [(("ppcc", "pccc", "cpcc", "cccc"), "batch"), (("pppp", "pppc", "ppcp", "ppcc"), "feature")],
)
def test_modes_that_differ_in_one_pair_of_letters_have_a_small_heat_map(modes: tuple[str, ...], name: str) -> None:
    scores = {mode: {"loss": 0.4 - 0.1 * index} for index, mode in enumerate(modes)}
    figure = SweepResult(scores, "loss", incumbent=modes[1], chosen=modes[2], regrouped={modes[2]: (0.1, 0.2)}).plot()
    sources = ["population", "current"]
    assert labels_of(figure) == (f"{name} mean", sources, f"{name} variance", sources)
    assert figure.axes[0].images[0].get_array().tolist() == [[0.4, pytest.approx(0.3)], [0.2, pytest.approx(0.1)]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.4000", "0.3000", "0.2000", "0.1000"]
    expected = {f"best: {modes[3]}": (1, 1), f"incumbent: {modes[1]}": (0, 1), f"chosen: {modes[2]}": (1, 0)}
    assert places_of(figure) == {label: pytest.approx(place) for label, place in expected.items()}
    assert len(str(SweepResult(scores, "loss")).splitlines()) == 5


@pytest.mark.parametrize(
    ("modes", "incumbent"),
    [(ALL_MODES, "ppcc"), (("ppcc",), "ppcc"), (("ppcc", "pccc"), "cccp"), (("pppp", "cccc"), None)],
)
def test_any_other_modes_have_a_large_heat_map(modes: tuple[str, ...], incumbent: str | None) -> None:
    figure = SweepResult({mode: {"loss": 0.5} for mode in modes}, "loss", incumbent=incumbent).plot()
    label, ticks, across, _ = labels_of(figure)
    assert (label, across) == ("batch statistics", "feature statistics")
    assert ticks[1] == "mean population\nvar current"
    assert figure.axes[0].images[0].get_array().shape == (4, 4)
    assert len(figure.axes[0].texts) == len(modes)


def test_a_table_fits_its_width_and_names_what_it_leaves_out() -> None:
    from rich.console import Console

    names = [f"metric_{index}" for index in range(12)]
    scores = {mode: {"loss": 0.1, **dict.fromkeys(names, 0.5)} for mode in ("pppp", "cccc")}
    made = SweepResult(scores, "loss", regrouped={"cccc": (0.1, 0.2)}, incumbent="cccc")
    shown = {}
    for width in (40, 80, 100, 400):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(made)
        lines = console.export_text().splitlines()
        shown[width] = [name for name in names if name in lines[2]]
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        left_out = ", ".join(name for name in names if name not in shown[width])
        assert (f"Not shown: {left_out}." in text) if left_out else ("Not shown" not in text)
        assert {"loss", "regrouped"} <= set(lines[2].replace("┃", " ").split()) or width == 40
    assert [len(one) for one in shown.values()] == [0, 2, 4, 12]
