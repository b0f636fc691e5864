"""The demo, as the command line runs it."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_bln import cli
from lightning_bln.demo import DigitRows, RowClassifier


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_it_trains_picks_a_mode_and_writes_what_it_says(tmp_path, capsys) -> None:
    cli.main(["demo", "--output", str(tmp_path), "--epochs", "3"])
    printed = capsys.readouterr().out
    scores = json.loads((tmp_path / "bln_sweep.json").read_text())["scores"]
    assert len(scores) == 16
    for mode in scores:
        assert mode in printed
    for path in ("bln_sweep.png", "digits.ckpt"):
        assert str(tmp_path / path) in printed.replace("\n", "")
        assert (tmp_path / path).stat().st_size > 0
    saved = RowClassifier.load_from_checkpoint(tmp_path / "digits.ckpt")
    best = min(scores, key=lambda mode: scores[mode]["val_loss"])
    assert saved.lstm.mode == best or not best.startswith("pp")
    assert scores[saved.lstm.mode]["val_acc"] > 0.7


def test_the_split_is_fixed_and_disjoint() -> None:
    first, second = DigitRows(), DigitRows()
    first.setup()
    second.setup()
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 1197, "val": 300, "test": 300}
    for name in first.splits:
        assert torch.equal(first.splits[name].tensors[0], second.splits[name].tensors[0])
    images = torch.cat([split.tensors[0] for split in first.splits.values()]).flatten(1)
    assert len(images.unique(dim=0)) == 1797
    sorted_labels = torch.cat([labels for _, labels in first.sorted_by_class("test")])
    assert torch.equal(sorted_labels, sorted_labels.sort()[0])


def test_help_lists_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    assert "demo" in capsys.readouterr().out
