"""Data modules over texts: what their batches hold, and that they are seeded; options of all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_bln.data import (
    DataError,
    IMDBData,
    LanguageData,
    MNISTData,
    TextData,
    WordVocabulary,
)


def write_jsonl(path: Path, count: int) -> Path:
    rows = [{"text": "word " * (1 + number % 7) + str(number), "label": number % 3} for number in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_text_batches(tmp_path: Path, num_workers: int) -> None:
    data = TextData(
        write_jsonl(tmp_path / "train.jsonl", 40),
        write_jsonl(tmp_path / "test.jsonl", 9),
        batch_size=8,
        validation=0.25,
        num_workers=num_workers,
    )
    data.setup()
    assert data.classes == ("0", "1", "2")
    batches = list(data.train_dataloader())
    assert sum(len(labels) for *_, labels in batches) == 30
    assert sum(len(labels) for *_, labels in data.val_dataloader()) == 10
    assert sum(len(labels) for *_, labels in data.test_dataloader()) == 9
    for tokens, lengths, labels in batches:
        assert tokens.shape == (len(labels), int(lengths.max()))
        assert (tokens != data.padding).sum(1).tolist() == lengths.tolist()


def test_text_is_seeded(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", 40)

    def first(seed: int) -> list[list[int]]:
        data = TextData(path, batch_size=8, seed=seed)
        data.setup()
        return next(iter(data.train_dataloader()))[2].tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_foreign_vocabulary_and_tokenizer_go_straight_in(tmp_path: Path) -> None:
    data = TextData(
        write_jsonl(tmp_path / "train.jsonl", 12), tokenizer=str.split, vocabulary=WordVocabulary(["?", "word"], 0)
    )
    data.setup()
    tokens, *_ = next(iter(data.train_dataloader()))
    assert set(tokens.flatten().tolist()) <= {0, 1}


def test_no_test_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    data = TextData(write_jsonl(tmp_path / "train.jsonl", 12))
    data.setup()
    with pytest.raises(DataError, match="no test data; call setup"):
        data.test_dataloader()


def test_imdb_fixed_length_and_shuffled_test_set(small_imdb: Path) -> None:
    data = IMDBData(small_imdb, tokenizer="keras", fixed_length=4, validation=4, batch_size=8)
    data.prepare_data()
    data.setup()
    tokens, labels = next(iter(data.test_dataloader()))
    assert tokens.shape == (8, 4)
    assert labels.tolist() != sorted(labels.tolist())
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 8


def test_vocabulary_comes_from_the_training_part_alone(tmp_path: Path) -> None:
    data = TextData(write_jsonl(tmp_path / "train.jsonl", 40), validation=0.5)
    data.setup()
    assert data.vocabulary is not None
    assert len(data.vocabulary) == 2 + 1 + 20  # the specials, "word", and one number a training text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_language_batches_carry_on(tmp_path: Path, num_workers: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 20)
    data = LanguageData(path, validation=path, level="character", batch_size=4, window=7, num_workers=num_workers)
    data.setup()
    inputs = torch.cat([inputs for inputs, _ in data.train_dataloader()], 1)
    targets = torch.cat([targets for _, targets in data.val_dataloader()], 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.vocabulary is not None
    assert len(data.vocabulary) == 11


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MNISTData(sequence="columns"), "sequence='columns'"),  # type: ignore[arg-type]
        (lambda: MNISTData(batch_size=0), "batch_size=0"),
        (lambda: LanguageData(level="byte"), "level='byte'"),  # type: ignore[arg-type]
        (lambda: LanguageData(window=0), "window=0"),
    ],
)
def test_options_are_checked(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
