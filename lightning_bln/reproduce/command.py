"""The command line of ``bln reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_bln.data.files import DataError, data_dir
from lightning_bln.models.paper.networks import PAPER_NORMS
from lightning_bln.reproduce.experiments import EXPERIMENTS
from lightning_bln.reproduce.report import write_report
from lightning_bln.reproduce.training import Settings, run

DESCRIPTION = """Train the paper's networks with BLN and the norms it is compared with, over several seeds, and print
tables of our numbers beside the paper's: the best epoch's validation scores, and test scores of statistics modes named
in advance, chosen on validation data, and (labelled so) best on test data."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS))
    parser.add_argument(
        "--norms",
        nargs="+",
        choices=list(PAPER_NORMS),
        default=list(PAPER_NORMS),
        metavar="NORM",
        help=f"which of {', '.join(PAPER_NORMS)}; all by default",
    )
    parser.add_argument("--fraction", type=float, default=0.2, help="share of the training set (the paper: 0.2 and 1)")
    parser.add_argument("--batch-size", type=int, default=25, help="samples per batch (the paper: 25 and 1)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument(
        "--epochs", type=int, help="epochs of training; the authors' 10 (imdb) or 15 (cifar10) by default"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: few batches, 2 epochs, 1 seed")
    parser.add_argument("--data-dir", type=Path, help="folder that holds the data; BLN_DATA_DIR by default")
    parser.add_argument("--download", action="store_true", help="fetch the data first if it is not there")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for state, JSON, table and figures; training runs found there are continued "
        "(default: reproduction/EXPERIMENT-FRACTION-bsSIZE)",
    )


def reproduce(arguments: argparse.Namespace) -> int:
    """Carry out the command and return its exit status."""
    for name in ("fraction", "batch_size", "seeds", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            print(f"bln reproduce: --{name.replace('_', '-')} is {value}, but it must be positive", file=sys.stderr)
            return 2
    experiment = EXPERIMENTS[arguments.experiment]
    label = f"{experiment.name}-{arguments.fraction:g}-bs{arguments.batch_size}"
    output = arguments.output or Path("reproduction") / (f"{label}-quick" if arguments.quick else label)
    shared: dict[str, Any] = {
        "fraction": arguments.fraction,
        "batch_size": arguments.batch_size,
        "epochs": arguments.epochs or (2 if arguments.quick else experiment.epochs),
        "limit": 20 if arguments.quick else None,
    }
    results = []
    try:
        pool, test = experiment.read(data_dir(arguments.data_dir), arguments.download)
        for seed in range(1 if arguments.quick else arguments.seeds):
            for norm in arguments.norms:
                settings = Settings(norm, seed, **shared)
                results.append(run(experiment, pool, test, settings, output / settings.name))
                # After every training run, so that results can be read while the others go on.
                table = write_report(results, output)
    except (DataError, ValueError) as error:
        print(f"bln reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nbln reproduce: stopped; the same command goes on from the last epoch in {output}", file=sys.stderr)
        return 130
    print(table)
    print(f"written to {output}: results.json, table.md, convergence.png, modes.png")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and carry out a command line, and return the exit status."""
    parser = argparse.ArgumentParser(prog="bln reproduce", description=DESCRIPTION)
    add_arguments(parser)
    return reproduce(parser.parse_args(arguments))
