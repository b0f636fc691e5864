"""Test accuracy of an LSTM by the options that let it fold, for each statistics mode: one file for each training.

Images are read row by row: scikit-learn's digits as in ``bln demo``, 8 steps of 8 pixels, and MNIST, 28 steps of 28.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln import BLNLSTM, fold, recompute_population, set_mode, sweep_modes
from lightning_bln._files import replacing
from lightning_bln.data import read_mnist
from lightning_bln.data.images import Images
from lightning_bln.demo import DigitRows

UNITS = 64
SEEDS = 5
RATE, TUNING_RATE = 3e-3, 1e-3
"""Adam's learning rates: of the training, and of one more epoch of the folded network."""
PLAIN = "no norm"
FOLDS = "shared, norm_cell=False"
OPTIONS: dict[str, dict[str, Any]] = {
    FOLDS: {"time_statistics": "shared", "norm_cell": False},
    "shared, norm_cell=True": {"time_statistics": "shared", "norm_cell": True},
    "separate, norm_cell=False": {"time_statistics": "separate", "norm_cell": False},
    "separate, norm_cell=True (defaults)": {},
    PLAIN: {"norm": None},
}
"""``time_statistics`` and ``norm_cell`` of a BLN-LSTM."""

Part = tuple[Tensor, Tensor]
Scores = dict[str, dict[str, float]]


class Task(NamedTuple):
    """Images read by rows, and how long a network trains on them."""

    read: Callable[[Path | None, int], dict[str, Part]]
    pixels: int
    epochs: int
    batch: int


def digits(folder: Path | None, seed: int) -> dict[str, Part]:
    """The demo's images, split by seed."""
    data = DigitRows(seed=seed)
    data.setup()
    return {name: (split.tensors[0], split.tensors[1]) for name, split in data.splits.items()}


def mnist(folder: Path | None, seed: int) -> dict[str, Part]:
    """The first 8,000 training images, the last 2,000 for validation, and the first 3,000 test images."""
    train, test = read_mnist(folder)
    return {
        "train": rows_of(Images(train.pixels[:8_000], train.labels[:8_000])),
        "val": rows_of(Images(train.pixels[-2_000:], train.labels[-2_000:])),
        "test": rows_of(Images(test.pixels[:3_000], test.labels[:3_000])),
    }


def rows_of(images: Images) -> Part:
    """Rows of pixels in [0, 1], and labels."""
    return images.pixels.flatten(1).view(-1, 28, 28).float() / 255, images.labels


TASKS = {"digits": Task(digits, 8, 8, 32), "MNIST": Task(mnist, 28, 10, 64)}


class RowNetwork(nn.Module):
    """A normalised LSTM over rows of pixels and a linear layer on its last state."""

    def __init__(self, pixels: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.lstm = BLNLSTM(pixels, UNITS, batch_first=True, **options)
        self.head = nn.Linear(UNITS, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.lstm(rows)[1][0][-1])


def batches(part: Part, size: int) -> Iterator[Part]:
    """The samples of a part in their order."""
    return zip(part[0].split(size), part[1].split(size), strict=True)


def trained(task: Task, parts: dict[str, Part], options: dict[str, Any], seed: int) -> RowNetwork:
    """A network after training, with the population of its last weights, in mode ``pppp``."""
    torch.manual_seed(seed)
    model = RowNetwork(task.pixels, options)
    train(model, parts["train"], task.epochs, task.batch, RATE)
    if model.lstm.norm is not None:
        recompute_population(model, batches(parts["train"], task.batch))
        set_mode(model, "pppp")
    return model.eval()


def train(model: nn.Module, part: Part, epochs: int, size: int, rate: float) -> None:
    """Train by Adam."""
    model.train()
    x, y = part
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(size):
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def tuned(task: Task, parts: dict[str, Part], model: RowNetwork) -> nn.Module:
    """The folded network, whose LSTM is torch's, after one more epoch."""
    plain = fold(model)
    assert isinstance(plain.lstm, nn.LSTM)
    train(plain, parts["train"], 1, task.batch, TUNING_RATE)
    return plain.eval()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of samples whose largest output is their class."""
    return (logits.argmax(1) == y).float().mean()


METRICS = {"loss": F.cross_entropy, "acc": accuracy}


def scores_of(model: RowNetwork, part: Part, size: int) -> Scores:
    """Loss and accuracy in each mode; of a network without norms in one called ``plain``."""
    if model.lstm.norm is None:
        return {"plain": score_of(model, part)}
    found = sweep_modes(model, batches(part, size), lambda batch: (model(batch[0]), batch[1]), METRICS)
    return {str(mode): dict(values) for mode, values in found.scores.items()}


@torch.no_grad()
def score_of(model: nn.Module, part: Part) -> dict[str, float]:
    """Loss and accuracy."""
    logits = model(part[0])
    return {name: float(metric(logits, part[1])) for name, metric in METRICS.items()}


def train_missing(folder: Path, data: Path | None, seeds: int = SEEDS) -> list[dict[str, Any]]:
    """Train what has no file in ``folder`` yet, and return the contents of all files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, task in TASKS.items():
        for seed in range(seeds):
            parts = task.read(data, seed)
            for number, (label, options) in enumerate(OPTIONS.items()):
                path = folder / f"{name}-{number}-{seed}.json"
                if not path.exists():
                    start = time.perf_counter()
                    model = trained(task, parts, options, seed)
                    found: dict[str, Any] = {"task": name, "options": label, "seed": seed}
                    found |= {part: scores_of(model, parts[part], task.batch) for part in ("val", "test")}
                    if label in (FOLDS, PLAIN):
                        found["tuned"] = score_of(tuned(task, parts, model), parts["test"])
                    with replacing(path) as file:
                        file.write(json.dumps(found).encode())
                    print(f"{name}, {label}, seed {seed}: {time.perf_counter() - start:.1f} s", flush=True)
                runs.append(json.loads(path.read_text()))
    return runs


def chosen(run: dict[str, Any], among: str = "") -> str:
    """The mode with the lowest validation loss, of those that start with ``among``."""
    scores: Scores = run["val"]
    return min((mode for mode in scores if mode.startswith(among)), key=lambda mode: scores[mode]["loss"])


PICKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "pppp": lambda run: "pppp",
    "chosen of pp**": lambda run: chosen(run, "pp"),
    "chosen of all": chosen,
}
"""Modes to test in, by a run."""


def spread(values: Sequence[float]) -> str:
    """The mean in per cent and half the range."""
    return f"{100 * mean(values):.1f} ± {50 * (max(values) - min(values)):.1f}"


def table(runs: Iterable[dict[str, Any]]) -> list[str]:
    """A table of test accuracies for each task."""
    runs, lines = list(runs), []
    for task in dict.fromkeys(run["task"] for run in runs):
        lines += [f"| {task} | {' | '.join(PICKS)} | modes chosen of all | folded, one more epoch |"]
        lines += [f"|{'---|' * (len(PICKS) + 3)}"]
        for options in OPTIONS:
            own = [run for run in runs if (run["task"], run["options"]) == (task, options)]
            if options == PLAIN:
                cells = [spread([run["test"]["plain"]["acc"] for run in own]), *[""] * len(PICKS)]
            else:
                cells = [spread([run["test"][pick(run)]["acc"] for run in own]) for pick in PICKS.values()]
                cells.append(", ".join(sorted({chosen(run) for run in own})))
            cells.append(spread([run["tuned"]["acc"] for run in own]) if "tuned" in own[0] else "")
            lines.append(f"| {options} | {' | '.join(cells)} |")
        lines.append("")
    return lines
