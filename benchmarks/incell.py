"""In-cell BLN against LayerNorm, BatchNorm and no norm in an LSTM: equal budgets, every norm's start scale swept.

    python benchmarks/incell.py rows permuted ptb imdb --data-dir DATA --output RESULTS

Each training run (task, norm, scale, seed) writes one file to the output folder and is skipped if that exists, so the
command can be stopped at any time. ``--table`` prints the results so far. Statistics are recomputed at the end over
training batches, and scores are of mode ``ppcc``, in which a prediction depends on no other sample of the batch. A
norm's scale is chosen by validation loss in that mode; ``cccc``, which uses the test batch's statistics, is shown
beside it. Permuted MNIST is read in 112 steps of seven pixels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln import recompute_population, set_mode
from lightning_bln._files import replacing
from lightning_bln.data import IMDBData, LanguageData, MNISTData
from lightning_bln.models import LanguageModel, RecurrentNetwork

NORMS = ("bln", "layer", "batch", "none")
SCALES = (0.1, 0.3, 0.5, 1.0)
PIXELS = 7
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """Size of the network and of its training, the same for every norm."""

    epochs: int
    batches: int
    batch_size: int
    hidden_size: int
    learning_rate: float
    score: str


TASKS = {
    "rows": Task(2, 156, 128, 100, 2e-3, "accuracy"),
    "permuted": Task(2, 156, 128, 100, 2e-3, "accuracy"),
    "ptb": Task(1, 1_000, 20, 200, 2e-3, "bits a character"),
    "imdb": Task(2, 160, 32, 64, 2e-3, "accuracy"),
}


class Data:
    """A task's batches, loaded once into memory and the same for every training run."""

    def __init__(self, name: str, directory: Path | None, batch_size: int | None = None) -> None:
        size = batch_size or TASKS[name].batch_size
        module: Any
        if name in ("rows", "permuted"):
            permutation = 0 if name == "permuted" else None
            steps = "rows" if name == "rows" else "pixels"
            module = MNISTData(directory, sequence=steps, permutation=permutation, batch_size=size)
        elif name == "ptb":
            module = LanguageData("ptb", directory, level="character", batch_size=size, window=50)
        else:
            module = IMDBData(directory, batch_size=size, max_length=100, max_tokens=10_000)
        module.setup()
        self.module = module
        self.tokens = len(module.vocabulary) if name in ("ptb", "imdb") else 0

    def train(self, task: Task, seed: int) -> Iterator[Batch]:
        self.module.seed = seed
        for _, batch in zip(range(task.batches), self.module.train_dataloader(), strict=False):
            yield batch

    def held_out(self, part: str, limit: int) -> Iterator[Batch]:
        loader = self.module.val_dataloader() if part == "validation" else self.module.test_dataloader()
        for _, batch in zip(range(limit), loader, strict=False):
            yield batch


def build(name: str, task: Task, data: Data, norm: str | None, scale: float | None) -> nn.Module:
    """Return the task's network: one LSTM, normalised inside."""
    if name == "ptb":
        return LanguageModel(data.tokens, task.hidden_size, 50, norm=norm, scale=scale)
    if name == "imdb":
        return RecurrentNetwork(data.tokens, 2, task.hidden_size, embedding=64, norm=norm, scale=scale)
    return RecurrentNetwork(28 if name == "rows" else PIXELS, 10, task.hidden_size, norm=norm, scale=scale)


def run(name: str, data: Data, norm: str, scale: float, seed: int) -> dict[str, Any]:
    """Train and score one network."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = build(name, task, data, None if norm == "none" else norm, None if norm == "none" else scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    started = time.perf_counter()
    for epoch in range(task.epochs):
        model.train()
        state: Any = None
        for batch in data.train(task, 1_000 * seed + epoch):
            loss, state = losses(model, batch, state)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    seconds = time.perf_counter() - started
    if norm != "none":
        recompute_population(model, data.train(task, seed), predict=lambda batch: losses(model, batch, None), limit=20)
    scores = {}
    for mode in ("cccc", "ppcc"):
        if norm != "none":
            set_mode(model, mode)
        suffix = "" if mode == "ppcc" else f" {mode}"
        scores |= {f"{part}{suffix}": score(model, data.held_out(part, 200)) for part in ("validation", "test")}
    return {"task": name, "norm": norm, "scale": scale, "seed": seed, "seconds": seconds, **asdict(task), **scores}


def losses(model: nn.Module, batch: Batch, state: Any) -> tuple[Tensor, Any]:
    """Return a batch's loss and the state after it."""
    *inputs, labels = batch
    if isinstance(model, LanguageModel):
        logits, state = model(inputs[0], state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), tuple(s.detach() for s in state)
    return nn.functional.cross_entropy(classify(model, inputs), labels), None


def classify(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """Return logits; of single pixels, several make a step."""
    if inputs[0].ndim == 3 and inputs[0].shape[2] == 1:
        inputs = [inputs[0].view(len(inputs[0]), -1, PIXELS)]
    return model(*inputs)


@torch.no_grad()
def score(model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the mean loss, and accuracy or bits a character."""
    model.eval()
    total = right = count = 0.0
    state: Any = None
    for batch in batches:
        *inputs, labels = batch
        if isinstance(model, LanguageModel):
            logits, state = model(inputs[0], state)
            logits, labels = logits.flatten(0, 1), labels.flatten()
        else:
            logits = classify(model, inputs)
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        right += float((logits.argmax(-1) == labels).sum())
        count += len(labels)
    return {"loss": total / count, "accuracy": right / count, "bits a character": total / count / 0.6931471805599453}


def table(folder: Path) -> str:
    """Return a Markdown table of the training runs in a folder, a row for each task, norm and scale."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    lines = [
        "| task | norm | scale | runs | validation, `ppcc` | test, `ppcc` | test, `cccc` | lowest loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    parts = ("validation", "test", "test cccc")
    for name, norm in product(TASKS, NORMS):
        groups: dict[float, list[dict[str, Any]]] = {}
        for result in results:
            if (result["task"], result["norm"]) == (name, norm):
                groups.setdefault(result["scale"], []).append(result)
        if not groups:
            continue
        best = min(groups, key=lambda scale: mean(run["validation"]["loss"] for run in groups[scale]))
        for scale, runs in sorted(groups.items()):
            cells = [spread([run[part][TASKS[name].score] for run in runs]) for part in parts]
            mark = "x" if scale == best else ""
            shown = "-" if norm == "none" else f"{scale:g}"
            lines.append(f"| {name} | {norm} | {shown} | {len(runs)} | {' | '.join(cells)} | {mark} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int = 4) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def parser_of(description: str | None, tasks: Collection[str], seeds: int, output: str) -> argparse.ArgumentParser:
    """Arguments of a benchmark whose results are kept by task and seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"which of {', '.join(tasks)}; all by default")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def parsed(parser: argparse.ArgumentParser, tasks: Collection[str]) -> argparse.Namespace:
    """The arguments, with tasks that there are and a folder for results."""
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tasks if name not in tasks]:
        parser.error(f"no task {unknown[0]!r}; use {', '.join(tasks)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def main() -> None:
    parser = parser_of(__doc__, TASKS, 3, "incell")
    parser.add_argument("--norms", nargs="*", default=NORMS, help="which norms to train, all by default")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    arguments = parsed(parser, TASKS)
    for name in [] if arguments.table else arguments.tasks or list(TASKS):
        data: Data | None = None
        for seed, norm, scale in product(range(arguments.seeds), NORMS, SCALES):
            if norm not in arguments.norms or (norm == "none" and scale != SCALES[-1]):
                continue
            path = arguments.output / f"{name}-{norm}-{scale:g}-{seed}.json"
            if path.exists():
                continue
            data = data or Data(name, arguments.data_dir)
            result = run(name, data, norm, scale, seed)
            with replacing(path) as file:
                file.write(json.dumps(result).encode())
            print(f"{path.stem}: {result['validation']} in {result['seconds']:.0f} s", flush=True)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
