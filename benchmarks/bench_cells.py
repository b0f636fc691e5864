"""``make bench-cells``: a training step of every cell with every norm, beside torchrecurrent's cell without one."""

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

from benchmarks.measure import Job, allocated, geometric_mean, machine, medians, wall_clock
from lightning_bln import Recurrent
from lightning_bln.cells import registry

RESULTS = Path(__file__).parent / "results"
PEERS = {name.removesuffix("Cell").lower(): name.removesuffix("Cell") for name in dir(torchrecurrent)}
NORMS = {"none": None, "layer": "layer", "batch": "batch", "bln": "bln"}
COMPILED, THEIRS = "none compiled", "torchrecurrent"
Table = dict[str, dict[str, float]]

RATIOS: dict[str, tuple[str, str, float, float]] = {
    "bln / none": ("bln", "none", 1.4, 2.0),
    "layer / none": ("layer", "none", 1.25, 1.8),
    "batch / none": ("batch", "none", 1.4, 2.0),
    "bln / torchrecurrent": ("bln", THEIRS, 0.45, 0.8),
    "none / torchrecurrent": ("none", THEIRS, 0.45, 0.8),
}
"""Two contenders each, and the goals for the mean and for the worst."""

MEMORY = ("bln MB / none MB", 1.5)


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
    memory: dict[str, float] = {}
    for cell in args.cells:
        clock = wall_clock if args.wall else cpu_clock
        contenders = jobs(cell, *args.size, args.compile)
        table[cell] = medians(contenders, args.rounds, slow=float("inf"), clock=clock, settles=True)
        memory[cell] = allocated(contenders["bln"]) / allocated(contenders["none"])
        print(row(cell, table[cell], memory[cell]), flush=True)
    text = render(table, memory, args, started)
    print(f"\n{text}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text(text)
    results = {"machine": started, "table": table, "memory": memory}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(results, indent=1))


def cpu_clock(job: Job) -> float:
    """Milliseconds of this process's CPU time, summed over threads."""
    start = time.process_time()
    job()
    return (time.process_time() - start) * 1e3


def jobs(cell: str, steps: int, batch: int, size: int, compiled: bool) -> dict[str, Job]:
    """A training step of each contender."""
    x = torch.randn(steps, batch, size)
    found = {name: training_step(Recurrent(cell, size, size, norm=norm), x) for name, norm in NORMS.items()}
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


def ratio(times: dict[str, float], name: str) -> float | None:
    """One of :data:`RATIOS`; ``None`` without both contenders."""
    one, other, *_ = RATIOS[name]
    return times[one] / times[other] if one in times and other in times else None


def row(cell: str, times: dict[str, float], memory: float) -> str:
    """A row of the table."""
    cells = [f"{times[name]:.1f}" if name in times else "" for name in (*NORMS, COMPILED, THEIRS)]
    ratios = ["" if value is None else f"{value:.2f}" for value in (ratio(times, name) for name in RATIOS)]
    return f"| {' | '.join([cell, *cells, *ratios, f'{memory:.2f}'])} |"


def summary(name: str, values: dict[str, float], mean: float, worst: float) -> str:
    """A row of the table of goals."""
    most = max(values, key=lambda cell: values[cell])
    found = geometric_mean(values.values())
    verdict = "reached" if found <= mean and values[most] <= worst else "missed"
    return f"| {name} | {found:.2f} | {values[most]:.2f} ({most}) | {mean}, {worst} | {len(values)} | {verdict} |"


def render(table: Table, memory: dict[str, float], args: argparse.Namespace, started: str) -> str:
    """The whole report."""
    steps, batch, size = args.size
    goals = []
    for name, (_, _, mean, worst) in RATIOS.items():
        found = {cell: ratio(times, name) for cell, times in table.items()}
        values = {cell: value for cell, value in found.items() if value is not None}
        if values:
            goals.append(summary(name, values, mean, worst))
    columns = ["cell", *NORMS, COMPILED, THEIRS, *RATIOS, MEMORY[0]]
    return "\n".join(
        [
            f"# A training step of every cell, {started}",
            "",
            f"T={steps}, B={batch}, input and hidden size {size}. Milliseconds of "
            f"{'wall clock' if args.wall else 'CPU time of the process'}, medians of {args.rounds} turns taken in one "
            "process; torchrecurrent's cells have no norm.",
            "",
            "| ratio | geometric mean | worst | goals | cells | |",
            "|---|---|---|---|---|---|",
            *goals,
            summary(MEMORY[0], memory, MEMORY[1], MEMORY[1]),
            "",
            f"| {' | '.join(columns)} |",
            f"|{'---|' * len(columns)}",
            *(row(cell, times, memory[cell]) for cell, times in table.items()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
