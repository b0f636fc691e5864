"""One layer in one direction, forward in time: project the input, normalise, run the cell, gather the statistics."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lightning_bln.kernels.matmul import linear
from lightning_bln.modes import FanOut
from lightning_bln.recurrence.backends import run, runs_fused
from lightning_bln.recurrence.fused import run_fused
from lightning_bln.recurrence.parameters import Weights
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Sequences
from lightning_bln.recurrence.regularization import Regularization
from lightning_bln.recurrence.sequence_norm import take_in
from lightning_bln.recurrence.sequences import Running


def run_direction(
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    sizes: list[int] | None,
    *,
    backend: str,
    regularization: Regularization,
    recompute: bool = False,
    fan: FanOut | None = None,
    start: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs and last states of one layer in one direction, by the backend that serves it.

    Args:
        x: The sequences, ``(T, B, input_size)``, or ``(T, modes, B, input_size)`` under a fan-out.
        state: First states, ``(..., B, size)`` each.
        weights: Parameters and norms.
        sizes: Running sequences at each step, longest first; ``None`` if all run to the end.
        backend: As in :class:`~lightning_bln.Recurrent`.
        regularization: Dropout and zoneout.
        recompute: Whether the fused backward pass computes products again.
        fan: The statistics modes along the second axis of ``x``.
        start: Steps before the first one.
    """
    mask = regularization.mask(x[0], regularization.input_dropout)
    x = x if mask is None else x * mask
    if runs_fused(backend, weights, x, state):
        return run_fused(x, state, weights, sizes, regularization, recompute=recompute, fan=fan, start=start)
    running, number = Running.of(x, sizes, start), len(weights.cell.gates)
    norm_ih = None if weights.norm_ih is None else weights.norm_ih.sequence(running)
    product = linear if backend == "auto" else F.linear
    bias = weights.bias_ih if norm_ih is None else None
    gates = product(x, weights.weight_ih, bias).unflatten(-1, (number, -1))
    dtype = weights.weight_ih.dtype  # under autocast products are narrow, the state and what is done to it is not
    state = tuple(value.to(dtype) for value in state)
    hidden = HiddenWeights(
        weights.weight_hh,
        weights.bias_hh,
        weights.weight_hr,
        tuple(norm.sequence(running) for norm in weights.norm_hh),
        None if weights.norm_cell is None else weights.norm_cell.sequence(running),
    )
    noise = Noise(
        regularization.mask(state[0], regularization.recurrent_dropout),
        regularization.zoneout,
        regularization.kept(weights.cell, state, running.steps),
    )
    result = run(backend, weights.cell, Sequences(gates, state, sizes), hidden, noise, norm_ih, weights.bias_ih)
    if weights.norm_ih is not None and norm_ih is not None:
        take_in(weights.norm_ih, norm_ih, result.norm_ih, running)
    for module, norm, seen in zip(weights.norm_hh, hidden.norm_hh, result.norm_hh, strict=False):
        take_in(module, norm, seen, running)
    if weights.norm_cell is not None and hidden.norm_cell is not None:
        take_in(weights.norm_cell, hidden.norm_cell, result.norm_cell, running)
    return result.outputs, result.state
