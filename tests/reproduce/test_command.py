"""``bln reproduce`` on a small experiment, its errors, and a quick pass over real images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_bln.models import PAPER_NORMS
from lightning_bln.reproduce import command, main

from .small import FRACTION, SMALL


@pytest.fixture
def small_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.EXPERIMENTS, "imdb", SMALL)


def test_command_writes_everything(small_command: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["imdb", "--fraction", str(FRACTION), "--batch-size", "5", "--seeds", "1", "--epochs", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for norm in PAPER_NORMS:
        assert f"| {norm} " in shown
    assert "best on test (no fair choice)" in shown
    for name in ("results.json", "table.md", "convergence.png", "modes.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "table.md").read_text() in shown
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "epoch" not in capsys.readouterr().out.split("|")[0].replace("epochs", "")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["imdb", "--seeds", "0"], 2, "--seeds is 0, but it must be positive"),
        (["imdb", "--fraction", "-1"], 2, "--fraction is -1.0"),
        (["imdb", "--data-dir", "nowhere"], 1, "IMDB reviews not found: no aclImdb or aclImdb_v1.tar.gz in nowhere"),
        (["cifar10", "--data-dir", "nowhere"], 1, "CIFAR-10 not found"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_quick_pass_over_real_images(shared: Path, tmp_path: Path) -> None:
    status = main(
        ["cifar10", "--quick", "--norms", "bln", "--data-dir", str(shared / "data"), "--output", str(tmp_path)]
    )
    assert status == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["test"]["recomputed"]["pppp"]["acc"] > 0.15
