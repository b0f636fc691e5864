"""The equation on an array by the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln.equation import Equation, Source, Statistics, mixing_rows, observation
from lightning_bln.kernels.batch_layer_norm import (
    DenseConstants,
    DenseInputs,
    DenseSettings,
    dense,
    dense_in_modes,
    has_adjacent_features,
    statistics_of,
)
from lightning_bln.kernels.library import bits_of
from lightning_bln.kernels.planes import PlanesSettings, has_planes, planes, planes_in_modes, statistics_of_planes
from lightning_bln.merging import merge
from lightning_bln.modes import StatisticsMode
from lightning_bln.population import Population


class Seen(NamedTuple):
    """A training batch as the kernels saw it."""

    moments: Tensor
    positions: tuple[int, ...]
    rows: int
    """How many rows of features each position's statistics are taken over."""
    is_planar: bool
    equation: Equation
    x: Tensor

    def merge_into(self, population: Population) -> bool:
        """Let a population take it in by one call of the kernels; return False where torch operations have to."""
        places, has_batch, has_feature = math.prod(self.positions), self.equation.w_batch, self.equation.w_feature
        if self.is_planar and places > 1:
            return False
        sizes = places, 1, self.x.shape[-1], self.rows, self.x.shape[0]
        halves = int(has_batch is not None), int(has_feature is not None)
        return merge(population, self.moments, self.positions, (*sizes, *halves))

    def statistics(self) -> Statistics:
        """Its statistics as :func:`~lightning_bln.equation.observation` gives them."""
        read = statistics_of_planes if self.is_planar else statistics_of
        found = read(self.moments, math.prod(self.positions), self.rows, self.x.shape[-1])
        return observation(found, self.equation, self.positions, self.x)


def in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """``y`` with its numbers in memory as those of ``x`` are: an image that came channels first leaves so."""
    return y if has_adjacent_features(x) else torch.empty_like(x).copy_(y)


def normalize_fused(
    x: Tensor,
    equation: Equation,
    source: Source,
    over: tuple[int, ...],
    observes: bool,
    modes: Sequence[StatisticsMode] | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Seen | None]:
    """:func:`~lightning_bln.equation.normalize_by` on the fused kernels.

    Args:
        x: ``(m, *positions, d)``, or ``(modes, m, *positions, d)``.
        equation: Parameters and mixing weights.
        source: A population, and which of its statistics to use.
        over: The batch axis, or all axes but the features'.
        observes: Whether to return what the batch's statistics are read from.
        modes: The statistics mode of each group of samples, without gradients.
        rows: The mixing weights as kernels read them, where they are known.
    """
    batch_axis, is_shared = over[0], over[-1] == x.ndim - 2
    is_planar = has_planes(x, batch_axis + 1)
    is_one = is_shared and not is_planar  # position, at which the batch is all that there are
    flat = x.flatten(batch_axis, -2).unsqueeze(-2) if is_one else x.flatten(batch_axis + 1, -2)
    if rows is None:
        rows = mixing_rows(equation.w_feature, equation.w_batch, 1 if is_shared else flat.shape[-2])
    inputs = DenseInputs(flat, equation.weight, equation.bias)
    constants, numbers = DenseConstants(rows, source.flat(x.dtype)), (equation.scale, equation.eps)
    if modes is not None:
        each = [bits_of(mode.uses_population) for mode in modes]
        if is_planar:
            y = planes_in_modes(inputs, constants, PlanesSettings(0, 0, int(is_shared), *numbers), each)
            return y.view(x.shape), None
        y = dense_in_modes(inputs, constants, DenseSettings(0, 0, *numbers), each)
        return in_layout_of(x, y.view(x.shape)), None
    keeps = int(observes or (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in inputs)))
    uses = bits_of(source.uses)
    if is_planar:
        y, moments = planes(inputs, constants, PlanesSettings(keeps, uses, int(is_shared), *numbers))
        y = y.view(x.shape)
    else:
        y, moments = dense(inputs, constants, DenseSettings(keeps, uses, *numbers))
        y = in_layout_of(x, y.view(x.shape))
    if not observes:
        return y, None
    positions = (1,) if is_shared else tuple(x.shape[1:-1])
    rows_of_each = math.prod(x.shape[:-1]) // math.prod(positions)
    return y, Seen(moments.detach(), positions, rows_of_each, is_planar, equation, x)
