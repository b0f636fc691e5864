"""Batches that go through a model together, so that the statistics gathered of them are those of one large batch."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_bln._scoped import setting
from lightning_bln._torch import OutOfMemoryError, is_packed, tree_map
from lightning_bln.distributed import is_distributed, number_of_ranks
from lightning_bln.joining import flatten, join, samples_along, ways_to_join
from lightning_bln.moments import Moments
from lightning_bln.population import Population

TOLERANCE = 1e-3
"""Largest difference between moments of the same samples, relative to a feature's: recurrences amplify rounding."""
ROUNDING = 1e-5
"""The same, relative to the largest of all features."""


class Together:
    """A way to run many batches as one.

    Args:
        model: Module with layers that have a population.
        populations: Those that gather.
        run: Runs it on a batch.
        collated: Makes a batch ready to be run.
        restart: Called before batches that have been run are run again; ``None`` where states that ``run`` may carry
            cannot be given back.
    """

    def __init__(
        self,
        model: nn.Module,
        populations: Sequence[Population],
        run: Callable[[Any], Any],
        collated: Callable[[Any], Any],
        restart: Callable[[], Any] | None,
    ) -> None:
        self.populations = populations
        self.synced = [module for module in model.modules() if getattr(module, "sync_batch_stats", False)]
        self.run, self.collated, self.restart = run, collated, restart or nothing
        self.can_restart, self.joint_share, self.saw_gaps = restart is not None, 1.0, False

    def gather(self, own: list[Any], samples: int, more: Iterator[Any]) -> bool:
        """Gather the statistics of all ranks' batches together, the same on every rank.

        Args:
            own: This rank's batches; it is extended where they hold fewer samples than it seemed.
            samples: How many samples to gather.
            more: Further batches.

        Returns:
            Whether they were; if not, nothing has been gathered, and a warning said why.

        Raises:
            ValueError: No rank has a batch.
        """
        batches, self.joint_share = from_all_ranks(own)
        if not batches:
            raise ValueError("batches is empty, so there is nothing to compute a population from; pass at least one")
        if len(batches) == 1:
            self.run(self.collated(batches[0]))
            return True
        axes = self.way_to_join(batches)
        if isinstance(axes, str):
            return self.give_up(axes)
        missing = samples * len(batches) / max(sum(samples_along(one, axes) for one in batches), 1) - len(batches)
        if missing > 0:  # the first axis was not that of the samples
            own += islice(more, math.ceil(missing / number_of_ranks()))
            batches, self.joint_share = from_all_ranks(own)
        try:
            self.run_joined(batches, axes)
        except Exception as error:
            return self.give_up(f"the model takes no such batch ({error})")
        return True

    def give_up(self, reason: str) -> bool:
        """Begin again and say why batches are not joined."""
        self.begin_again()
        warnings.warn(
            f"the population is computed batch by batch, since the batches cannot go through the model together: "
            f"{reason}; samples=None does the same without a warning",
            stacklevel=6,
        )
        return False

    def way_to_join(self, batches: Sequence[Any]) -> Sequence[int] | str:
        """The batch axis of each leaf, or why there is none.

        Some batches, of different shapes if there are any, are run one by one and joined, while each sample is
        normalised by its own features alone: a layer then sees the same in both ways, or the batches do not join so.

        Raises:
            ValueError: A batch gives something else the second time.
        """
        tried, reason = different(batches, [shapes_of(self.collated(batch)) for batch in batches]), ""
        with self.setting_apart():
            if not self.repeats(tried[0]):
                if not self.can_restart:
                    raise ValueError(CARRIES)
                return "a state is carried from one to the next"
            expected = self.moments_of(tried)
            self.saw_gaps = any(not is_even(one.count) for one in expected)
            for axes in ways_to_join(batches[0]):
                try:
                    found = self.moments_of([join(tried, axes)])
                except Exception as error:
                    reason = reason or str(error)
                    continue
                if all(map(agree, expected, found)) and all(map(is_of_more, found, expected)):
                    return axes
                reason = reason or SEEN
        return reason

    def repeats(self, batch: Any) -> bool:
        """Whether a batch gives the same the second time, with the same random numbers."""
        others = random.getstate(), np.random.get_state()  # noqa: NPY002 that users draw from
        with torch.random.fork_rng(devices=devices_of(self.populations)):
            first = self.moments_of([batch], begins=False)
        random.setstate(others[0])
        np.random.set_state(others[1])  # noqa: NPY002
        return all(map(agree, first, self.moments_of([batch], begins=False)))

    def moments_of(self, batches: Sequence[Any], begins: bool = True) -> list[Moments]:
        """Moments that the layers gather of some batches, run from the start if ``begins``."""
        if begins:
            self.begin_again()
        for batch in batches:
            self.run(self.collated(batch))
        found = [Moments(one.count, one.mean, one.m2) for one in self.populations]
        self.begin_again(restarts=begins)
        return found

    def run_joined(self, batches: Sequence[Any], axes: Sequence[int]) -> None:
        """Run all batches as one, or if memory is short as few as it takes."""
        parts, sizes = 1, None  # sizes are measured where a run has shown gaps
        while True:
            try:
                for part in split(batches, parts):
                    with self.standing_for(len(part), sizes):
                        self.run(self.collated(join(part, axes)))
            except (OutOfMemoryError, MemoryError):
                failed = True
            else:
                failed = False
            if not any_rank(failed):
                if sizes is not None or not self.has_gaps():
                    return
                sizes = self.training_sizes(batches)
                continue
            if parts >= len(batches):
                raise MemoryError("a single batch does not fit into memory")
            self.begin_again()
            parts = min(2 * parts, len(batches))

    def has_gaps(self) -> bool:
        """Whether not all samples had data at all positions, so that batches of training may differ in that, too."""
        return self.saw_gaps or not all(is_even(one.count) for one in self.populations)

    def training_sizes(self, batches: Sequence[Any]) -> list[Tensor]:
        """Batch sizes of training at each population's positions: those of the batches run one by one."""
        with self.setting_apart():
            return [1.0 / one.mean[..., -1] for one in self.moments_of(batches)]

    def setting_apart(self) -> AbstractContextManager[None]:
        """Context in which samples are normalised apart, and steps are told apart."""
        return setting(self.populations, ignores_batch=True, estimator="pooled", merge_positions=False)

    @contextmanager
    def standing_for(self, batches: int, sizes: list[Tensor] | None) -> Iterator[None]:
        """Context in which a batch stands for this many, and layers that take those of all ranks have them all."""
        apart = [one for one in self.populations if not one.is_joint]
        joint = [one for one in self.populations if one.is_joint]
        with (
            setting(self.synced, sync_batch_stats=False),
            setting(apart, stands_for=batches),
            setting(joint, stands_for=batches * self.joint_share),
            ExitStack() as stack,
        ):
            for population, size in zip(self.populations, sizes or (), strict=sizes is not None):
                if size.numel() and not population.is_joint:
                    stack.enter_context(setting([population], training_sizes=size))
            yield

    def begin_again(self, restarts: bool = True) -> None:
        """Forget what was gathered, and states that were carried."""
        for population in self.populations:
            population.reset()
        if restarts:
            self.restart()


SEEN = (
    "a layer would see other numbers than in single batches, as where padding is not masked, or something is computed "
    "over the batch or drawn at random"
)
CARRIES = (
    "predict gives something else when a batch comes the second time, so it carries a state from batch to batch; pass "
    "samples=None and a fresh state, and it is called once for each batch, in order"
)


def nothing() -> None:
    """Restart what has no state."""


def devices_of(populations: Sequence[Population]) -> list[int]:
    """GPUs whose random numbers a model may draw."""
    return sorted({one.mean.device.index or 0 for one in populations if one.mean.device.type == "cuda"})


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


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors in a batch, packed data among them."""
    leaves = (leaf.data if is_packed(leaf) else leaf for leaf in flatten(batch)[0])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def shapes_of(batch: Any) -> list[tuple[int, ...]]:
    """Shapes of the tensors in a batch."""
    return [tuple(leaf.shape) for leaf in tensors_of(batch)]


def different(batches: Sequence[Any], shapes: Sequence[list[tuple[int, ...]]]) -> list[Any]:
    """The first two batches, and of each axis of each tensor one of another size than the first one's, if there is."""
    chosen = {0: None, 1: None}
    for leaf, shape in enumerate(shapes[0]):
        for axis, size in enumerate(shape):
            sizes = ((index, one[leaf]) for index, one in enumerate(shapes) if len(one) > leaf)
            other = next((index for index, one in sizes if len(one) > axis and one[axis] != size), None)
            if other is not None:
                chosen[other] = None
    return [batches[index] for index in chosen]


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
    if not a.count.numel():
        return True
    means, deviations = (a.mean, b.mean), (a.var(0).sqrt(), b.var(0).sqrt())
    sizes = torch.stack([one.abs().flatten(0, -2).amax(0) for one in (*means, *deviations)]).amax(0)
    scale = TOLERANCE * sizes + ROUNDING * sizes.max()
    pairs = (means, slice(-1)), (deviations, slice(-3))
    return all(bool(((x - y).abs() <= scale)[..., cut].all()) for (x, y), cut in pairs)


def is_even(count: Tensor) -> bool:
    """Whether all positions have as many samples."""
    return not count.numel() or bool((count == count[0]).all())


def is_of_more(joint: Moments, apart: Moments) -> bool:
    """Whether a joint batch has more samples at some position, and is not one batch after the other in time."""
    inverse_sizes = [one.mean[..., -1] for one in (joint, apart)]
    return not joint.count.numel() or bool((inverse_sizes[0] < inverse_sizes[1]).any())
