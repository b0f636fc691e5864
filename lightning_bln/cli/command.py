"""The ``bln`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIGHTNING = {
    "fit": "train a model as a YAML file says (LightningCLI)",
    "validate": "evaluate a checkpoint on validation data",
    "test": "evaluate a checkpoint on test data",
    "predict": "compute a checkpoint's predictions",
    "sweep": "evaluate every statistics mode of a checkpoint and write the best one into it",
}
"""Subcommands with LightningCLI's own parser: see ``bln fit --help``."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, that of the process if left out."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and args[0] in LIGHTNING:
        if not is_installed("jsonargparse"):
            raise SystemExit(f"bln {args[0]} needs jsonargparse; run: pip install 'lightning-bln[cli]'")
        lazily("lightning_bln.cli.lightning", "run")(args)
        return
    if args and args[0] == "reproduce":
        raise SystemExit(lazily("lightning_bln.reproduce", "main")(args[1:]))
    options = vars(build_parser().parse_args(args))
    options.pop("run")(**options)


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function imported when it is called: lightning is slow to import, and ``--help`` should not be."""
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


def is_installed(module: str) -> bool:
    """Whether a module can be imported; one that is loaded may hide where from."""
    return module in sys.modules or find_spec(module) is not None


def run_tune(**options: Any) -> None:
    """``bln tune``, or what is missing to run it."""
    engine = options["engine"]
    for module in ("jsonargparse", "optuna", "optuna_integration", *(["ray"] if engine == "ray" else [])):
        if not is_installed(module):
            raise SystemExit(f"bln tune --engine {engine} needs {module}; run: pip install 'lightning-bln[{engine}]'")
    lazily("lightning_bln.tuning.command", "run")(**options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``bln`` and all its subcommands."""
    parser = argparse.ArgumentParser(prog="bln", description="Batch Layer Normalization for PyTorch and Lightning")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a BLN-LSTM on handwritten digits and pick its statistics mode")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for what it writes")
    demo.add_argument("--epochs", type=int, default=8, help="epochs of training")
    demo.add_argument("--seed", type=int, default=0, help="fixes split, weights and shuffling")
    demo.set_defaults(run=lazily("lightning_bln.demo", "demo"))

    tune = commands.add_parser("tune", help="search hyperparameters; every trial takes its best statistics mode")
    add_tune_arguments(tune)
    tune.set_defaults(run=run_tune)

    cells = commands.add_parser("cells", help="list the recurrent cells: states, parameters, where they come from")
    cells.add_argument("--input-size", type=int, default=128, help="features of the input")
    cells.add_argument("--hidden-size", type=int, default=128, help="units of the state")
    cells.set_defaults(run=lazily("lightning_bln.cli.cells_table", "show"))

    commands.add_parser("reproduce", help="the paper's experiments, with its numbers beside ours", add_help=False)
    for name, summary in LIGHTNING.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bln tune``."""
    parser.add_argument("--config", type=Path, help="what to search, a YAML file; the demo's network if left out")
    parser.add_argument("--trials", type=int, default=20, help="how many trials the study shall have in the end")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes to use")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"), help="folder for study and report")
    parser.add_argument("--name", default="bln", help="the study's name")
    parser.add_argument(
        "--storage", help="sqlite:///path, journal:path or postgresql://user@host/database; a SQLite file if left out"
    )
    parser.add_argument("--heartbeat", type=int, default=30, help="seconds between a trial's signs of life")
    parser.add_argument("--retries", type=int, default=3, help="how often a trial whose process died is run again")
    parser.add_argument("--engine", choices=("optuna", "ray"), default="optuna", help="what runs the trials")
    parser.add_argument("--address", help="a Ray cluster's; a local one is started if left out")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
