"""The ``bln`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``, that of the process if left out."""
    parser = argparse.ArgumentParser(prog="bln", description="Batch Layer Normalization for PyTorch and Lightning")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a BLN-LSTM on handwritten digits and pick its statistics mode")
    demo.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for what it writes")
    demo.add_argument("--epochs", type=int, default=8, help="epochs of training")
    demo.add_argument("--seed", type=int, default=0, help="fixes split, weights and shuffling")
    options = vars(parser.parse_args(argv))
    del options["command"]

    from lightning_bln.demo import demo as run  # lightning is slow to import, and --help should not be

    run(**options)


if __name__ == "__main__":
    main()
