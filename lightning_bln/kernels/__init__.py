"""Recurrences: the reference in plain torch operations, and faster ones with the same results."""

from lightning_bln.kernels.reference import HiddenWeights, Noise, Result, Sequences, recurrence
from lightning_bln.kernels.torch_ops import run

__all__ = ["HiddenWeights", "Noise", "Result", "Sequences", "recurrence", "run"]
