"""``python -m benchmarks``: measure, print one table, and write it to ``benchmarks/results``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import contenders
from benchmarks.measure import cuda_events, geometric_mean, machine, medians, peaks, processor_time, wall_clock
from lightning_bln import BLNLSTM
from lightning_bln._torch import CAN_COMPILE_STEPS

RESULTS = Path(__file__).parent / "results"
BARS = [
    # label, group, numerator, denominator, goal of the geometric mean, goal of the worst size
    ("BLN-LSTM train / nn.LSTM train", "lstm train", "ours bln", "torch", 0.85, 1.15),
    ("BLN-GRU train / nn.GRU train", "gru train", "ours bln", "torch", 1.0, 1.25),
    ("LayerNorm-LSTM train / nn.LSTM train", "lstm train", "ours layer", "torch", 1.0, 1.25),
    ("BLN-LSTM infer cccc / nn.LSTM infer", "lstm infer", "ours cccc", "torch", 1.1, None),
    ("BLN-LSTM infer pppp / nn.LSTM infer", "lstm infer", "ours pppp", "torch", 1.0, 1.3),
    ("the same, one step of one sequence, cccc", "lstm infer, one step", "ours cccc", "torch", 1.5, None),
    ("the same, one step of one sequence, pppp", "lstm infer, one step", "ours pppp", "torch", 1.5, None),
    (
        "BatchLayerNorm train, shared positions / BatchNorm2d",
        "images train",
        "shared",
        "BatchNorm2d",
        1.2,
        None,
    ),
    ("the same, separate positions", "images train", "separate", "BatchNorm2d", 1.5, None),
    (
        "small ResNet train, shared positions / BatchNorm2d",
        "network train",
        "shared",
        "BatchNorm2d",
        1.15,
        None,
    ),
    ("peak memory of a BLN-LSTM training step / nn.LSTM's", "lstm memory", "ours bln", "torch", 1.3, None),
]
Table = dict[str, dict[str, dict[str, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender")
    parser.add_argument("--kinds", nargs="+", default=["lstm", "gru", "rnn"], choices=contenders.KINDS)
    parser.add_argument("--sizes", type=int, nargs="+", help="which sizes, by index")
    parser.add_argument(
        "--short", action="store_true", help="against torch's layers only, not the reference and others"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="not wall time: with one thread, where others are busy too",
    )
    parser.add_argument("--gpu", action="store_true", help="on the GPU, timed by CUDA events")
    parser.add_argument("--own-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.own_process:
        what, kind, size = json.loads(args.own_process)
        print(json.dumps(OWN_PROCESS[what](kind, tuple(size))))
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu, but torch sees no CUDA device here; leave it out to measure on the CPU")
    started = f"{datetime.datetime.now():%Y-%m-%d %H:%M}; {machine()}"
    table: Table = {}
    try:
        measure_gpu(args, table) if args.gpu else measure(args, table)
    finally:
        keep(args, table, started)


def keep(args: argparse.Namespace, table: Table, started: str) -> None:
    """Print and write the table, also an incomplete one."""
    what = "processor time" if args.processor_time else "GPU time" if args.gpu else "wall time"
    text = f"# Measured {started}\n\nMedians of turns taken in one process: milliseconds of {what}, megabytes.\n\n"
    text += f"{render(table)}\n" + ("" if args.gpu else bars(table))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    kind = "gpu" if args.gpu else "cpu" if not args.processor_time else "cpu-processor-time"
    name = f"{datetime.date.today()}-{kind}-{torch.get_num_threads()}-threads"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": started, "table": table}, indent=1))


def measure(args: argparse.Namespace, table: Table) -> None:
    """Measure all groups of contenders at all sizes on the CPU."""
    sizes = [contenders.SIZES[i] for i in args.sizes or range(len(contenders.SIZES))]
    clock = processor_time if args.processor_time else wall_clock
    for shape in contenders.ARRAYS:
        note(table, "array train", shape, medians(contenders.arrays(shape), 5 * args.rounds, clock=clock))
    for size in contenders.IMAGES:
        for layout, memory_format in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
            jobs = contenders.images(size, memory_format)
            note(table, f"images train{layout}", size, medians(jobs, args.rounds, clock=clock))
    jobs = contenders.inference("lstm", contenders.ONE_STEP)
    note(table, "lstm infer, one step", contenders.ONE_STEP, medians(jobs, 20 * args.rounds, clock=clock))
    jobs = contenders.networks(contenders.NETWORK)
    note(table, "network train", contenders.NETWORK, medians(jobs, args.rounds, clock=clock))
    for kind in args.kinds:
        for size in sizes:
            in_full = kind != "rnn" and not args.short
            jobs = contenders.training(kind, size, extras=in_full)
            note(table, f"{kind} train", size, medians(jobs, args.rounds, clock=clock))
            note(table, f"{kind} infer", size, medians(contenders.inference(kind, size), args.rounds, clock=clock))
            if kind == "lstm":
                note(table, "lstm memory", size, in_own_process("memory", kind, size))
            if in_full and CAN_COMPILE_STEPS:
                note(table, f"{kind} train, compiled reference", size, in_own_process("compiled", kind, size))


def measure_gpu(args: argparse.Namespace, table: Table) -> None:
    """Measure the reference against cuDNN."""
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        for kind in args.kinds:
            for size in contenders.GPU_SIZES:
                jobs = contenders.training(kind, size, "cuda", dtype)
                note(table, f"{kind} train {label}", size, medians(jobs, args.rounds, 1e9, cuda_events))
                jobs = contenders.inference(kind, size, "cuda", dtype)
                note(table, f"{kind} infer {label}", size, medians(jobs, args.rounds, 1e9, cuda_events))


def memory(kind: str, size: contenders.Size) -> dict[str, float]:
    """Peak memory of a training step."""
    layer = BLNLSTM(size[2], size[3], recompute=True)
    recomputing = {"ours bln, recompute": contenders.train(layer, torch.randn(size[:3]))}
    return peaks(contenders.training(kind, size, extras=False) | recomputing)


def compiled(kind: str, size: contenders.Size) -> dict[str, float]:
    """Training steps of torch's layer and of the inductor backend."""
    steps, samples, inputs, hidden = size
    theirs = contenders.train(contenders.KINDS[kind][0](inputs, hidden), torch.randn(steps, samples, inputs))
    return medians({"torch": theirs} | contenders.compiled_reference(kind, size), 20)


OWN_PROCESS = {"memory": memory, "compiled": compiled}
"""Measurements in a process of their own: memory needs other malloc settings, and torch.compile starts threads that
would disturb the other contenders."""


def in_own_process(what: str, kind: str, size: contenders.Size) -> dict[str, float]:
    """Result of one of :data:`OWN_PROCESS`; empty if it fails."""
    command = [sys.executable, "-m", "benchmarks", "--own-process", json.dumps([what, kind, size])]
    environment = {**os.environ}
    if what == "memory":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {}


def note(table: Table, group: str, size: tuple[int, ...], found: dict[str, float]) -> None:
    table.setdefault(group, {})[" ".join(map(str, size))] = found
    print(group, size, {name: round(value, 2) for name, value in found.items()}, file=sys.stderr, flush=True)


def render(table: Table) -> str:
    """Markdown with one table per group, each number with its ratio to the first column's."""
    lines = []
    for group, rows in table.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines += [f"## {group}", "", f"| size | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
        for size, row in rows.items():
            base = next(iter(row.values()), 0.0)
            cells = [f"{row[name]:.2f} ({row[name] / base:.2f})" if name in row else "" for name in names]
            lines.append(f"| {size} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def bars(table: Table) -> str:
    """Markdown table of the goals and whether they are reached."""
    lines = ["## Goals", "", "| | mean | worst | goal | reached |", "| --- | --- | --- | --- | --- |"]
    for what, group, over, under, mean_goal, worst_goal in BARS:
        ratios = [row[over] / row[under] for row in table.get(group, {}).values() if row.get(under)]
        if not ratios:
            continue
        mean, worst = geometric_mean(ratios), max(ratios)
        reached = mean <= mean_goal and (worst_goal is None or worst <= worst_goal)
        goal = f"<= {mean_goal}" + (f", worst {worst_goal}" if worst_goal else "")
        lines.append(f"| {what} | {mean:.2f} | {worst:.2f} | {goal} | {'yes' if reached else 'no'} |")
    rows = table.get("lstm train", {}).values()
    gains = [row["reference bln"] / row["ours bln"] for row in rows if "reference bln" in row]
    if gains:
        mean = geometric_mean(gains)
        lines.append(
            f"| reference / fused, train | {mean:.2f} | {min(gains):.2f} | >= 5 | {'yes' if mean >= 5 else 'no'} |"
        )
    sums = [
        row["BatchLayerNorm"] / (row["F.batch_norm"] + row["F.layer_norm"])
        for row in table.get("array train", {}).values()
    ]
    if sums:
        mean = geometric_mean(sums)
        what = "BatchLayerNorm train / (F.batch_norm + F.layer_norm)"
        lines.append(f"| {what} | {mean:.2f} | {max(sums):.2f} | <= 1.0 | {'yes' if mean <= 1 else 'no'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
