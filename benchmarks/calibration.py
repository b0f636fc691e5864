"""Accuracy on images of a new domain, by the population that normalises: own, current batch, or calibrated.

    python -m benchmarks.calibration --data-dir DATA

A small ResNet with BatchNorm is trained on CIFAR-10 for each seed, and evaluated on test images changed in eight ways.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.corruptions import CORRUPTIONS, corrupted
from benchmarks.incell import spread
from benchmarks.measure import machine
from benchmarks.resnet import residual_network
from lightning_bln import Calibration, calibrate
from lightning_bln._files import replacing
from lightning_bln._scoped import setting
from lightning_bln.calibration import SORTED
from lightning_bln.data import read_cifar10
from lightning_bln.data.images import Images
from lightning_bln.sample_order import serial_score

RESULTS = Path(__file__).parent / "results"
EPOCHS = 15
BATCH = 128
EVALUATED = 1_000
SAMPLES = (50, 200, 1_000)
POOL = 6_500
"""Test images to draw from where there must be many of each class."""
ASKED = 512
"""Samples of a calibration that is asked for warnings."""
ORDERS = 200
"""Random orders of the outputs of one."""
DOUBTED = ("none", "noise", "contrast")
"""Images of the calibrations that are asked for warnings."""


def pixels_of(images: Images) -> Tensor:
    """Images as numbers in [0, 1]."""
    return images.pixels.float() / 255


def standardised(x: Tensor) -> Tensor:
    """The network's input."""
    return ((x - 0.473) / 0.251).contiguous(memory_format=torch.channels_last)


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops with a margin of four pixels, half of them flipped."""
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    rows, columns = torch.randint(9, (2, len(x)), generator=generator)
    flips = torch.rand(len(x), generator=generator) < 0.5
    cut = [one[:, i : i + 32, j : j + 32] for one, i, j in zip(padded, rows.tolist(), columns.tolist(), strict=True)]
    return torch.stack([one.flip(2) if flip else one for one, flip in zip(cut, flips.tolist(), strict=True)])


def trained(train: Images, seed: int, path: Path) -> nn.Module:
    """The network of a seed: from its file, or trained and written there."""
    torch.manual_seed(seed)
    model = residual_network(nn.BatchNorm2d).to(memory_format=torch.channels_last)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    x, y, generator = pixels_of(train), train.labels, torch.Generator().manual_seed(seed)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(standardised(shifted(x[index], generator))), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"seed {seed}, epoch {epoch + 1}, loss {loss.item():.3f}", flush=True)
    with replacing(path) as file:
        torch.save(model.state_dict(), file)
    return model


def shuffled(seed: int, samples: int = 10_000) -> Tensor:
    """Indices in the random order of a seed."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


class Domain:
    """Test images changed in one way, or in none: some to evaluate on, and others to calibrate on."""

    def __init__(self, test: Images, name: str, seed: int) -> None:
        order, x = shuffled(seed), pixels_of(test)
        others = POOL if name in DOUBTED else max(SAMPLES)
        parts = [order[:EVALUATED], order[EVALUATED : EVALUATED + others]]
        changed = [x[part] if name == "none" else corrupted(x[part], name, seed) for part in parts]
        (self.x, self.pool), (self.y, self.labels) = map(standardised, changed), [test.labels[part] for part in parts]


@torch.no_grad()
def accuracy(model: nn.Module, domain: Domain, batch: int, *, by_batch: bool = False) -> float:
    """Accuracy in per cent by the model's statistics, or by those of each batch."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with setting(norms, training=by_batch, momentum=0.0, track_running_stats=not by_batch):
        found = torch.cat([model(x).argmax(1) for x in domain.x.split(batch)])
    return 100 * float((found == domain.y).float().mean())


def calibrated(model: nn.Module, x: Tensor, batch: int = 32) -> tuple[Calibration, bool]:
    """A calibration on images, and whether it warned that they come sorted."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        calibration = calibrate(model, x.split(batch), samples=len(x))
    return calibration, any("sorted" in str(one.message) for one in found)


def scores(model: nn.Module, domain: Domain) -> dict[str, float]:
    """Accuracies by own population, current batch and calibrations."""
    found = {"own": accuracy(model, domain, 500), "batch of 16": accuracy(model, domain, 16, by_batch=True)}
    for samples in SAMPLES:
        calibration, _ = calibrated(model, domain.pool[:samples])
        found[str(samples)] = accuracy(model, domain, 500)
        calibration.restore()
    return found


def orders(labels: Tensor, seed: int) -> dict[str, tuple[Tensor, int]]:
    """Indices of samples, and their batch size, by how they come."""
    of = [torch.nonzero(labels == label)[:, 0] for label in range(10)]
    classes = shuffled(seed, 10).tolist()
    found = {f"shuffled, batches of {size}": (shuffled(seed, len(labels))[:ASKED], size) for size in (16, 32, 64, 128)}
    per_class = ASKED // 10
    found["sorted by class"] = torch.cat([one[:per_class] for one in of]), 32
    found["one class after the other"] = torch.cat([of[label][: ASKED // 2] for label in classes[:2]]), 32
    for size in (16, 64):
        drawn = torch.randint(10, (ASKED // size,), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [of[label][shuffled(index, len(of[label]))[:size]] for index, label in enumerate(drawn)]
        found[f"batches of {size} of one class each"] = torch.cat(batches), size
    found["a single class"] = of[classes[0]][:ASKED], 32
    return found


def doubts(model: nn.Module, domain: Domain, seed: int) -> dict[str, Any]:
    """Whether a calibration warns, and the accuracy after it, by how samples come; and scores of random orders."""
    found: dict[str, Any] = {}
    for name, (index, batch) in orders(domain.labels, seed).items():
        calibration, warned = calibrated(model, domain.pool[index], batch)
        found[name] = {"warned": warned, "accuracy": accuracy(model, domain, 500)}
        if batch == 128:
            with torch.no_grad():
                rows = model(domain.pool[index])
            random = [serial_score(rows[shuffled(order, len(rows))]) for order in range(ORDERS)]
            found["random orders"] = {"alarms": sum(score > SORTED for score in random), "largest": max(random)}
        calibration.restore()
    return found


def run(train: Images, test: Images, seed: int, folder: Path) -> dict[str, Any]:
    """All scores of a seed."""
    model = trained(train, seed, folder / f"{seed}.pt")
    result: dict[str, Any] = {"seed": seed, "scores": {}, "doubts": {}}
    for name in ("none", *CORRUPTIONS):
        domain = Domain(test, name, seed)
        result["scores"][name] = scores(model, domain)
        if name in DOUBTED:
            result["doubts"][name] = doubts(model, domain, seed)
        print(f"seed {seed}, {name}: {result['scores'][name]}", flush=True)
    return result


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown tables of accuracies and warnings."""
    ways = list(results[0]["scores"]["none"])
    names = {"own": "own population", "batch of 16": "current batch of 16"}
    lines = [f"| images | {' | '.join(names.get(way, f'{way} samples') for way in ways)} |", "| --- " * 6 + "|"]
    for name in ("none", *CORRUPTIONS):
        cells = [mean(one["scores"][name][way] for one in results) for way in ways]
        lines.append(f"| {'unchanged' if name == 'none' else name} | {' | '.join(f'{one:.1f}' for one in cells)} |")
    over = {way: [mean(one["scores"][name][way] for name in CORRUPTIONS) for one in results] for way in ways}
    lines += [f"| **mean of the eight** | {' | '.join(spread(one, 1) for one in over.values())} |", ""]
    lines += ["| samples | calibrations | warned | accuracy |", "| --- " * 4 + "|"]
    every = [one["doubts"][name] for one in results for name in one["doubts"]]
    for way in every[0]:
        if way != "random orders":
            cells = [len(every), sum(one[way]["warned"] for one in every)]
            score = mean(one[way]["accuracy"] for one in every)
            lines.append(f"| {way} | {' | '.join(map(str, cells))} | {score:.1f} |")
    random = [one["random orders"] for one in every]
    alarms, largest = sum(one["alarms"] for one in random), max(one["largest"] for one in random)
    total = ORDERS * len(random)
    lines += ["", f"Random orders of the same outputs: {alarms} of {total} would warn; largest score {largest:.1f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration"), help="folder of weights and scores")
    parser.add_argument("--no-table", dest="table", action="store_false", help="only compute the scores of these seeds")
    arguments = parser.parse_args()
    train, test = read_cifar10(arguments.data_dir)
    results = []
    for seed in arguments.seeds:
        path = arguments.output / f"{seed}.json"
        if not path.exists():
            result = run(train, test, seed, arguments.output)
            with replacing(path) as file:
                file.write(json.dumps(result).encode())
        results.append(json.loads(path.read_text()))
    if not arguments.table:
        return
    text = (
        f"# Measured {datetime.datetime.now():%Y-%m-%d %H:%M}; {machine()}\n\nTest accuracy in per cent, mean of "
        f"{len(results)} seeds, of a small ResNet with BatchNorm trained on {len(train.labels)} images of CIFAR-10 for "
        f"{EPOCHS} epochs; {EVALUATED} test images, calibrated on others.\n\n{tables(results)}"
    )
    print(text)
    name = f"{datetime.date.today()}-calibration"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
