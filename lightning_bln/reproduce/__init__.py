"""``bln reproduce``: the paper's experiments with several seeds, a control norm, and selection on validation data."""

from lightning_bln.reproduce.command import main

__all__ = ["main"]
