"""The recurrence of one layer in one direction, in plain torch operations: the oracle of every faster kernel."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates, Steps
from lightning_bln.equation import Statistics
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.projection import Projection


class Sequences(NamedTuple):
    """Input of a recurrence: any number of sequences, longest first, forward in time."""

    x: Tensor
    """Projected, normalised input of all gates with its bias, ``(T, ..., B, G, H)``."""
    state: tuple[Tensor, ...]
    """First states, ``(..., B, size)`` each."""
    sizes: Sequence[int] | None
    """Running sequences at each step; ``None`` if all run to the end."""


class HiddenWeights(NamedTuple):
    """Parameters and norms of the products with the state."""

    weight_hh: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_hh: tuple[SequenceNorm, ...]
    norm_cell: SequenceNorm | None


class Noise(NamedTuple):
    """Dropout inside the recurrence."""

    hidden_mask: Tensor | None
    """Factors on the state where it enters the products, alike at every step, ``(B, size)``."""
    zoneout: float
    """Share of its value that a unit of a state keeps over a step, as an expectation."""
    kept: dict[str, Tensor] | None
    """In training, whether units of each zoned state keep their value at each step instead, ``(T, ..., B, size)``."""

    def at(self, window: slice) -> Noise:
        """The same for some of the steps."""
        return self if self.kept is None else self._replace(kept={name: m[window] for name, m in self.kept.items()})


class Result(NamedTuple):
    """Outputs ``(T, ..., B, size)``, zero after a sequence's end; last states; and of each norm, if it observes.

    Norms have observed statistics of each step, or a kernel's moments, see :mod:`~lightning_bln.recurrence.statistics`.
    """

    outputs: Tensor
    state: tuple[Tensor, ...]
    norm_hh: tuple[Statistics | Tensor | None, ...]
    norm_cell: Statistics | Tensor | None
    norm_ih: Statistics | Tensor | None = None
    """Where the recurrence normalises its input."""


def recurrence(
    cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise, *, deferred: bool = False
) -> Result:
    """Run ``cell`` over all steps.

    Args:
        cell: The equations of one step.
        sequences: Projected inputs and first states.
        weights: Hidden weights and norms.
        noise: Dropout and zoneout.
        deferred: Whether the hidden weights' gradient is taken once for all steps, which is faster but has no gradient
            of its own.

    Returns:
        Outputs, last states and, where norms observe, their statistics stacked over the steps.
    """
    first = cell.State(*sequences.state)
    x = cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), first)
    return unroll(copy(cell), x, sequences, weights, noise, deferred)


def unroll(
    cell: Cell, x: Gates, sequences: Sequences, weights: HiddenWeights, noise: Noise, deferred: bool = False
) -> Result:
    """:func:`recurrence` on prepared gates, those of ``sequences`` left aside; changes attributes of ``cell``."""
    state = cell.State(*sequences.state)
    steps, samples = sequences.x.shape[0], state[0].shape[-2]
    biases = split_bias(cell, weights)
    norms_hh = [Recorder(norm, bias) for norm, bias in zip(weights.norm_hh, biases, strict=True)]
    norm_cell = Recorder(weights.norm_cell)
    cell.norm_cell = norm_cell.of_state
    shape = (steps, samples) if deferred else None
    project = Projection(cell, weights.weight_hh, weights.bias_hh, norms_hh, noise.hidden_mask, shape)
    zoned = cell.states if cell.zoned is None else cell.zoned
    outputs = []
    for t, gates in enumerate(Steps(x, steps, sequences.sizes)):
        running = samples if sequences.sizes is None else sequences.sizes[t]
        before = state if running == samples else cell.State(*(value[..., :running, :] for value in state))
        for recorder in (*norms_hh, norm_cell):
            recorder.t = t
        after = cell.step(gates, before, project.at(t, running))
        if weights.weight_hr is not None:
            after = after._replace(h=F.linear(after.h, weights.weight_hr))
        if noise.zoneout:
            mixed = {name: zone(name, getattr(before, name), getattr(after, name), noise, t) for name in zoned}
            after = after._replace(**mixed)
        if running < samples:
            outputs.append(F.pad(after[0], (0, 0, 0, samples - running)))
            after = cell.State(
                *(torch.cat([new, old[..., running:, :]], -2) for old, new in zip(state, after, strict=True))
            )
        else:
            outputs.append(after[0])
        state = after
    return Result(
        torch.stack(outputs),
        tuple(state),
        tuple(stack(norm.seen) for norm in norms_hh),
        stack(norm_cell.seen),
    )


def split_bias(cell: Cell, weights: HiddenWeights) -> list[Tensor | None]:
    """The hidden bias of each normalised product."""
    if weights.bias_hh is None:
        return [None] * len(weights.norm_hh)
    size = weights.bias_hh.shape[0] // sum(map(len, cell.products))
    parts = weights.bias_hh.split([len(names) * size for names in cell.products])
    return list(parts[: len(weights.norm_hh)])


class Recorder:
    """A norm, if any, at step ``t`` with a bias after it; observed statistics are appended to ``seen``."""

    def __init__(self, norm: SequenceNorm | None, bias: Tensor | None = None) -> None:
        if norm is not None and bias is not None:
            norm = norm._replace(equation=norm.equation._replace(bias=bias))
        self.norm = norm
        self.t: int | slice = 0
        self.mask: Tensor | None = None
        self.seen: list[Statistics] = []

    def __call__(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        y, statistics = self.norm(x, self.t, self.mask)
        if statistics is not None:
            self.seen.append(statistics)
        return y

    def of_state(self, c: Tensor) -> Tensor:
        """The norm of a cell state ``(..., B, H)``; without one the state as it is."""
        return c if self.norm is None else self(c.unsqueeze(-2)).squeeze(-2)


def identity(c: Tensor) -> Tensor:
    """A cell state without a norm."""
    return c


def zone(name: str, old: Tensor, new: Tensor, noise: Noise, t: int) -> Tensor:
    """Zoneout of a state: some units keep their old value in training, all a share of it in evaluation."""
    if noise.kept is not None:
        return torch.where(noise.kept[name][t][..., : old.shape[-2], :], old, new)
    return noise.zoneout * old + (1.0 - noise.zoneout) * new


def stack(steps: list[Statistics]) -> Any:
    """Statistics of all steps, time first."""
    return Statistics(*map(torch.stack, zip(*steps, strict=True))) if steps else None
