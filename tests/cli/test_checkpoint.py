"""A statistics mode written into a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_bln.cli.checkpoint import write_mode
from lightning_bln.demo import RowClassifier
from lightning_bln.modes import set_mode

pytest.importorskip("jsonargparse")


def test_a_checkpoint_survives_a_write_that_fails(checkpoint, monkeypatch, load) -> None:
    model = load(checkpoint)
    set_mode(model, "cccc")
    before = checkpoint.read_bytes()

    def run_out_of_space(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", run_out_of_space)
    with pytest.raises(OSError, match="no space"):
        write_mode(checkpoint, model)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_mode_of_another_model_is_refused(checkpoint) -> None:
    other = torch.nn.Sequential(copy.deepcopy(RowClassifier(hidden_size=4).lstm))
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="not of this Sequential"):
        write_mode(checkpoint, other)
    assert checkpoint.read_bytes() == before


def test_a_link_to_a_checkpoint_stays_a_link(checkpoint, load) -> None:
    link = checkpoint.with_name("last.ckpt")
    link.symlink_to(checkpoint.name)
    model = load(checkpoint)
    set_mode(model, "cpcp")
    write_mode(link, model)
    assert link.is_symlink()
    assert load(checkpoint).lstm.mode == "cpcp"
