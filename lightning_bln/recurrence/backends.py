"""Choice of a backend for each layer: the fused kernels where they serve, else torch operations."""

from __future__ import annotations

import warnings
from copy import copy
from functools import cache

import torch
from torch import Tensor

from lightning_bln._torch import in_function_transform
from lightning_bln.cells.cell import Cell, LinearCell
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.rnn import RNN
from lightning_bln.kernels.library import is_built
from lightning_bln.recurrence.inductor import inductor_recurrence
from lightning_bln.recurrence.parameters import Weights
from lightning_bln.recurrence.program.runtime import recorded_recurrence
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, recurrence
from lightning_bln.recurrence.scan import scan_recurrence

BACKENDS = ("auto", "reference", "compile", "cpu")
HOW_TO_BUILD = (
    "install a C++ compiler (g++ or clang) and, in a clone of lightning-bln, install it again: "
    "pip install --force-reinstall --no-deps --no-binary lightning-bln ."
)


def name_of(cell: Cell) -> str | None:
    """Name of a cell in the fused kernels; ``None`` if they have none for it."""
    if type(cell) is RNN:
        return f"rnn_{cell.nonlinearity}"
    return {LSTM: "lstm", GRU: "gru"}.get(type(cell))


def reason_against(cell: Cell, x: Tensor, weights: Weights) -> str | None:
    """Obstacle to the fused kernels for ``x``, shaped ``(T, B, input_size)``; ``None`` if they serve."""
    if name_of(cell) is None:
        return f"cell={type(cell).__name__} has no compiled kernel"
    assert weights.weight_hh is not None
    if weights.weight_hr is not None:
        return "proj_size has no compiled kernel"
    if x.device.type != "cpu" or weights.weight_ih.device.type != "cpu":
        return f"the input is on {x.device}, and the compiled kernels run on the CPU"
    if weights.weight_ih.dtype not in (torch.float32, torch.float64):
        return f"the parameters have dtype {weights.weight_ih.dtype}, and the compiled kernels take float32 and float64"
    if x.ndim != 3 and torch.is_grad_enabled():
        return "fan-out over statistics modes has no compiled kernel with gradients"
    if not is_built():
        return f"the compiled kernels are not installed; {HOW_TO_BUILD}"
    return None


def runs_fused(backend: str, cell: Cell, x: Tensor, weights: Weights) -> bool:
    """Whether a layer runs on the fused kernels.

    Raises:
        ValueError: ``backend="cpu"`` asks for them where they cannot run.
    """
    if backend in ("reference", "compile"):
        return False
    reason = reason_against(cell, x, weights)
    if reason is not None and backend == "cpu":
        raise ValueError(f"backend='cpu', but {reason}; pass backend='auto' to run on torch operations instead")
    if reason is not None and "not installed" in reason:
        warn_missing()
    return reason is None


@cache
def warn_missing() -> None:
    """Say once how to get the fast recurrences."""
    warnings.warn(f"recurrent layers run on torch operations, several times slower: {HOW_TO_BUILD}", stacklevel=5)


def run(backend: str, cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence` by the backend of this name."""
    if backend == "reference" or (not torch.compiler.is_compiling() and in_function_transform()):
        return recurrence(cell, sequences, weights, noise)
    if isinstance(cell, LinearCell) and not noise.zoneout:
        return scan_recurrence(copy(cell), sequences, weights)
    if backend == "compile" and sequences.sizes is None:
        return inductor_recurrence(cell, sequences, weights, noise)
    found = recorded_recurrence(cell, sequences, weights, noise)
    return recurrence(cell, sequences, weights, noise, deferred=True) if found is None else found
