"""Mixing weights of norms; those that follow from a frozen population are kept until its batch size changes."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain
from lightning_bln.equation import mixing_rows
from lightning_bln.functional import parts
from lightning_bln.population import Population


class Mixing(NamedTuple):
    """Weights of the feature part and of the batch part; ``None`` for the part that a norm does not have."""

    w_feature: float | Tensor | None
    w_batch: float | Tensor | None
    rows: Tensor | None = None
    """Both at each position as kernels read them, :func:`~lightning_bln.equation.mixing_rows`, where they are known."""


class Kept(NamedTuple):
    """Mixing weights, and what they follow from."""

    key: tuple[str, float, torch.dtype]
    batch_size: Tensor
    found: Mixing


KEPT: WeakKeyDictionary[Population, Kept] = WeakKeyDictionary()


def mixing_of(population: Population, batch_size: Tensor, delta: float, norm: str) -> Mixing:
    """The mixing weights for the batch size of a frozen population, which take longer to compute than to compare."""
    if torch.compiler.is_compiling() or is_observed() or not is_plain(batch_size) or batch_size.requires_grad:
        return Mixing(*parts(batch_size, delta, norm))
    key, kept = (norm, delta, batch_size.dtype), KEPT.get(population)
    # numbers are compared, for not every way of writing them is counted
    if kept is None or kept.key != key or not torch.equal(kept.batch_size, batch_size):
        with torch.inference_mode(False), torch.no_grad():
            own = batch_size.clone()
            weights = parts(own, delta, norm)
            found = Mixing(*weights, mixing_rows(*weights, own.numel()))
        kept = KEPT[population] = Kept(key, own, found)
    return kept.found
