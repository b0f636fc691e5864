"""Dropout and zoneout of a recurrent layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Regularization(NamedTuple):
    """Dropout in and around the recurrence, each a probability."""

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    training: bool = False

    def mask(self, like: Tensor, probability: float) -> Tensor | None:
        """Factors that drop some of a tensor, alike at every step, and scale up the rest; ``None`` if nothing drops."""
        return F.dropout(torch.ones_like(like), probability) if self.training and probability else None
