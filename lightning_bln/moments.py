"""Mergeable moments: count, mean and sum of squared deviations."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln._torch import is_batched, is_observed


class Moments(NamedTuple):
    r"""Count, mean and :math:`M_2 = \sum (x - \bar x)^2` of the numbers seen so far, merged without cancellation.

    .. math::
        n = n_a + n_b, \quad \delta = \bar x_b - \bar x_a, \quad
        \bar x = \bar x_a + \delta \frac{n_b}{n}, \quad M_2 = M_{2,a} + M_{2,b} + \delta^2 \frac{n_a n_b}{n}

    Args:
        count: Numbers seen, integers ``(*positions)``.
        mean: Their mean, ``(*positions, k)`` for ``k`` quantities.
        m2: Sum of their squared deviations from the mean, ``(*positions, k)``.

    Example:
        >>> a, b = Moments.of(torch.tensor([[1.0], [2.0]])), Moments.of(torch.tensor([[6.0]]))
        >>> a.merge(b).mean, a.merge(b).var(correction=0)
        (tensor([3.]), tensor([4.6667]))

    Source:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """

    count: Tensor  # type: ignore[assignment]  # also the name of a method of tuple
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Moments over the first axis of ``x``, ``(samples, *positions, k)``."""
        if x.ndim < 2 or len(x) == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, but samples come first; pass (samples, *positions, k)")
        var, mean = torch.var_mean(x, 0, correction=0)
        count = torch.full(mean.shape[:-1], len(x), dtype=torch.long, device=x.device)
        return cls(count, mean, var * len(x))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of numbers together; shapes broadcast."""
        count = self.count + other.count
        share = (other.count.to(self.mean.dtype) / count.clamp(min=1))[..., None]
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + delta.square() * (self.count[..., None] * share)
        return Moments(count, self.mean + delta * share, m2)

    def merge_positions(self) -> Moments:
        """Moments pooled over the first position axis."""
        count = self.count.sum(0)
        weight = self.count[..., None].to(self.mean.dtype)
        mean = (self.mean * weight).sum(0) / count[..., None].clamp(min=1)
        m2 = (self.m2 + weight * (self.mean - mean).square()).sum(0)
        return Moments(count, mean, m2)

    def var(self, correction: int = 1) -> Tensor:
        """Variance with divisor ``count - correction``, or ``count`` where that would be zero."""
        divisor = torch.where(self.count > correction, self.count - correction, self.count.clamp(min=1))
        return self.m2 / divisor[..., None]

    def all_reduce(self) -> Moments:
        """Moments of all ranks together, bitwise equal on each; without a process group, these.

        Ranks may differ in length along the first position axis (sequences of different lengths), or be empty.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        gathered: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, tuple(part.cpu() for part in self))
        parts = [Moments(*part) for part in gathered if part[0].numel()]
        if not parts:
            return self
        longest = max(len(part.count) for part in parts)
        total = reduce(Moments.merge, (part.grown(longest) for part in parts))
        return Moments(*(part.to(self.mean.device) for part in total))

    def grown(self, length: int) -> Moments:
        """These moments with empty ones appended along the first position axis, up to ``length``."""
        missing = length - self.count.shape[0]
        if missing <= 0:
            return self
        return Moments(*(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in self))

    def moved(self, places: int) -> Moments:
        """These moments behind so many empty ones along the first position axis."""
        return Moments(*(torch.cat([part.new_zeros(places, *part.shape[1:]), part]) for part in self))


def merge_grown(a: Moments, b: Moments) -> Moments:
    """Merge moments that may differ in length along the first position axis."""
    if a.count.shape[1:] != b.count.shape[1:]:
        raise ValueError(position_mismatch(tuple(b.count.shape), tuple(a.count.shape)))
    longest = max(a.count.shape[0], b.count.shape[0])  # len() would be one number for all graphs
    return a.grown(longest).merge(b.grown(longest))


def are_of_image(positions: tuple[int, ...], channel_dim: int) -> bool:
    """Whether no axis of the positions may change its length, the features coming before several of them."""
    return len(positions) > 1 and channel_dim % (len(positions) + 2) == 1


def position_mismatch(positions: tuple[int, ...], known: tuple[int, ...], is_image: bool = False) -> str:
    """The error message for an input whose positions do not fit the population's."""
    rule = "images keep their size" if is_image else "only the first position axis may change its length"
    return (
        f"x has positions of shape {positions}, but the population has {known}, and {rule}; "
        "use positions='shared' for inputs of any size, or reset the population"
    )


def filled(values: Iterable[Tensor], defaults: Iterable[float], count: Tensor) -> list[Tensor]:
    """Values of each position, with those of others where nothing was counted.

    They are those of the last position before along the first axis, or else of the first after.

    Args:
        values: Tensors of ``(*positions)`` or ``(*positions, k)`` numbers.
        defaults: A number for each, where neither position is.
        count: Numbers seen, ``(*positions)``.

    Example:
        >>> filled([torch.tensor([0.0, 5.0, 0.0, 7.0])], [1.0], torch.tensor([0, 2, 0, 1]))
        [tensor([5., 5., 5., 7.])]
    """
    there, length = count > 0, count.shape[0]
    places = torch.arange(length, device=count.device).view(-1, *[1] * (count.ndim - 1)).expand(count.shape)
    before = torch.where(there, places, -1).cummax(0).values
    after = torch.where(there, places, length).flip(0).cummin(0).values.flip(0)
    source = torch.where(before < 0, after, before)
    is_nowhere, found = source == length, []
    for value, default in zip(values, defaults, strict=True):
        index, empty = source.clamp(max=length - 1), is_nowhere
        if value.ndim > count.ndim:
            index, empty = index[..., None].expand(value.shape), empty[..., None]
        found.append(value.gather(0, index).masked_fill(empty, default))
    return found


def check_one_batch(statistics: Iterable[Tensor]) -> None:
    """Raise RuntimeError where a transform makes many batches of the one that a layer sees."""
    if not is_observed():
        return
    is_compiling = torch.compiler.is_compiling()
    if is_compiling or any(map(is_batched, statistics)):
        what = "torch.compile traces a transform" if is_compiling else "torch.vmap runs"
        raise RuntimeError(
            f"a layer in training mode gathers one population, but {what} over its statistics; call model.eval(), or "
            "run the entries one by one"
        )
