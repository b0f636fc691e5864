"""A small experiment and its training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_bln.models import PaperIMDB
from lightning_bln.reproduce.experiments import Experiment, Samples
from lightning_bln.reproduce.training import Settings, run


def small_samples(count: int) -> Samples:
    tokens = torch.randint(0, 30, (count, 5), generator=torch.Generator().manual_seed(count))
    return Samples(tokens, (tokens[:, -1] > 14).long())


SMALL = Experiment(
    "imdb",
    25_000,
    3,
    lambda directory, fetch: (small_samples(100), small_samples(60)),
    lambda norm, population: PaperIMDB(norm, vocabulary=30, embedding=6, hidden=8, population=population),
)


FRACTION = 0.004


def small_run(folder: Path, norm: str = "bln", **options: Any) -> dict[str, Any]:
    settings = Settings(norm, 0, **{"fraction": FRACTION, "batch_size": 5, "epochs": 3, **options})
    return run(SMALL, *SMALL.read(None, False), settings, folder)
