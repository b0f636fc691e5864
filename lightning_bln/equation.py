"""The equation on statistics from any source: given, of the current input, or some of each."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln._torch import is_observed
from lightning_bln.masks import blank

Uses = tuple["bool | Tensor", ...]
"""For each of the four statistics, whether it is given; a tensor answers for each group of samples by itself."""


class Statistics(NamedTuple):
    """The four statistics of the equation; ``None`` stands for the current input's own."""

    batch_mean: Tensor | None = None
    batch_var: Tensor | None = None
    feature_mean: Tensor | None = None
    feature_var: Tensor | None = None


class Source(NamedTuple):
    """Origin of the four statistics: given ones, a population's as a rule, or the current input."""

    given: Statistics
    uses: Uses

    def flat(self, dtype: torch.dtype) -> Tensor | None:
        """The given statistics one after the other, as kernels read them; ``None`` if none is used."""
        if all(use is False for use in self.uses):
            return None
        return torch.cat([value.reshape(-1) for value in self.given]).to(dtype)  # type: ignore[union-attr]

    @classmethod
    def of(cls, flat: Tensor | None, uses: int, positions: tuple[int, ...], size: int) -> Source:
        """The inverse of :meth:`flat`.

        Args:
            flat: The given statistics, ``None`` without any.
            uses: A bit for each statistic that is given, batch mean lowest.
            positions: Shape of the positions.
            size: Features of all groups at one step.
        """
        if flat is None:
            return cls(Statistics(), (False,) * 4)
        rows = math.prod(positions)
        batch, feature = flat.split([2 * positions[0] * size, 2 * rows])
        pairs = *batch.view(2, *positions, -1), *feature.view(2, *positions, 1)
        return cls(Statistics(*pairs), tuple(bool(uses >> bit & 1) for bit in range(4)))


class Equation(NamedTuple):
    """Everything in the equation besides the input and its statistics."""

    weight: Tensor | None
    bias: Tensor | None
    scale: float
    eps: float
    w_feature: float | Tensor | None
    """Weight of the feature part: a number, or one for each position; ``None`` where the norm has no such part."""
    w_batch: float | Tensor | None


def normalize_by(
    x: Tensor,
    equation: Equation,
    source: Source,
    over: tuple[int, ...],
    mask: Tensor | None = None,
    observes: bool = False,
) -> tuple[Tensor, Statistics | None]:
    """The equation on statistics from any source, in torch operations.

    Args:
        x: The input, features last.
        equation: Parameters and mixing weights.
        source: Given statistics, which broadcast against ``x``, and which of them to use. Where the uses differ between
            groups of samples, the axis before the first of ``over`` counts groups.
        over: Axes of the batch statistics.
        mask: True where ``x`` holds data, the shape of ``x`` without its feature axis. Where it is false, the output is
            some finite number.
        observes: Whether to return the statistics.

    Returns:
        The normalised input, and the statistics of each remaining position as :func:`observation` gives them.
    """
    if mask is not None:  # what is no data may be no number either, which gradients would carry on
        x = blank(x, mask)
    statistics = statistics_of(x, equation, source, over, mask)
    if mask is not None and not equation.eps:  # to divide by
        statistics = with_variance(statistics, over, mask)
    y = normalize(x, statistics, equation)
    if not observes:
        return y, None
    with torch.no_grad():
        places = tuple(size for axis, size in enumerate(x.shape[:-1]) if axis not in over) or (1,)
        batch, feature = statistics[:2], [masked_mean(value, over, mask) for value in statistics[2:]]
        return y, observation(Statistics(*batch, *feature), equation, places, x)


def normalize(x: Tensor, statistics: Statistics, equation: Equation) -> Tensor:
    """The equation of :func:`batch_layer_norm` on statistics that broadcast against ``x``, features last."""
    weight, bias, scale, eps, w_feature, w_batch = equation
    wide = widen(x)
    times, plus = (Tensor.mul_, Tensor.add_) if may_write() else (torch.mul, torch.add)
    y: Tensor | None = None
    if w_feature is not None:
        assert statistics.feature_mean is not None
        assert statistics.feature_var is not None
        factor = torch.rsqrt(statistics.feature_var + eps) * (w_feature * scale)
        y = times(wide - statistics.feature_mean, factor)
    if w_batch is not None:
        assert statistics.batch_mean is not None
        assert statistics.batch_var is not None
        factor = torch.rsqrt(statistics.batch_var + eps) * (w_batch * scale)
        part = times(wide - statistics.batch_mean, factor)
        y = part if y is None else plus(y, part)
    assert y is not None
    if weight is not None:
        y = times(y, weight)
    if bias is not None:
        y = plus(y, bias)
    return y.to(x.dtype)


def statistics_of(
    x: Tensor, equation: Equation, source: Source, over: tuple[int, ...], mask: Tensor | None = None
) -> Statistics:
    """The statistics to normalise by; those that the mixing weights leave unused are whatever is given, or ``None``."""
    fixed = [value if use is True else None for value, use in zip(source.given, source.uses, strict=True)]
    group_axis = over[0] - 1 if over else -1
    if mask is None and group_axis >= 0 and x.stride(group_axis) == 0:
        x = x.narrow(group_axis, 0, 1)  # the groups are one input, expanded
    found: list[Tensor | None] = []
    for weight, pair, current in (
        (equation.w_batch, fixed[:2], partial(batch_statistics, x, over, mask)),
        (equation.w_feature, fixed[2:], partial(feature_statistics, x)),
    ):
        if weight is not None and any(value is None for value in pair):
            pair = [own if value is None else value for value, own in zip(pair, current(), strict=True)]
        found += pair
    for index, (given, use) in enumerate(zip(source.given, source.uses, strict=True)):
        own = found[index]
        if isinstance(use, Tensor) and own is not None:
            assert given is not None
            found[index] = torch.where(use.view(-1, *[1] * (x.ndim - group_axis - 1)), given, own)
    return Statistics(*found)


def observation(statistics: Statistics, equation: Equation, places: tuple[int, ...], like: Tensor) -> Statistics:
    """Statistics of a batch as a population takes them: one for each place, zero and one where the equation uses none.

    Args:
        statistics: Batch statistics of ``(*places, d)`` numbers, feature statistics of ``(*places)``, in any shape.
        equation: Its mixing weights tell which statistics are used.
        places: Shape of the positions.
        like: A tensor with ``d`` features, of the dtype and device wanted.
    """
    is_used = [weight is not None for weight in (equation.w_batch, equation.w_feature)]
    found = []
    for index, value in enumerate(statistics):
        shape = (*places, like.shape[-1]) if index < 2 else places
        if is_used[index // 2]:
            assert value is not None
            found.append(value.detach().reshape(shape))
        else:
            found.append(like.new_full((), float(index % 2)).expand(shape))
    return Statistics(*found)


def with_variance(statistics: Statistics, over: tuple[int, ...], mask: Tensor) -> Statistics:
    """The statistics with variances of one where there is no data."""
    mask = mask[..., None]
    batch_var, feature_var = statistics.batch_var, statistics.feature_var
    if batch_var is not None:
        batch_var = torch.where(mask.any(over, keepdim=True) if over else mask, batch_var, 1.0)
    if feature_var is not None:
        feature_var = torch.where(mask, feature_var, 1.0)
    return statistics._replace(batch_var=batch_var, feature_var=feature_var)


def masked_mean(value: Tensor | None, over: tuple[int, ...], mask: Tensor | None) -> Tensor | None:
    """The mean of feature statistics, shaped as the input with one feature, over the entries where ``mask`` is true."""
    if value is None:
        return None
    value = value.detach().squeeze(-1)
    if mask is None:
        return value.mean(over)
    return value.masked_fill(~mask, 0).sum(over) / mask.sum(over).clamp(min=1)


def batch_statistics(x: Tensor, over: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the axes ``over``, kept as axes of size one; where ``mask`` is false, x is ignored.

    Example:
        >>> batch_statistics(torch.tensor([[1.0], [3.0], [99.0]]), (0,), torch.tensor([True, True, False]))
        (tensor([[2.]]), tensor([[1.]]))
    """
    x = widen(x)
    if mask is None:
        return mean_and_var(x, over)
    mask = mask[..., None]
    count = mask.sum(over, keepdim=True).clamp(min=1)
    mean = x.masked_fill(~mask, 0).sum(over, keepdim=True) / count
    var = (x - mean).masked_fill(~mask, 0).square().sum(over, keepdim=True) / count
    return mean, var


def feature_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the last axis, kept as an axis of size one."""
    return mean_and_var(widen(x), (-1,))


def mean_and_var(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, in two passes that torch vectorises; its var_mean is slower on the CPU."""
    mean = x.mean(over, keepdim=True)
    centred = x - mean
    # a second array of its size costs more than the squares
    return mean, (centred.square_() if may_write() else centred.square()).mean(over, keepdim=True)


def may_write() -> bool:
    """Whether results of an operation may be written into, since nothing else holds or sees them."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_observed())


def widen(x: Tensor) -> Tensor:
    """``x`` in float32 if its own dtype is too narrow for statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


NO_WEIGHT = 1e-300
"""Stands for a weight of zero where kernels take zero for a part that the norm does not have."""


def mixing_row(weight: float | Tensor | None, positions: int) -> Tensor:
    """A mixing weight of each position in float64, as kernels read it: ``(positions,)``."""
    if isinstance(weight, Tensor):
        row = weight.double().reshape(-1)
        return row.masked_fill(row == 0, NO_WEIGHT).expand(positions)
    return torch.full((positions,), number_of(weight), dtype=torch.float64, device="cpu")


def mixing_rows(w_feature: float | Tensor | None, w_batch: float | Tensor | None, positions: int) -> Tensor:
    """:func:`mixing_row` of both, ``(2, positions)``."""
    return torch.stack([mixing_row(w_feature, positions), mixing_row(w_batch, positions)])


def number_of(weight: float | None) -> float:
    """A mixing weight that is one number, as kernels read it."""
    return 0.0 if weight is None else weight or NO_WEIGHT


def weight_of(row: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The inverse of :func:`mixing_row`, ``(positions, 1)``."""
    return row[:, None].to(dtype) if row.any() else None
