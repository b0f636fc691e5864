"""The ``bln`` command."""

from lightning_bln.cli.command import LIGHTNING, main

__all__ = ["LIGHTNING", "main"]
