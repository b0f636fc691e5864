"""Splits of the experiments, and their data as Keras reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_bln.data import LabelledTexts, read_imdb
from lightning_bln.reproduce import experiments
from lightning_bln.reproduce.experiments import Samples

from .small import FRACTION, SMALL


def test_splits_are_seeded_and_disjoint() -> None:
    pool, test = SMALL.read(None, False)
    numbered = Samples(torch.arange(100), pool.labels)
    train, valid, _ = SMALL.split(numbered, test, FRACTION, seed=1)
    assert (len(train.labels), len(valid.labels)) == (80, 20)
    assert not set(train.inputs.tolist()) & set(valid.inputs.tolist())
    again, other = (SMALL.split(numbered, test, FRACTION, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(train.inputs, again.inputs)
    assert not torch.equal(train.inputs, other.inputs)
    with pytest.raises(ValueError, match=r"fraction=0\.02 asks for 500 .* the files hold 100"):
        SMALL.split(numbered, test, 0.02, seed=1)


def test_reviews_as_keras_gives_them(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(directory: Path | None, fetch: bool) -> list[LabelledTexts]:
        return [LabelledTexts(split.texts[::50], split.labels[::50], split.classes) for split in read_imdb(directory)]

    monkeypatch.setattr(experiments, "read_imdb", few)
    train, test = experiments.read_imdb_samples(shared / "data")
    assert train.inputs.shape == test.inputs.shape == (500, 80)
    assert int(train.inputs.max()) < 20_000
    assert not (train.inputs == 3).any()
    words = train.inputs[train.inputs > 3]
    assert words.bincount()[4:].argmax() == 0  # "the" is the most frequent word, with the first id after the specials
