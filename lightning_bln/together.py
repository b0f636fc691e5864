"""Batches that go through a model together, so that the statistics gathered of them are those of one large batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_bln._scoped import setting
from lightning_bln._torch import OutOfMemoryError, tree_map
from lightning_bln.distributed import is_distributed, number_of_ranks
from lightning_bln.joining import flatten, is_unambiguous, join, ways_to_join
from lightning_bln.moments import Moments
from lightning_bln.population import Population

TOLERANCE = 1e-3
"""Largest difference between moments of the same samples, relative to the largest: recurrences amplify rounding."""


class Together:
    """A way to run many batches as one.

    Args:
        model: Module with layers that have a population, which gather.
        run: Runs it on a batch.
        restart: Called before batches that have been run are run again.
    """

    def __init__(self, model: nn.Module, run: Callable[[Any], Any], restart: Callable[[], Any]) -> None:
        self.populations = [module for module in model.modules() if isinstance(module, Population)]
        self.synced = [module for module in model.modules() if getattr(module, "sync_batch_stats", False)]
        self.run, self.restart, self.joint_share = run, restart, 1.0

    def gather(self, own: Sequence[Any]) -> bool:
        """Gather the statistics of all ranks' batches together, the same on every rank.

        Args:
            own: This rank's batches.

        Returns:
            Whether they were; if not, nothing has been gathered, and a warning said why.

        Raises:
            ValueError: No rank has a batch.
        """
        batches, self.joint_share = from_all_ranks(own)
        if not batches:
            raise ValueError("batches is empty, so there is nothing to compute a population from; pass at least one")
        try:
            axes = self.way_to_join(batches)
            self.run_joined(batches, axes)
        except Exception as error:
            if len(batches) == 1:
                raise
            self.reset()
            warnings.warn(
                f"the population is computed batch by batch, since the batches cannot go through the model together: "
                f"{error}; samples=None does the same without a warning",
                stacklevel=6,
            )
            return False
        return True

    def way_to_join(self, batches: Sequence[Any]) -> Sequence[int]:
        """The batch axis of each leaf.

        Two batches, of different shapes if there are any, are run one by one and joined, while each sample is
        normalised by its own features alone: a layer then sees the same in both ways, or the batches do not join so.
        """
        ways = list(ways_to_join(batches[0]))
        if len(batches) == 1 or is_unambiguous(batches[0]):
            return ways[0]
        pair, reasons = two_of(batches), []
        with setting(self.populations, ignores_batch=True, estimator="pooled"):
            expected = self.moments_of(pair)
            for axes in ways:
                try:
                    found = self.moments_of([join(pair, axes)])
                except Exception as error:
                    reasons.append(str(error))
                    continue
                if all(map(agree, expected, found)) and all(map(is_of_more, found, expected)):
                    return axes
                reasons.append("samples would not stay as they are")
        raise ValueError(reasons[0])

    def moments_of(self, batches: Sequence[Any]) -> list[Moments]:
        """Moments that the layers gather of some batches, run from the start."""
        self.reset()
        for batch in batches:
            self.run(batch)
        found = [Moments(one.count, one.mean, one.m2) for one in self.populations]
        self.reset()
        return found

    def run_joined(self, batches: Sequence[Any], axes: Sequence[int]) -> None:
        """Run all batches as one, or if memory is short as few as it takes."""
        parts = 1
        while True:
            try:
                for part in split(batches, parts):
                    with self.standing_for(len(part)):
                        self.run(join(part, axes))
            except (OutOfMemoryError, MemoryError):
                failed = True
            else:
                failed = False
            if not any_rank(failed):
                return
            if parts >= len(batches):
                raise MemoryError("a single batch does not fit into memory")
            self.reset()
            parts = min(2 * parts, len(batches))

    @contextmanager
    def standing_for(self, batches: int) -> Iterator[None]:
        """Context in which a batch stands for this many, and layers that take those of all ranks have them all."""
        apart = [one for one in self.populations if not one.is_joint]
        joint = [one for one in self.populations if one.is_joint]
        with (
            setting(self.synced, sync_batch_stats=False),
            setting(apart, stands_for=batches),
            setting(joint, stands_for=batches * self.joint_share),
        ):
            yield

    def reset(self) -> None:
        """Begin again."""
        for population in self.populations:
            population.reset()
        self.restart()


def from_all_ranks(own: Sequence[Any]) -> tuple[list[Any], float]:
    """The batches of all ranks in their order, on this rank's device, and how many of one rank each is.

    The latter counts where ranks normalise by one batch, of which each holds a part.
    """
    if not is_distributed():
        return list(own), 1.0
    devices = [leaf.device for batch in own for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)]
    gathered: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(gathered, tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, list(own)))
    device = devices[0] if devices else torch.device("cpu")
    every = [batch for batches in gathered for batch in batches]
    share = max(map(len, gathered)) / max(len(every), 1)
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, every), share


def any_rank(value: bool) -> bool:
    """Whether ``value`` is true on any rank."""
    if not is_distributed():
        return value
    gathered: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(gathered, value)
    return any(gathered)


def two_of(batches: Sequence[Any]) -> list[Any]:
    """The first batch, and one of other shapes if there is any."""
    shapes = [[tuple(leaf.shape) for leaf in flatten(batch)[0] if isinstance(leaf, Tensor)] for batch in batches]
    others = [batch for batch, shape in zip(batches, shapes, strict=True) if shape != shapes[0]]
    return [batches[0], others[0] if others else batches[1]]


def split(batches: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Batches in about equal parts."""
    bounds = [len(batches) * index // parts for index in range(parts + 1)]
    return [batches[start:end] for start, end in pairwise(bounds)]


def agree(a: Moments, b: Moments) -> bool:
    """Whether moments are those of the same numbers, up to rounding.

    Of the last three quantities, which a batch has one of, the means alone; of its size, nothing.
    """
    if a.count.shape != b.count.shape or not torch.equal(a.count, b.count):
        return False
    means, deviations = (a.mean, b.mean), (a.var(0).sqrt(), b.var(0).sqrt())
    scale = TOLERANCE * max(float(one.abs().max()) for one in (*means, *deviations))
    pairs = [one[..., :-1] for one in means], [one[..., :-3] for one in deviations]
    return all(bool(((x - y).abs() <= scale).all()) for x, y in pairs)


def is_of_more(joint: Moments, apart: Moments) -> bool:
    """Whether a joint batch has more samples at some position, and is not one batch after the other in time."""
    inverse_sizes = [one.mean[..., -1] for one in (joint, apart)]
    return not joint.count.numel() or bool((inverse_sizes[0] < inverse_sizes[1]).any())
