"""``python -m benchmarks.bench_cells``: a training step of every cell of the zoo beside torchrecurrent's."""

from __future__ import annotations

import argparse
import datetime
import json
import time
import warnings
from pathlib import Path

import torch
import torchrecurrent
from torch import nn

from benchmarks.measure import Job, geometric_mean, machine, medians, wall_clock
from lightning_bln import Recurrent
from lightning_bln.cells import registry

RESULTS = Path(__file__).parent / "results"
PEERS = {name.removesuffix("Cell").lower(): name.removesuffix("Cell") for name in dir(torchrecurrent)}
OURS, COMPILED, THEIRS = "ours", "ours compiled", "torchrecurrent"
Table = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each contender")
    parser.add_argument("--cells", nargs="+", default=list(registry), choices=list(registry), metavar="CELL")
    parser.add_argument("--size", type=int, nargs=3, default=(100, 32, 128), metavar=("T", "B", "H"))
    parser.add_argument("--compile", action="store_true", help="backend='compile' too (half a minute a cell)")
    parser.add_argument(
        "--wall", action="store_true", help="wall clock instead of the process's CPU time, for an idle machine"
    )
    parser.add_argument("--name", default="cells", help="of the files under benchmarks/results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    started = f"{datetime.datetime.now():%Y-%m-%d %H:%M}; {machine()}"
    table: Table = {}
    for cell in args.cells:
        clock = wall_clock if args.wall else cpu_clock
        table[cell] = medians(jobs(cell, *args.size, args.compile), args.rounds, slow=float("inf"), clock=clock)
        print(row(cell, table[cell]), flush=True)
    text = render(table, args, started)
    print(f"\n{text}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text(text)
    (RESULTS / f"{args.name}.json").write_text(json.dumps({"machine": started, "table": table}, indent=1))


def cpu_clock(job: Job) -> float:
    """Milliseconds of this process's CPU time, summed over threads."""
    start = time.process_time()
    job()
    return (time.process_time() - start) * 1e3


def jobs(cell: str, steps: int, batch: int, size: int, compiled: bool) -> dict[str, Job]:
    """A training step of each contender."""
    x = torch.randn(steps, batch, size)
    found = {OURS: training_step(Recurrent(cell, size, size, norm=None), x)}
    if compiled:
        found[COMPILED] = training_step(Recurrent(cell, size, size, norm=None, backend="compile"), x)
    if cell in PEERS:
        found[THEIRS] = training_step(getattr(torchrecurrent, PEERS[cell])(size, size), x)
    return found


def training_step(layer: nn.Module, x: torch.Tensor) -> Job:
    """Forward and backward, with the sum of the outputs as the loss."""

    def step() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return step


def row(cell: str, times: dict[str, float]) -> str:
    """A row of the table."""
    theirs = times.get(THEIRS)
    best = min(time for name, time in times.items() if name != THEIRS)
    cells = [cell, *(f"{times[name]:.1f}" if name in times else "" for name in (OURS, COMPILED, THEIRS))]
    ratios = ["", ""] if theirs is None else [f"{theirs / times[OURS]:.2f}", f"{theirs / best:.2f}"]
    return f"| {' | '.join([*cells, *ratios])} |"


def render(table: Table, args: argparse.Namespace, started: str) -> str:
    """The whole report."""
    steps, batch, size = args.size
    pairs = [times for times in table.values() if THEIRS in times]
    ratios = [times[THEIRS] / times[OURS] for times in pairs]
    best = [times[THEIRS] / min(value for name, value in times.items() if name != THEIRS) for times in pairs]
    lines = [
        f"# A training step of every cell, {started}",
        "",
        f"T={steps}, B={batch}, input and hidden size {size}, no norm. Milliseconds of "
        f"{'wall clock' if args.wall else 'CPU time of the process'}, medians of {args.rounds} turns taken in one "
        "process.",
        "",
        f"| cell | {OURS} | {COMPILED} | {THEIRS} | ratio | ratio of our faster one |",
        "|---|---|---|---|---|---|",
        *(row(cell, times) for cell, times in table.items()),
        "",
    ]
    if pairs:
        lines.append(
            f"Geometric mean of the ratios {geometric_mean(ratios):.2f} (our faster one {geometric_mean(best):.2f}) "
            f"over {len(pairs)} cells; {sum(r > 1 for r in ratios)} of them faster, the least {min(ratios):.2f}.\n"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
