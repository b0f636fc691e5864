"""State and result of a training run, damaged in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bln._files import FileError
from lightning_bln.reproduce import command, main, training
from lightning_bln.reproduce.kept import read_result, read_state
from lightning_bln.reproduce.report import tables
from lightning_bln.reproduce.training import modes_of

from ..damage import OTHER_FORMATS, assert_names, taken_in_spite
from .small import FRACTION, SMALL, small_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a training run that stopped after its epochs, and its result."""
    folder = tmp_path_factory.mktemp("run")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "modes_of", stop)
        with pytest.raises(KeyboardInterrupt):
            small_run(folder, epochs=2)
    states = {name: (folder / name).read_bytes() for name in ("last.pt", "best.pt")}
    small_run(folder, epochs=2)
    for name, content in states.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["result.json", "last.pt", "best.pt"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_damage_is_one_line_that_names_the_file(name: str, damage: str, made: Path, tmp_path: Path) -> None:
    path, raw = tmp_path / name, (made / name).read_bytes()
    path.write_bytes(raw)

    def read() -> dict[str, Any]:
        return read_result(path, modes_of("bln")) if name == "result.json" else read_state(path)

    for changed, found in taken_in_spite(damage, path, read, FileError):
        if name == "result.json":  # a digit has changed, or the name of a setting
            assert damage == "flipped"
            tables([{**json.loads(raw), "history": found["history"], "test": found["test"]}])
        else:  # beside all that has a checksum
            assert damage == "flipped" or changed == OTHER_FORMATS["json"]


Result = dict[str, Any]


def without(*path: str) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        *above, last = path
        for key in above:
            result = result[key]
        del result[last]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without(name) for name in ("experiment", "history", "best_epoch", "validation", "test")),
        without("test", "paper"),
        without("validation", "recomputed", "pppp"),
        without("test", "paper", "cccc", "loss"),
        without("test", "paper", "cccc", "acc_authors"),
        lambda result: result.update(best_epoch=0),
        lambda result: result.update(best_epoch=3),
        lambda result: result.update(best_epoch="1"),
        lambda result: result.update(history=[]),
        lambda result: result.update(history={}),
        lambda result: result.update(experiment=None),
        lambda result: result["history"][1].pop("val_loss"),
        lambda result: result["history"][0].update(val_loss="low"),
        lambda result: result["history"][0].update(recomputed=[]),
        lambda result: result["history"].reverse(),
        lambda result: result["test"].update(paper=None),
    ],
)
def test_a_result_that_lacks_what_a_report_needs_is_refused(
    change: Callable[[Result], None], made: Path, tmp_path: Path
) -> None:
    result = json.loads((made / "result.json").read_text())
    assert read_result(made / "result.json", modes_of("bln")) == result
    change(result)
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(FileError, match=r"result\.json: truncated or corrupt \(.+\); delete it") as caught:
        small_run(tmp_path, epochs=2)
    assert_names(str(caught.value), tmp_path)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize(
    "state", [{}, {"model": 1}, {"model": {}}, {"model": {"a": torch.ones(1)}}, [1], {"settings": {}, "history": 1}]
)
def test_a_state_of_something_else_is_refused(name: str, state: object, made: Path, tmp_path: Path) -> None:
    for one in ("last.pt", "best.pt"):
        (tmp_path / one).write_bytes((made / one).read_bytes())
    torch.save(state, tmp_path / name)
    with pytest.raises(FileError, match=name) as caught:
        small_run(tmp_path, epochs=2)
    assert_names(str(caught.value), tmp_path)


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.EXPERIMENTS, "imdb", SMALL)
    folder = tmp_path / "bln-seed0"
    folder.mkdir()
    (folder / "result.json").write_text("{")
    arguments = ["imdb", "--fraction", str(FRACTION), "--batch-size", "5", "--seeds", "1", "--output", str(tmp_path)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"bln reproduce: {folder / 'result.json'}: truncated or corrupt")
    assert error.count("\n") == 1
