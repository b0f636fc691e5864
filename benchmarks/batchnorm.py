"""Accuracy of a ResNet with BatchNorm by running averages, by recomputed statistics and in the mode chosen.

    python -m benchmarks.batchnorm --data-dir DATA --runs FOLDER --batches 4 16 128

The network is trained on CIFAR-10 for each batch size and seed, and evaluated after each epoch as it is, as the average
of its weights over epochs (SWA) and as the moving average over steps (EMA).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measure import machine
from benchmarks.resnet import residual_network
from lightning_bln import recompute_population, set_mode, sweep_modes, to_bln
from lightning_bln._files import replacing
from lightning_bln.data import read_cifar10
from lightning_bln.data.images import Images

RESULTS = Path(__file__).parent / "results" / "batchnorm.json"
EPOCHS, TRAINED, VALIDATED, TESTED = 5, 8_000, 1_000, 2_000
SIZES = (16, 16, 32, 64)
"""Channels of the network: three blocks."""
SAMPLES = 1_024
COUNTS = (32, 64, 128, 256, 512, 1_024, 4_096)
"""Samples to recompute the statistics over, after the second epoch."""
EVALUATION_BATCH = 100
TITLE = "# Accuracy of a ResNet with BatchNorm by its statistics: means and half the range over seeds"
WAYS = ("running averages", "recomputed", "chosen mode")
WEIGHTS = ("as trained", "SWA", "EMA")


def inputs_of(images: Images) -> Tensor:
    """The network's input."""
    return ((images.pixels.float() / 255 - 0.473) / 0.251).contiguous(memory_format=torch.channels_last)


class Data:
    """Images to train on, to validate on and to test on, each with labels."""

    def __init__(self, folder: Path) -> None:
        train, test = read_cifar10(folder)
        x = inputs_of(train)
        self.train = x[:TRAINED], train.labels[:TRAINED]
        self.validation = x[-VALIDATED:], train.labels[-VALIDATED:]
        self.test = inputs_of(test)[:TESTED], test.labels[:TESTED]

    def batches(self, part: tuple[Tensor, Tensor], size: int = EVALUATION_BATCH) -> Iterable[tuple[Tensor, Tensor]]:
        """The samples of a part in their order."""
        return zip(*(one.split(size) for one in part), strict=True)


@torch.no_grad()
def accuracy_of(model: nn.Module, data: Data, part: tuple[Tensor, Tensor]) -> float:
    """Accuracy in per cent."""
    model.eval()
    return 100 * mean(float((model(x).argmax(1) == y).float().mean()) for x, y in data.batches(part))


def accuracies(model: nn.Module, data: Data) -> list[float]:
    """Accuracy in per cent on validation and test images."""
    return [accuracy_of(model, data, part) for part in (data.validation, data.test)]


def recomputed(model: nn.Module, data: Data, batch: int, samples: int = SAMPLES) -> nn.Module:
    """A copy of a network with statistics of the first training images."""
    made = copy.deepcopy(model)
    recompute_population(made, data.train[0][: max(samples, batch)].split(batch), samples=samples)
    return made


def in_best_mode(model: nn.Module, data: Data) -> tuple[nn.Module, str, float]:
    """A copy in the statistics mode with the best validation accuracy, that mode, and the accuracy in per cent."""
    made = to_bln(copy.deepcopy(model), norm="keep")

    def predict(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return made(batch[0]), batch[1]

    def accuracy(logits: Tensor, y: Tensor) -> Tensor:
        return (logits.argmax(1) == y).float().mean()

    found = sweep_modes(made, data.batches(data.validation), predict, {"acc": accuracy}, direction="max")
    set_mode(made, found.best())
    return made, str(found.best()), 100 * found.scores[found.best()]["acc"]


def evaluated(model: nn.Module, data: Data, batch: int) -> dict[str, Any]:
    """Accuracies by running averages, recomputed statistics and in the mode chosen."""
    anew = recomputed(model, data, batch)
    chosen, mode, validated = in_best_mode(anew, data)
    found: dict[str, Any] = {way: accuracies(one, data) for way, one in zip(WAYS, (model, anew), strict=False)}
    by_population = mode.startswith("pp")  # the same as before the mode was chosen
    tested = found[WAYS[1]][1] if by_population else accuracy_of(chosen, data, data.test)
    return {**found, WAYS[2]: [validated, tested], "mode": mode}


def trained(data: Data, batch: int, seed: int) -> dict[str, Any]:
    """Accuracies after each epoch of a training."""
    torch.manual_seed(seed)
    model = residual_network(nn.BatchNorm2d, SIZES).to(memory_format=torch.channels_last)
    generator, per_epoch = torch.Generator().manual_seed(seed), math.ceil(TRAINED / batch)
    swa = AveragedModel(model, use_buffers=False)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - 3 / per_epoch), use_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * batch / 128, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * per_epoch)
    found: dict[str, Any] = {"batch": batch, "seed": seed, "epochs": [], "counts": {}}
    for epoch in range(EPOCHS):
        model.train()
        for index in torch.randperm(TRAINED, generator=generator).split(batch):
            x, y = (one[index] for one in data.train)
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
        swa.update_parameters(model)
        models = dict(zip(WEIGHTS, (model, swa.module, ema.module), strict=True))
        found["epochs"].append({name: evaluated(one, data, batch) for name, one in models.items()})
        if epoch == 1:
            found["counts"] = {n: accuracy_of(recomputed(model, data, batch, n), data, data.test) for n in COUNTS}
        print(batch, seed, epoch + 1, json.dumps(found["epochs"][-1]), flush=True)
    return found


PARTS = ("validation", "test")


def report(runs: list[dict[str, Any]], part: int | None = None) -> str:
    """Tables of mean accuracies over seeds: on one part with half the range over seeds, or on both parts."""
    lines: list[str] = []
    for batch in sorted({run["batch"] for run in runs}):
        own = [run for run in runs if run["batch"] == batch]
        what = " / ".join(PARTS) if part is None else PARTS[part]
        lines += ["", f"Batches of {batch}, {len(own)} seeds, {what} accuracy in per cent after each epoch:", ""]
        lines += [f"| weights | statistics | {' | '.join(str(epoch + 1) for epoch in range(EPOCHS))} |"]
        lines += [f"|{'---|' * (EPOCHS + 2)}"]
        for weights in WEIGHTS:
            for way in WAYS:
                found = [[run["epochs"][epoch][weights][way] for run in own] for epoch in range(EPOCHS)]
                lines += [f"| {weights} | {way} | {' | '.join(cell(values, part) for values in found)} |"]
        modes = sorted({run["epochs"][epoch]["as trained"]["mode"] for run in own for epoch in range(EPOCHS)})
        lines += ["", f"Modes chosen for the weights as trained: {', '.join(modes)}."]
    return "\n".join([*lines, "", *by_samples(runs)])


def by_samples(runs: list[dict[str, Any]]) -> list[str]:
    """A table of mean test accuracies over seeds by the samples that statistics were computed over."""
    lines = ["Test accuracy after the second epoch, by the samples recomputed over:", ""]
    lines += [f"| batch | {' | '.join(map(str, COUNTS))} |", f"|{'---|' * (len(COUNTS) + 1)}"]
    for batch in sorted({run["batch"] for run in runs}):
        own = [run for run in runs if run["batch"] == batch]
        cells = [cell([[run["counts"][str(n)]] for run in own], 0) if n >= batch else "" for n in COUNTS]
        lines += [f"| {batch} | {' | '.join(cells)} |"]
    return lines


def cell(values: list[list[float]], part: int | None) -> str:
    """The mean of one part's values and half their range, or the means of both parts."""
    if part is None:
        return " / ".join(f"{mean(one):.1f}" for one in zip(*values, strict=True))
    own = [one[part] for one in values]
    return f"{mean(own):.1f} ± {(max(own) - min(own)) / 2:.1f}"


def main() -> None:
    """Train what is missing, or report what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder of the data set's binary files")
    parser.add_argument("--runs", type=Path, help="folder for a file of each run, none of which is run again")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="collect the runs, and print tables")
    options = parser.parse_args()
    if options.report:
        if options.runs is not None:
            runs = [json.loads(path.read_text()) for path in sorted(options.runs.glob("*.json"))]
            RESULTS.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")
        runs = json.loads(RESULTS.read_text())["runs"]
        RESULTS.with_suffix(".md").write_text("\n".join([TITLE, *(report(runs, part) for part in (0, 1))]) + "\n")
        print(report(runs))
        return
    torch.set_num_threads(1)
    data = Data(options.data_dir)
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for batch in options.batches:
            path = options.runs / f"{batch}-{seed}.json"
            if not path.exists():
                found = trained(data, batch, seed)
                with replacing(path) as file:
                    file.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
