"""The ``bln`` command line: Lightning's subcommands, the search, the demo and the paper's experiments."""

from lightning_bln.cli.command import LIGHTNING, main

__all__ = ["LIGHTNING", "main"]
