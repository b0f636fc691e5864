"""``bln reproduce``: the paper's experiments, with more seeds, the missing control and selection on validation data."""

from lightning_bln.reproduce.command import main

__all__ = ["main"]
