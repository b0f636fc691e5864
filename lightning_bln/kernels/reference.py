"""The recurrence of one layer in one direction, in plain torch operations: the oracle of every faster kernel."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell, Gates
from lightning_bln.cells.projection import Projection
from lightning_bln.functional import Statistics
from lightning_bln.gate_norm import SequenceNorm


class Sequences(NamedTuple):
    """What a recurrence runs on: any number of sequences, sorted by falling length, forward in time."""

    x: Tensor
    """Projected, normalised input of all gates with its bias, ``(T, ..., B, G, H)``."""
    state: tuple[Tensor, ...]
    """First states, ``(..., B, size)`` each."""
    sizes: Sequence[int] | None
    """How many sequences still run at each step; ``None`` if all run to the end."""


class HiddenWeights(NamedTuple):
    """What a recurrence multiplies and normalises its state by."""

    weight_hh: Tensor
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_hh: tuple[SequenceNorm, ...]
    norm_cell: SequenceNorm | None


class Noise(NamedTuple):
    """Dropout inside the recurrence."""

    hidden_mask: Tensor | None
    """Multiplies what enters the hidden products, one mask for all steps, ``(B, size)``."""
    zoneout: float
    """Probability that a unit of a state keeps its value over a step."""
    training: bool


class Result(NamedTuple):
    """Outputs ``(T, ..., B, size)`` (zero once a sequence has ended), last states, and statistics of each norm."""

    outputs: Tensor
    state: tuple[Tensor, ...]
    norm_hh: tuple[Statistics, ...]
    norm_cell: Statistics | None


def recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """Run ``cell`` over all steps.

    Args:
        cell: The equations of one step.
        sequences: Projected inputs and first states.
        weights: Hidden weights and norms.
        noise: Dropout and zoneout.

    Returns:
        Outputs, last states and, where norms observe, their statistics stacked over the steps.
    """
    cell = copy(cell)  # its norm changes with every step
    state = cell.State(*sequences.state)
    samples = state.h.shape[-2]
    outputs, seen_hh, seen_cell = [], [[] for _ in weights.norm_hh], []  # type: ignore[var-annotated]
    for t, x in enumerate(sequences.x.unbind(0)):
        running = samples if sequences.sizes is None else sequences.sizes[t]
        before = cell.State(*(value[..., :running, :] for value in state))
        mask = None if noise.hidden_mask is None else noise.hidden_mask[..., :running, :]
        norms = [Recorder(norm, t, seen) for norm, seen in zip(weights.norm_hh, seen_hh, strict=True)]
        cell.norm_cell = CellRecorder(weights.norm_cell, t, seen_cell)
        project = Projection(cell, weights.weight_hh, weights.bias_hh, norms, mask)
        after = cell.step(Gates(x[..., :running, :, :], cell.gates), before, project)
        if weights.weight_hr is not None:
            after = after._replace(h=F.linear(after.h, weights.weight_hr))
        if noise.zoneout:
            after = cell.State(*(zone(old, new, noise) for old, new in zip(before, after, strict=True)))
        outputs.append(F.pad(after.h, (0, 0, 0, samples - running)))
        if running < samples:
            after = cell.State(
                *(torch.cat([new, old[..., running:, :]], -2) for old, new in zip(state, after, strict=True))
            )
        state = after
    return Result(torch.stack(outputs), tuple(state), tuple(map(stack, filter(None, seen_hh))), stack(seen_cell))


class Recorder:
    """A norm at step ``t``, called by a projection; what it observes is appended to ``seen``."""

    def __init__(self, norm: SequenceNorm, t: int, seen: list) -> None:
        self.norm, self.t, self.seen = norm, t, seen

    def __call__(self, x: Tensor) -> Tensor:
        y, statistics = self.norm(x, self.t)
        if statistics is not None:
            self.seen.append(statistics)
        return y


class CellRecorder:
    """The norm of a cell state ``(..., B, H)`` at step ``t``; without one, the state itself."""

    def __init__(self, norm: SequenceNorm | None, t: int, seen: list) -> None:
        self.recorder = None if norm is None else Recorder(norm, t, seen)

    def __call__(self, c: Tensor) -> Tensor:
        return c if self.recorder is None else self.recorder(c.unsqueeze(-2)).squeeze(-2)


def zone(old: Tensor, new: Tensor, noise: Noise) -> Tensor:
    """Zoneout: units keep their old value at random; in evaluation, the expectation of that."""
    if noise.training:
        return torch.where(torch.rand_like(old) < noise.zoneout, old, new)
    return noise.zoneout * old + (1.0 - noise.zoneout) * new


def stack(steps: list[Statistics]) -> Any:
    """Statistics of all steps, time first."""
    return Statistics(*map(torch.stack, zip(*steps, strict=True))) if steps else None
