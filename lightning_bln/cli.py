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
        if find_spec("jsonargparse") is None:
            raise SystemExit(f"bln {args[0]} needs jsonargparse; run: pip install 'lightning-bln[cli]'")
        lazily("lightning_bln.lightning_cli", "run")(args)
        return
    if args and args[0] == "reproduce":
        raise SystemExit(lazily("lightning_bln.reproduce", "main")(args[1:]))
    options = vars(build_parser().parse_args(args))
    options.pop("run")(**options)


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function imported when it is called: lightning is slow to import, and ``--help`` should not be."""
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``bln`` and all its subcommands."""
    parser = argparse.ArgumentParser(prog="bln", description="Batch Layer Normalization for PyTorch and Lightning")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="train a BLN-LSTM on handwritten digits and pick its statistics mode")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for what it writes")
    demo.add_argument("--epochs", type=int, default=8, help="epochs of training")
    demo.add_argument("--seed", type=int, default=0, help="fixes split, weights and shuffling")
    demo.set_defaults(run=lazily("lightning_bln.demo", "demo"))

    commands.add_parser("reproduce", help="the paper's experiments, with its numbers beside ours", add_help=False)
    for name, summary in LIGHTNING.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


if __name__ == "__main__":
    main()
