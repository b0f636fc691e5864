"""The equation on an array by the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

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
    reason_against_fused,
    statistics_of,
)
from lightning_bln.kernels.gate import serves, serves_triton
from lightning_bln.kernels.library import bits_of
from lightning_bln.kernels.planes import PlanesSettings, has_planes, planes, planes_in_modes, statistics_of_planes
from lightning_bln.kernels.triton.dense import NormConstants, NormSettings, mixing_rows_like, norm
from lightning_bln.merging import merge
from lightning_bln.modes import StatisticsMode
from lightning_bln.population import Population

BACKENDS = ("auto", "reference", "cpu", "triton")
"""Backends of norms."""


def kernels_for(backend: str, x: Tensor, tensors: Iterable[Tensor | None]) -> str | None:
    """Kernels that a norm of this backend runs on, ``"cpu"`` or ``"triton"``; ``None`` for torch operations.

    Args:
        backend: One of ``BACKENDS``.
        x: The input, features last.
        tensors: All else that the call reads.

    Raises:
        ValueError: The backend asks for kernels that cannot run.
    """
    tensors = tuple(tensors)
    if serves_triton(backend, x.dtype, (x, *tensors)):
        return "triton"
    if backend not in ("auto", "cpu"):
        return None
    if backend == "auto" and torch.compiler.is_compiling() and not has_adjacent_features(x):
        return None  # inductor fuses torch operations, and no copy
    return "cpu" if serves(backend, reason_against_fused(x, tensors)) else None


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


def has_strides_of(x: Tensor, y: Tensor) -> bool:
    """Whether ``y`` lies in memory as ``x`` of the same shape does; strides of axes of one entry are of no meaning."""
    return all(one == two or n == 1 for one, two, n in zip(x.stride(), y.stride(), x.shape, strict=True))


def normalize_fused(
    x: Tensor,
    equation: Equation,
    source: Source,
    over: tuple[int, ...],
    observes: bool,
    modes: Sequence[StatisticsMode] | None = None,
    rows: Tensor | None = None,
    kernels: str = "cpu",
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
        kernels: ``"cpu"`` or ``"triton"``.
    """
    if kernels == "triton":
        return normalize_on_triton(x, equation, source, over, observes, modes)
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
    keeps = keeps_moments(observes, inputs)
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


def normalize_on_triton(
    x: Tensor,
    equation: Equation,
    source: Source,
    over: tuple[int, ...],
    observes: bool,
    modes: Sequence[StatisticsMode] | None,
) -> tuple[Tensor, Seen | None]:
    """:func:`normalize_fused` by Triton kernels, which take any layout as it is."""
    if modes is not None:
        parts = zip(x, modes, strict=True)
        over = tuple(axis - 1 for axis in over)
        sources = [(one, source._replace(uses=mode.uses_population)) for one, mode in parts]
        return torch.stack(
            [normalize_on_triton(one, equation, own, over, False, None)[0] for one, own in sources]
        ), None
    is_shared = over[-1] == x.ndim - 2
    positions = (1,) if is_shared else tuple(x.shape[1:-1])
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    inputs = DenseInputs(flat, equation.weight, equation.bias)
    w_feature, w_batch = equation.w_feature, equation.w_batch
    given = source.flat(torch.promote_types(x.dtype, torch.float32))
    mixing = mixing_rows_like(w_feature, w_batch, math.prod(positions), x)
    halves = int(w_batch is not None) + 2 * int(w_feature is not None)
    numbers: Any = bits_of(source.uses), 1, int(is_shared), halves, equation.scale, equation.eps
    settings = NormSettings(keeps_moments(observes, inputs), *numbers)
    y, moments = norm(inputs, NormConstants(mixing, given, None), settings)
    y = y.view(x.shape)
    y = y if has_strides_of(x, y) else in_layout_of(x, y)
    if not observes:
        return y, None
    return y, Seen(moments.detach(), positions, math.prod(x.shape[:-1]) // math.prod(positions), False, equation, x)


def keeps_moments(observes: bool, inputs: Sequence[Tensor | None]) -> int:
    """Whether a call has to return moments: for a population, or for the gradient."""
    needs_grad = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    return int(observes or needs_grad)
