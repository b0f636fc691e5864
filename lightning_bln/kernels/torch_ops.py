"""Recurrences of any cell on torch operations: as fast as they go, or fused by torch.compile."""

from __future__ import annotations

from copy import copy

import torch

from lightning_bln._compat import in_function_transform
from lightning_bln.cells.cell import Cell, LinearCell
from lightning_bln.kernels.reference import HiddenWeights, Noise, Result, Sequences, recurrence
from lightning_bln.kernels.scan import scan_recurrence
from lightning_bln.kernels.traced import traced_recurrence


def run(backend: str, cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.kernels.recurrence` by the backend of this name."""
    if backend == "reference" or (not torch.compiler.is_compiling() and in_function_transform()):
        return recurrence(cell, sequences, weights, noise)
    if isinstance(cell, LinearCell) and not noise.zoneout:
        return scan_recurrence(copy(cell), sequences, weights)
    if backend == "compile" and sequences.sizes is None:
        from lightning_bln.kernels.compiled import compiled_recurrence

        return compiled_recurrence(cell, sequences, weights, noise)
    found = traced_recurrence(cell, sequences, weights, noise)
    return recurrence(cell, sequences, weights, noise, deferred=True) if found is None else found
