"""Parser and dispatch of the ``bln`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_bln._files import FileError

LIGHTNING = {
    "fit": "train the model that a YAML file configures (LightningCLI)",
    "validate": "evaluate a checkpoint on validation data",
    "test": "evaluate a checkpoint on test data",
    "predict": "compute a checkpoint's predictions",
    "sweep": "evaluate a checkpoint in every statistics mode and write the best one into it",
    "calibrate": "compute a checkpoint's population anew on unlabelled data of a new domain",
    "export": "write a checkpoint's model, folded, as an ONNX file, a torch.export program or a plain state dict",
}
"""Subcommands parsed by LightningCLI, each with its summary."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``bln`` command with the arguments ``argv``, by default those of the process."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        dispatch(args)
    except FileError as error:  # says all there is to say about a file
        raise SystemExit(f"bln {args[0]}: {error}") from error


def dispatch(args: list[str]) -> None:
    """Run the subcommand ``args[0]`` with the arguments that follow it."""
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
    """A function that is imported when it is called, since ``--help`` should not wait for lightning's import."""
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


def is_installed(module: str) -> bool:
    """Whether a module can be imported; find_spec fails for a loaded one without a spec."""
    return module in sys.modules or find_spec(module) is not None


def run_tune(**options: Any) -> None:
    """Run ``bln tune``, or exit with the command that installs what it lacks."""
    engine = options["engine"]
    for module in ("jsonargparse", "optuna", "optuna_integration", *(["ray"] if engine == "ray" else [])):
        if not is_installed(module):
            raise SystemExit(f"bln tune --engine {engine} needs {module}; run: pip install 'lightning-bln[{engine}]'")
    lazily("lightning_bln.tuning.command", "run")(**options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``bln`` and all its subcommands."""
    parser = argparse.ArgumentParser(prog="bln", description="Batch Layer Normalization for PyTorch and Lightning")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a BLN-LSTM on handwritten digits and choose its statistics mode")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for its files")
    demo.add_argument("--epochs", type=int, default=8, help="epochs of training")
    demo.add_argument("--seed", type=int, default=0, help="seed of split, weights and shuffling")
    demo.set_defaults(run=lazily("lightning_bln.demo", "demo"))

    tune = commands.add_parser("tune", help="search hyperparameters; every trial is scored in its best statistics mode")
    add_tune_arguments(tune)
    tune.set_defaults(run=run_tune)

    cells = commands.add_parser("cells", help="list the recurrent cells: states, parameters, sources")
    cells.add_argument("--input-size", type=int, default=128, help="features of the input")
    cells.add_argument("--hidden-size", type=int, default=128, help="units of the state")
    cells.set_defaults(run=lazily("lightning_bln.cli.cells_table", "show"))

    commands.add_parser("reproduce", help="run the paper's experiments, with its numbers beside ours", add_help=False)
    for name, summary in LIGHTNING.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bln tune``."""
    parser.add_argument("--config", type=Path, help="YAML file of the search; the demo's if left out")
    parser.add_argument("--trials", type=int, default=20, help="number of trials of the study in the end")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--output", type=Path, default=Path("runs/tune"), help="folder for study and report")
    parser.add_argument("--name", default="bln", help="the study's name")
    parser.add_argument(
        "--storage", help="sqlite:///path, journal:path or postgresql://user@host/database; a SQLite file if left out"
    )
    parser.add_argument("--heartbeat", type=int, default=30, help="seconds between two heartbeats of a trial")
    parser.add_argument("--retries", type=int, default=3, help="how many times a trial whose process died is run again")
    parser.add_argument("--engine", choices=("optuna", "ray"), default="optuna", help="library that runs the trials")
    parser.add_argument("--address", help="address of a Ray cluster; a local one is started if left out")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bar")
