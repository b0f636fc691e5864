"""Price and gain of folding: accuracy with the options that let an LSTM fold, and time of folded models.

    python -m benchmarks.folding --data-dir DATA --runs FOLDER

Each training writes one file to the folder of runs and is skipped if that exists. Times are processor time of inference
by one thread, without gradients, relative to torch's own layer or to what torch.fx fuses: medians over rounds in which
the contenders take turns, three runs one after the other. Another one of the first shows by how much equal ones differ.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from benchmarks.contenders import infer
from benchmarks.fold_options import RATE, SEEDS, TUNING_RATE, UNITS, table, train_missing
from benchmarks.measure import Job, machine, processor_time, ratios
from benchmarks.resnet import residual_network
from lightning_bln import BLNLSTM, fold, recompute_population, set_mode
from lightning_bln._files import replacing
from lightning_bln.cells import BLNLSTMCell
from lightning_bln.data import read_cifar10

RESULTS = Path(__file__).parent / "results" / "folding.json"
INPUTS, HIDDEN = 64, 128
BATCHES, STEPS = (1, 64), (1, 10, 100)
MODES = ("pppp", "ppcc")
RUNS = 3
FOLDED, AGAIN = "folded", "another one"
Times = dict[str, dict[str, list[float]]]
"""For each case and contender the ratios of all runs, beside microseconds of the first contender."""

GOALS = {"LSTM": 1.02, "one step": 1.02, "CNN": 1.0}
"""The most that the folded model's ratio to the first contender may be, for each table."""


def in_mode(layer: Any, mode: str) -> Any:
    """A copy in a statistics mode."""
    made = copy.deepcopy(layer)
    set_mode(made, mode)
    return made


def contenders(layer: Any, plain: Any, x: Tensor) -> dict[str, Job]:
    """Torch's layer, another one, the folded one and those to fold; samples are on the last axis but one."""
    recompute_population(layer, [torch.randn(*x.shape[:-2], 64, INPUTS) for _ in range(2)])
    layers = {plain.__name__: plain(INPUTS, HIDDEN), AGAIN: plain(INPUTS, HIDDEN), FOLDED: fold(in_mode(layer, "pppp"))}
    assert type(layers[FOLDED]) is plain
    layers |= {f"BLN {mode}": in_mode(layer, mode) for mode in MODES}
    return {name: infer(one.eval(), x) for name, one in layers.items()}


def lstms() -> dict[str, dict[str, Job]]:
    """Contenders of whole sequences, by sizes."""
    found = {}
    for batch in BATCHES:
        for steps in STEPS:
            layer = BLNLSTM(INPUTS, HIDDEN, time_statistics="shared", norm_cell=False)
            found[f"batch {batch}, T={steps}"] = contenders(layer, nn.LSTM, torch.randn(steps, batch, INPUTS))
    return found


def cells() -> dict[str, dict[str, Job]]:
    """Contenders of single steps, by batch size."""
    found = {}
    for batch in BATCHES:
        layer = BLNLSTMCell(INPUTS, HIDDEN, time_statistics="shared", norm_cell=False)
        found[f"batch {batch}"] = contenders(layer, nn.LSTMCell, torch.randn(batch, INPUTS))
    return found


def cnns(folder: Path | None) -> dict[str, dict[str, Job]]:
    """Contenders of a ResNet with BatchNorm, by batch size."""
    images = (read_cifar10(folder)[0].pixels[:256].float() / 255 - 0.473) / 0.251
    model = residual_network(nn.BatchNorm2d).eval()
    recompute_population(model, images.split(64))
    models = {"fused by torch.fx": fuse(copy.deepcopy(model)), AGAIN: fuse(copy.deepcopy(model)), FOLDED: fold(model)}
    models |= {"with BatchNorm": model}
    return {f"batch {n}": {name: infer(one.eval(), images[:n]) for name, one in models.items()} for n in BATCHES}


def timed(cases: dict[str, dict[str, Job]], rounds: int, found: Times) -> None:
    """Add one run of each case."""
    for case, jobs in cases.items():
        took, relative = ratios(jobs, rounds, processor_time)
        row = found.setdefault(case, {name: [] for name in jobs})
        for name, value in relative.items():
            row[name].append(took if name == next(iter(jobs)) else value)


def speed_table(group: str, times: Times) -> list[str]:
    """A table of ratios, and whether the goal is reached."""
    first, *names = next(iter(times.values()))
    lines = [f"| {group} | {first}, µs | {' | '.join(names)} |", f"|{'---|' * (len(names) + 2)}"]
    for case, row in times.items():
        cells = [", ".join(f"{value:.3f}" for value in row[name]) for name in names]
        lines.append(f"| {case} | {statistics.median(row[first]):.1f} | {' | '.join(cells)} |")
    worst = {name: max(value for row in times.values() for value in row[name]) for name in (FOLDED, AGAIN)}
    verdict = "reached" if worst[FOLDED] <= GOALS[group] else "missed"
    goal = f"Folded, goal {GOALS[group]:.2f} in every run: {verdict}, worst {worst[FOLDED]:.3f}"
    return [*lines, "", f"{goal}; worst of two equal ones {worst[AGAIN]:.3f}.", ""]


def render(results: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# Price and gain of folding", ""]
    if "accuracy" in results:
        lines += [
            f"Test accuracy in per cent, mean of {SEEDS} seeds and half the range: an LSTM of {UNITS} units that reads "
            "images by rows, by `time_statistics` and `norm_cell`, in `pppp` and in modes chosen by validation loss. "
            f"Last: the folded network after one more epoch at learning rate {TUNING_RATE} (training had {RATE}).",
            "",
            *table(results["accuracy"]),
        ]
    if "speed" in results:
        lines += [
            f"Processor time of one call as ratios to the first contender: medians of {results['rounds']} rounds, in "
            f"each of {RUNS} runs. {INPUTS} inputs and {HIDDEN} units, shared, norm_cell=False; CNN: a ResNet of six "
            "blocks on images of CIFAR-10.",
            "",
            results["machine"],
            "",
        ]
        for group, times in results["speed"].items():
            lines += speed_table(group, times)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST and CIFAR-10; BLN_DATA_DIR by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/folding"), help="folder for a file of each training")
    parser.add_argument("--rounds", type=int, default=101, help="turns of each contender")
    parser.add_argument("--only", choices=["accuracy", "speed", "report"], help="keep what there is of the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if options.only and RESULTS.exists() else {}
    if options.only in (None, "accuracy"):
        results["accuracy"] = train_missing(options.runs, options.data_dir)
    if options.only in (None, "speed"):
        results |= {"machine": f"{datetime.datetime.now():%Y-%m-%d %H:%M}; {machine()}", "rounds": options.rounds}
        results["speed"] = {group: {} for group in GOALS}
        torch.manual_seed(0)
        groups = dict(zip(GOALS, (lstms(), cells(), cnns(options.data_dir)), strict=True))
        for number in range(RUNS):
            for group, cases in groups.items():
                timed(cases, options.rounds, results["speed"][group])
            print(f"run {number + 1} of {RUNS}", flush=True)
    with replacing(RESULTS) as file:
        file.write(json.dumps(results, indent=1).encode())
    RESULTS.with_suffix(".md").write_text(render(results))
    print(render(results))


if __name__ == "__main__":
    main()
