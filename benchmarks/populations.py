"""Populations of 1,024 samples gathered together and batch by batch: test accuracy of models trained alike.

    python benchmarks/populations.py --data-dir DATA --output RESULTS --seeds 5

Each model is trained once on batches of 32; its population is then computed from the first 1,024 training samples in
four ways: in batches of 32, together, together with the joint batch's size in the equation while gathering, and by the
other estimator. Results are kept by task, layer, norm and seed, so the command can be stopped at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.incell import PIXELS, Data, classify, parsed, parser_of, spread
from lightning_bln import Normalization, Recurrent, recompute_population, set_mode
from lightning_bln._files import replacing
from lightning_bln._scoped import setting
from lightning_bln.models import RecurrentNetwork

BATCH = 32
SAMPLES = 1024
BATCHES_BEFORE = 50
"""Batches that a recomputation took before samples went together, to compare its time."""

Batch = tuple[Tensor, ...]


class Task(NamedTuple):
    """Training of some models on some data, and the models: a cell or ``"cnn"``, with options."""

    data: str
    batches: int
    epochs: int
    models: tuple[tuple[str, dict[str, Any]], ...]


BATCH_NORM = {"norm": "batch"}
GATED: tuple[tuple[str, dict[str, Any]], ...] = (("lstm", {}), ("gru", {}))
IN_ROWS = (*GATED, ("rnn", {}), ("lstm", {"num_layers": 2}), ("lstm", {"bidirectional": True}), ("lstm", BATCH_NORM))
TASKS = {
    "rows": Task("rows", 250, 4, IN_ROWS),
    "rows, other cells": Task(
        "rows", 125, 3, tuple((one, {}) for one in ("peepholelstm", "janet", "mgu", "lem", "ligru"))
    ),
    "permuted": Task("permuted", 250, 4, GATED),
    "ptb": Task("ptb", 250, 2, GATED),
    "imdb": Task("imdb", 188, 3, GATED),
    "images": Task("rows", 250, 4, (("cnn", {}), ("cnn", BATCH_NORM))),
}


class Characters(nn.Module):
    """The next character at each step."""

    def __init__(self, tokens: int, cell: str, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 32)
        self.layer = Recurrent(cell, 32, 96, batch_first=True, **options)
        self.out = nn.Linear(96, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(self.embedding(ids))[0]).transpose(1, 2)


def images(norm: str = "bln", population: str = "pooled") -> nn.Module:
    """Two convolutions with norms over positions, without a recurrence."""
    norms = [
        Normalization(size, norm=norm, channel_dim=1, positions="shared", scale=False, population=population)
        for size in (16, 32)
    ]
    first, second = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
    layers = nn.Unflatten(1, (1, -1)), first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10))


def build(task: str, cell: str, tokens: int, **options: Any) -> nn.Module:
    """A model of one row of the table."""
    if cell == "cnn":
        return images(**options)
    if task == "ptb":
        return Characters(tokens, cell, **options)
    if task == "imdb":
        return RecurrentNetwork(tokens, 2, 48, embedding=32, cell=cell, **options)
    hidden = 32 if task == "rows, other cells" else 64
    return RecurrentNetwork(PIXELS if task == "permuted" else 28, 10, hidden, cell=cell, **options)


def train(model: nn.Module, data: Data, task: Task, seed: int) -> None:
    """Train a model."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for epoch in range(task.epochs):
        for batch in first(data.module, task.batches, 1_000 * seed + epoch):
            loss = F.cross_entropy(classify(model, batch[:-1]), batch[-1])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def first(module: Any, batches: int, seed: int) -> Iterator[Batch]:
    """The first training batches in the order of a seed."""
    module.seed = seed
    return islice(module.train_dataloader(), batches)


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """Accuracy in per cent."""
    model.eval()
    right = [(classify(model, batch[:-1]).argmax(1) == batch[-1]).flatten() for batch in batches]
    return round(100 * float(torch.cat(right).float().mean()), 2)


@contextmanager
def mixing_by_joint_size() -> Iterator[None]:
    """Within the context the equation has the joint batch's own size while statistics are gathered."""
    own = Normalization._mixing_in_training

    def mixing(layer: Normalization, batch_size: Any) -> Any:
        with setting([layer.population], stands_for=1):
            return own(layer, batch_size)

    Normalization._mixing_in_training = mixing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Normalization._mixing_in_training = own  # type: ignore[method-assign]


def scores(model: nn.Module, population: list[Batch], held_out: list[Batch]) -> dict[str, Any]:
    """Accuracies by the ways to compute a population, and the seconds that each takes."""
    found: dict[str, Any] = {}
    ways = {
        "apart": (None, nullcontext),
        "together": (SAMPLES, nullcontext),
        "its size": (SAMPLES, mixing_by_joint_size),
    }
    for way, (samples, context) in ways.items():
        started = time.perf_counter()
        with context():
            recompute_population(model, population, samples=samples, predict=lambda batch: classify(model, batch[:-1]))
        found[f"{way} seconds"] = time.perf_counter() - started
        for mode in ("ppcc", "pppp"):
            set_mode(model, mode)
            found[f"{way} {mode}"] = accuracy(model, held_out)
    set_mode(model, "cccc")
    small = [tuple(part) for batch in held_out for part in zip(*(one.split(BATCH) for one in batch), strict=True)]
    return {**found, "cccc": accuracy(model, small)}


def run(name: str, cell: str, options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a model, and score it by the ways to compute its population, with both estimators."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = build(name, cell, data.tokens, **options)
    train(model, data, task, seed)
    weights = {key: value for key, value in model.state_dict().items() if "population" not in key}
    batches = [*first(data.module, SAMPLES // BATCH, 0)]
    held_out = [*islice(data.module.test_dataloader(), 160)]
    result: dict[str, Any] = {"task": name, "cell": cell, **options, "seed": seed}
    for estimator in ("pooled", "paper"):
        other = build(name, cell, data.tokens, **options, population=estimator)
        other.load_state_dict(weights, strict=False)
        result[estimator] = scores(other, batches, held_out)
    return result


def table(folder: Path, estimator: str) -> str:
    """A Markdown table of the results in a folder."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        groups.setdefault(path.stem.rsplit("-", 1)[0], []).append(json.loads(path.read_text()))
    lines = [
        "| model | runs | apart | together | gain | together, `pppp` | its size | `cccc` | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, results in groups.items():
        runs = [result[estimator] for result in results]
        columns = [[one[key] for one in runs] for key in ("apart ppcc", "together ppcc")]
        columns.append([one["together ppcc"] - one["apart ppcc"] for one in runs])
        columns += [[one[key] for one in runs] for key in ("together pppp", "its size ppcc", "cccc")]
        before = BATCH * BATCHES_BEFORE / SAMPLES
        times = median(one["together seconds"] / (one["apart seconds"] * before) for one in runs)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(spread(one, 1) for one in columns)} | {times:.2f} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parsed(parser_of(__doc__, TASKS, 5, "populations"), TASKS)
    for name in arguments.tasks or list(TASKS):
        data = Data(TASKS[name].data, arguments.data_dir, BATCH)
        for seed, (cell, options) in product(range(arguments.seeds), TASKS[name].models):
            label = " ".join([name, cell, *(f"{key}={value}" for key, value in options.items())])
            path = arguments.output / f"{label}-{seed}.json"
            if path.exists():
                continue
            with replacing(path) as file:
                file.write(json.dumps(run(name, cell, options, seed, data)).encode())
            print(path.stem, flush=True)
    for estimator in ("pooled", "paper"):
        print(f"\n{estimator}\n\n{table(arguments.output, estimator)}")


if __name__ == "__main__":
    main()
