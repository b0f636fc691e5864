"""Dropout and zoneout of a recurrent layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell


class Regularization(NamedTuple):
    """Dropout in and around the recurrence, each a probability."""

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    training: bool = False

    def mask(self, like: Tensor, probability: float) -> Tensor | None:
        """Factors that drop some of a tensor, alike at every step, and scale up the rest; ``None`` if nothing drops."""
        return F.dropout(torch.ones_like(like), probability) if self.training and probability else None

    def kept(self, cell: Cell, state: tuple[Tensor, ...], steps: int) -> dict[str, Tensor] | None:
        """Whether units of each state keep their value at each step, ``(T, ..., B, size)``, drawn in training.

        ``None`` in evaluation, where they keep their share of it, and without zoneout.
        """
        if not (self.training and self.zoneout):
            return None
        zoned = cell.states if cell.zoned is None else cell.zoned
        return {
            name: torch.rand((steps, *value.shape), device=value.device) < self.zoneout
            for name, value in zip(cell.states, state, strict=True)
            if name in zoned
        }
