"""Linear recurrences, computed for all steps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain
from lightning_bln.cells.cell import LinearCell
from lightning_bln.cells.gates import Gates
from lightning_bln.recurrence.reference import HiddenWeights, Result, Sequences
from lightning_bln.recurrence.sequence_norm import Seen, normalize_steps
from lightning_bln.recurrence.sequences import Running, is_running


def linear_scan(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    r""":math:`s_t = a_t \circ s_{t-1} + b_t` for all steps.

    Args:
        a: ``(T, ...)``.
        b: ``(T, ...)``.
        first: :math:`s_0`, ``(...)``.

    Returns:
        :math:`s_1` to :math:`s_T`, ``(T, ...)``.

    Example:
        >>> ones = torch.ones(4, 1)
        >>> linear_scan(2 * ones, ones, torch.zeros(1)).flatten()
        tensor([ 1.,  3.,  7., 15.])

    Source:
        Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", 2018.
    """
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = a.expand(shape), b.expand(shape)
    if not torch.compiler.is_compiling() and not is_observed() and all(map(is_plain, (a, b, first))):
        return SequentialScan.apply(a, b, first)
    return doubling_scan(a, b, first)


def doubling_scan(a: Tensor, b: Tensor, first: Tensor) -> Tensor:
    """:func:`linear_scan` by doubling: log2(T) passes, each over all steps."""
    b = torch.cat([a[:1] * first + b[:1], b[1:]])
    distance = 1
    while distance < len(a):
        b = torch.cat([b[:distance], a[distance:] * b[:-distance] + b[distance:]])
        a = torch.cat([a[:distance], a[distance:] * a[:-distance]])
        distance *= 2
    return b


class SequentialScan(torch.autograd.Function):
    """:func:`linear_scan` step by step, forward and backward: the fewest operations."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, first: Tensor) -> Tensor:
        """One fused multiplication and addition a step."""
        states = b.new_empty(b.shape)
        state = first
        for factor, term, out in zip(a.unbind(0), b.unbind(0), states.unbind(0), strict=True):
            state = torch.addcmul(term, factor, state, out=out)
        ctx.save_for_backward(a, first, states)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same recurrence, backwards in time."""
        a, first, states = ctx.saved_tensors
        factors = torch.cat([torch.zeros_like(a[:1]), a[1:].flip(0)])
        at_states = linear_scan(factors, gradient.flip(0), torch.zeros_like(first)).flip(0)
        before = torch.cat([first[None], states[:-1]])
        return at_states * before, at_states, a[0] * at_states[0]


def scan_recurrence(cell: LinearCell, sequences: Sequences, weights: HiddenWeights) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence` of a linear cell without zoneout."""
    first = cell.State(*sequences.state)
    x = cell.whole(cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), first), first)
    a, b = cell.coefficients(x)
    running = None
    if sequences.sizes is not None:
        running = is_running(sequences.sizes, sequences.x)
        a, b = a.where(running, 1.0), b.where(running, 0.0)
    s = linear_scan(a, b, getattr(first, cell.linear))
    steps = Running.of(sequences.x[..., 0], sequences.sizes)
    seen: list[Seen] = []

    def normalized(c: Tensor) -> Tensor:
        if weights.norm_cell is None:
            return c
        y, of_steps = normalize_steps(weights.norm_cell, c.unsqueeze(-2), steps)
        seen.append(of_steps)
        return y.squeeze(-2)

    cell.norm_cell = normalized
    states = cell.readout(x, s)
    outputs, last = states[0], [value[-1] for value in states]
    if running is not None:
        outputs = outputs.where(running, 0.0)
        ends = running.sum(0) - 1
        last = [value.gather(0, ends.expand(1, *value.shape[1:]))[0] for value in states]
    return Result(outputs, tuple(last), (), seen[0] if seen else None)
