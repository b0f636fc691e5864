"""The two experiments: their data and their networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_bln.data.batching import pad_to_length, seeded_split
from lightning_bln.data.image_modules import standardise
from lightning_bln.data.images import read_cifar10
from lightning_bln.data.reviews import read_imdb
from lightning_bln.data.text import build_vocabulary, get_tokenizer
from lightning_bln.models.paper.modules import Classifier, PaperCIFAR10, PaperIMDB

VALIDATION_POOL = 5_000
VOCABULARY, REVIEW_LENGTH = 20_000, 80
SPECIALS = ("<pad>", "<start>", "<unk>", "<unused>")
"""Ids 0 to 3 of Keras's IMDB files: padding, start of a review, any other word, and one that is never used."""


@dataclass(frozen=True)
class Samples:
    """Inputs and labels, one entry per sample."""

    inputs: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Samples:
        return Samples(self.inputs[index], self.labels[index])

    def batches(self, size: int, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Cut into batches in the given order; a smaller last one is dropped, as by the authors."""
        count = len(self.labels) // size
        count = count if limit is None else min(count, limit)
        return list(zip(self.inputs[: count * size].split(size), self.labels[: count * size].split(size), strict=True))


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: ``"imdb"`` or ``"cifar10"``.
        full_size: Training samples of the whole data set, validation samples included.
        epochs: The authors' number of epochs.
        read: Reads the training pool and the test set from a folder, and downloads them if the second argument is true.
        build: Builds the module for a norm and a population estimator.
    """

    name: str
    full_size: int
    epochs: int
    read: Callable[[Path | None, bool], tuple[Samples, Samples]]
    build: Callable[[str, str], Classifier]

    def split(self, pool: Samples, test: Samples, fraction: float, seed: int) -> tuple[Samples, Samples, Samples]:
        """Return training, validation and test samples in the order of one training run.

        Each seed draws its own training and validation samples, and its own order of all three.
        """
        train_size = round(fraction * (self.full_size - VALIDATION_POOL))
        sizes = [train_size, round(fraction * VALIDATION_POOL)]
        if sum(sizes) > len(pool.labels):
            raise ValueError(
                f"fraction={fraction} asks for {sum(sizes)} training and validation samples, the files hold "
                f"{len(pool.labels)}; use a fraction of {len(pool.labels) / self.full_size:.2g} at most"
            )
        train, valid = seeded_split(len(pool.labels), sizes, seed)
        (order,) = seeded_split(len(test.labels), [len(test.labels)], seed)
        return pool.take(train), pool.take(valid), test.take(order)


def read_imdb_samples(directory: Path | None, fetch: bool = False) -> tuple[Samples, Samples]:
    """Read the reviews as Keras's ``imdb.load_data(num_words=20000)`` and ``pad_sequences(maxlen=80)`` give them."""
    tokenize = get_tokenizer("keras")
    splits = read_imdb(directory, fetch=fetch)
    tokens = [[tokenize(text) for text in split.texts] for split in splits]
    vocabulary = build_vocabulary(tokens[0], max_tokens=VOCABULARY, specials=SPECIALS)
    start = SPECIALS.index("<start>")
    train, test = (
        Samples(
            pad_to_length([[start, *vocabulary(text)] for text in texts], REVIEW_LENGTH),
            torch.tensor(split.labels),
        )
        for texts, split in zip(tokens, splits, strict=True)
    )
    return train, test


def read_cifar10_samples(directory: Path | None, fetch: bool = False) -> tuple[Samples, Samples]:
    """Read the images, each pixel and channel standardised over the training pool, as by the authors."""
    train, test = read_cifar10(directory, fetch=fetch)
    inputs, test_inputs = standardise(train.pixels, test.pixels)
    return Samples(inputs, train.labels), Samples(test_inputs, test.labels)


EXPERIMENTS = {
    "imdb": Experiment(
        "imdb", 25_000, 10, read_imdb_samples, lambda norm, population: PaperIMDB(norm, population=population)
    ),
    "cifar10": Experiment(
        "cifar10", 50_000, 15, read_cifar10_samples, lambda norm, population: PaperCIFAR10(norm, population=population)
    ),
}
