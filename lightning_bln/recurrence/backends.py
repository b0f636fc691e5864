"""Choice of a backend for each layer: the fused kernels where they serve, else torch operations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from lightning_bln._torch import is_observed
from lightning_bln.cells.cell import Cell, LinearCell
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.rnn import RNN
from lightning_bln.kernels.gate import HOW_TO_BUILD, reason_against, serves
from lightning_bln.recurrence.deferred import deferred_recurrence
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.inductor import inductor_recurrence
from lightning_bln.recurrence.loop import is_looped, looped_recurrence
from lightning_bln.recurrence.parameters import Weights
from lightning_bln.recurrence.program.runtime import (
    around_of,
    reason_against_program,
    recorded_cell,
    recorded_recurrence,
    segments_of,
)
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, recurrence
from lightning_bln.recurrence.scan import scan_recurrence
from lightning_bln.recurrence.sequence_norm import normalize_steps
from lightning_bln.recurrence.sequences import Running
from lightning_bln.recurrence.triton.run import recurrence_on_triton

BACKENDS = ("auto", "reference", "compile", "cpu", "triton")


def name_of(cell: Cell) -> str | None:
    """Name of a cell in the fused kernels; ``None`` if they have none for it."""
    if type(cell) is RNN:
        return f"rnn_{cell.nonlinearity}"
    return {LSTM: "lstm", GRU: "gru"}.get(type(cell))


def has_own_kernel(weights: Weights) -> bool:
    """Whether a kernel was written for the cell; the others run by a recorded program."""
    return name_of(weights.cell) is not None and weights.weight_hr is None


def reason_against_fused(weights: Weights, x: Tensor, state: Sequence[Tensor]) -> str | None:
    """Obstacle to the fused kernels for ``x``, shaped ``(T, ..., B, input_size)``; ``None`` if they serve."""
    if x.ndim != 3 and torch.is_grad_enabled():
        return "fan-out over statistics modes has no compiled kernel with gradients"
    return reason_against(weights.weight_ih.dtype, (x, *state, *weights.tensors()))


def runs_fused(backend: str, weights: Weights, x: Tensor, state: Sequence[Tensor] = ()) -> bool:
    """Whether a layer runs on the kernels that were written for its cell.

    Raises:
        ValueError: ``backend="cpu"`` asks for compiled kernels where none can run.
    """
    if backend in ("reference", "compile", "triton"):
        return False
    reason = reason_against_fused(weights, x, state)
    if backend == "auto" and reason is not None and "not installed" in reason:
        warn_missing()
    return has_own_kernel(weights) and serves(backend, reason)


def reason_on_torch(backend: str, weights: Weights) -> str | None:
    """The reason why a layer runs on torch operations, whatever its input; ``None`` if it has compiled kernels."""
    if backend in ("reference", "compile"):
        return f"backend={backend!r}"
    like, cell = weights.weight_ih, weights.cell
    reason = reason_against(like.dtype, weights.tensors())
    if reason is not None or has_own_kernel(weights):
        return reason
    units = like.shape[0] // len(cell.gates)
    sizes = [cell.state_size(name, units) for name in cell.states]
    if weights.weight_hr is not None:
        sizes[0] = weights.weight_hr.shape[0]
    state = tuple(like.new_zeros(1, size) for size in sizes)
    sequences = Sequences(like.new_zeros(1, 1, len(cell.gates), units), state, None)
    norms: Any = weights.norm_hh, weights.norm_cell  # whether there are any is all that counts here
    hidden = HiddenWeights(weights.weight_hh, weights.bias_hh, weights.weight_hr, *norms)
    noise, norm_input = Noise(None, 0.0, None), weights.norm_ih is not None
    return reason_against_recorded(cell, sequences, hidden, noise, (), weights.bias_ih, norm_input)


def reason_against_recorded(
    cell: Cell,
    sequences: Sequences,
    weights: HiddenWeights,
    noise: Noise,
    norms: Sequence[SequenceNorm],
    bias_ih: Tensor | None,
    norm_input: bool,
) -> str | None:
    """Obstacle to a recorded program, that of the input's norm too or behind it; ``None`` if there is one."""
    reason = reason_against_program(cell, sequences, weights, norms, bias_ih)
    if reason is not None:
        return reason
    around = around_of(cell, weights, noise, norm_input)
    for is_prepared in (not norm_input, True):
        try:
            segments = segments_of(cell, sequences, is_prepared=is_prepared)
        except Exception as error:  # the user's own comes again where the layer runs
            return f"{type(error).__name__}: {error}"
        found = recorded_cell(cell, segments, around._replace(norm_input=not is_prepared))
        if not isinstance(found, str):
            return None
        reason = found
    return reason


@cache
def warn_missing() -> None:
    """Say once how to get the fast recurrences."""
    warnings.warn(f"recurrent layers run on torch operations, several times slower: {HOW_TO_BUILD}", stacklevel=5)


def run(
    backend: str,
    cell: Cell,
    sequences: Sequences,
    weights: HiddenWeights,
    noise: Noise,
    norm_ih: SequenceNorm | None,
    bias_ih: Tensor | None,
) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence` by the backend of this name.

    Args:
        backend: As in :class:`~lightning_bln.Recurrent`.
        cell: The equations of one step.
        sequences: Products of the input, with their bias where there is no ``norm_ih``.
        weights: Hidden weights and norms.
        noise: Dropout and zoneout.
        norm_ih: The norm of the products, whose dtype may still be a narrow one.
        bias_ih: Their bias.
    """
    if sequences.x.ndim == 5 and backend in ("auto", "cpu", "triton") and not torch.is_grad_enabled():
        parts = list(parts_in_modes(sequences, weights, norm_ih))
        own, hidden, norm = parts[0]
        norms = [one for one in (norm, *hidden.norm_hh, hidden.norm_cell) if one is not None]
        reason = reason_against_recorded(cell, own, hidden, noise, norms, bias_ih, norm is not None)
        if reason is None or backend == "triton":
            # a recorded program repays to run one mode after the other
            return stacked([run(backend, cell, own, hidden, noise, norm, bias_ih) for own, hidden, norm in parts])
    dtype, running = sequences.state[0].dtype, Running.of(sequences.x[..., 0], sequences.sizes)
    whole = sequences._replace(x=sequences.x.to(dtype))
    if norm_ih is None:
        return run_normalized(backend, cell, whole, weights, noise)
    if backend in ("auto", "cpu"):
        found = recorded_recurrence(cell, whole, weights, noise, norm_ih, bias_ih)
        if found is not None:
            return found
    x, seen = normalize_steps(norm_ih, sequences.x, running, bias_ih, backend=backend)
    sequences = sequences._replace(x=x.to(dtype))
    return run_normalized(backend, cell, sequences, weights, noise)._replace(norm_ih=seen)


def parts_in_modes(
    sequences: Sequences, weights: HiddenWeights, norm_ih: SequenceNorm | None
) -> Iterator[tuple[Sequences, HiddenWeights, SequenceNorm | None]]:
    """Each mode of a fan-out: its input and states, the norms inside the recurrence, and that of the input."""
    for k in range(sequences.x.shape[1]):
        own = Sequences(sequences.x[:, k], tuple(value[k] for value in sequences.state), sequences.sizes)
        hidden = weights._replace(
            norm_hh=tuple(norm.of_mode(k) for norm in weights.norm_hh),
            norm_cell=None if weights.norm_cell is None else weights.norm_cell.of_mode(k),
        )
        yield own, hidden, None if norm_ih is None else norm_ih.of_mode(k)


def stacked(results: Sequence[Result]) -> Result:
    """Results of all modes as one, the modes after the time."""
    states = zip(*(result.state for result in results), strict=True)
    return Result(torch.stack([result.outputs for result in results], 1), tuple(map(torch.stack, states)), (), None)


def run_normalized(backend: str, cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`run` on an input that is normalised."""
    if backend != "cpu" and is_looped(sequences, weights, noise):
        return looped_recurrence(cell, sequences, weights, noise)
    if backend == "reference" or (is_observed() and backend != "cpu"):
        return recurrence(cell, sequences, weights, noise)
    scans = isinstance(cell, LinearCell) and not noise.zoneout
    on_triton = recurrence_on_triton(backend, cell, sequences, weights, noise)
    if on_triton is not None:
        return on_triton
    if backend == "compile" and sequences.sizes is None and not scans:
        return inductor_recurrence(cell, sequences, weights, noise)
    found = recorded_recurrence(cell, sequences, weights, noise)
    if found is not None:
        return found
    if backend == "cpu":
        norms = [norm for norm in (*weights.norm_hh, weights.norm_cell) if norm is not None]
        reason = reason_against_recorded(cell, sequences, weights, noise, norms, None, False)
        serves(backend, f"{type(cell).__name__} does not run compiled: {reason}")
    if scans:
        return scan_recurrence(cast(LinearCell, copy(cell)), sequences, weights)
    return deferred_recurrence(cell, sequences, weights, noise)
