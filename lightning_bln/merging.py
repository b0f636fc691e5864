"""Moments of a training batch, as the kernels leave them, merged into a population by one call of the kernels."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor

from lightning_bln._torch import own_buffers
from lightning_bln._writing import one_at_a_time
from lightning_bln.kernels.gate import admit
from lightning_bln.kernels.library import GatherArgs, call, is_built, pointer
from lightning_bln.moments import Moments
from lightning_bln.population import Population


def merge(
    population: Population,
    moments: Tensor,
    positions: tuple[int, ...],
    sizes: tuple[int, ...],
    batch_sizes: Tensor | None = None,
) -> bool:
    """Let a population take in a batch; return False, and do nothing, where torch operations have to.

    Args:
        population: It merges into its own buffers, or into new ones for the first batch.
        moments: Means and variances of the batch, then those of the features, flat, as :class:`GatherArgs` has them.
        positions: Their shape.
        sizes: The first fields of :class:`GatherArgs`: sizes, and which halves there are.
        batch_sizes: Samples at each step, where these differ.
    """
    with one_at_a_time():
        if not can_merge(population, moments, positions):
            return False
        if not population.takes_batch:
            return True
        width, dtype = population.num_features, moments.dtype
        before = Moments(*map(own_buffers(population).__getitem__, Moments._fields))  # type: ignore[arg-type]
        places = tuple(before.count.shape)
        shapes = places, (*places, width + 3), (*places, width + 3)
        names, dtypes = map("population.{}".format, Moments._fields), (torch.int64, dtype, dtype)
        old = Moments(*map(admit, names, before, shapes, dtypes))  # type: ignore[arg-type]
        is_own = places == positions and all(map(is_, old, before))
        empty, size = old.mean.new_empty, (*positions, width + 3)
        new = old if is_own else Moments(old.count.new_empty(positions), empty(size), empty(size))
        args = GatherArgs(*sizes, pointer(batch_sizes))
        point(args, old, new)
        merge_by(args, moments)
        if not is_own:
            population.assign(new)
    return True


def can_merge(population: Population, moments: Tensor, positions: tuple[int, ...]) -> bool:
    """Whether the kernels can merge into a population: plainly, on the CPU."""
    gathered = own_buffers(population)
    count, mean = gathered["count"], gathered["mean"]
    return (
        not torch.compiler.is_compiling()
        and population.estimator == "pooled"
        and population.momentum is None
        and not population.merge_positions
        and population.stands_for == 1
        and population.training_sizes is None
        and type(count) is Tensor
        and type(mean) is Tensor
        and moments.is_cpu
        and mean.is_cpu
        and is_built()
        and mean.dtype == moments.dtype
        and mean.shape[-1] == population.num_features + 3
        and count.shape in (positions, (0,))
    )


def point(args: GatherArgs, old: Moments, new: Moments) -> None:
    """Let ``args`` point at a population's moments."""
    args.old_count, args.old_mean, args.old_m2 = map(pointer, old)
    args.count, args.mean, args.m2 = map(pointer, new)


def merge_by(args: GatherArgs, moments: Tensor) -> None:
    """Merge a batch's moments where ``args`` point."""
    args.batch_moments = address = moments.data_ptr()
    args.feature_moments = address + args.steps * 2 * args.groups * args.width * moments.element_size()
    call("gather", args, moments.dtype)
