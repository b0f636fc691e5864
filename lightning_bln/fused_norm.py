"""The equation on an array by the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

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
)
from lightning_bln.kernels.library import bits_of
from lightning_bln.kernels.planes import PlanesSettings, has_planes, planes, planes_in_modes
from lightning_bln.modes import StatisticsMode


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
) -> tuple[Tensor, Statistics | None]:
    """:func:`~lightning_bln.equation.normalize_by` on the fused kernels.

    Args:
        x: ``(m, *positions, d)``, or ``(modes, m, *positions, d)``.
        equation: Parameters and mixing weights.
        source: A population, and which of its statistics to use.
        over: The batch axis, or all axes but the features'.
        observes: Whether to return the statistics.
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
        y, seen = planes(inputs, constants, PlanesSettings(keeps, uses, int(is_shared), *numbers))
        y = y.view(x.shape)
    else:
        y, seen = dense(inputs, constants, DenseSettings(keeps, uses, *numbers))
        y = in_layout_of(x, y.view(x.shape))
    if observes:
        assert seen is not None
        seen = observation(seen, equation, (1,) if is_shared else tuple(x.shape[1:-1]), x)
    return y, seen if observes else None
