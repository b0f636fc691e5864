"""Recurrences: the reference in plain torch operations, and faster ones with the same results."""

from lightning_bln._compat import HAS_CUSTOM_OPS
from lightning_bln.kernels import cpu, dense, library
from lightning_bln.kernels.choice import BACKENDS, available, runs_compiled
from lightning_bln.kernels.reference import HiddenWeights, Noise, Result, Sequences, recurrence
from lightning_bln.kernels.torch_ops import run

if HAS_CUSTOM_OPS:
    from lightning_bln.kernels import operators as operators

__all__ = [
    "BACKENDS",
    "HiddenWeights",
    "Noise",
    "Result",
    "Sequences",
    "available",
    "cpu",
    "dense",
    "library",
    "recurrence",
    "run",
    "runs_compiled",
]
