"""Statistics of a fused recurrence on their way into a population, merged by one call of the fused kernels."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor

from lightning_bln._torch import own_buffers
from lightning_bln._writing import one_at_a_time
from lightning_bln.equation import Statistics, observation
from lightning_bln.kernels.gate import admit
from lightning_bln.kernels.library import GatherArgs, call, pointer
from lightning_bln.moments import Moments
from lightning_bln.population import Population
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm
from lightning_bln.recurrence.sequences import Running


def gather(module: GateNorm, norm: SequenceNorm, moments: Tensor, running: Running) -> None:
    """Let a norm's population take in the moments that the operator wrote of a training batch.

    Args:
        module: The norm.
        norm: The same for the steps of this batch.
        moments: Batch means and variances ``(T, 2, G', H')``, then those of the features ``(T, 2, G', B)``, flat.
        running: Running sequences at each step.
    """
    with one_at_a_time():
        if not running.start and can_merge(module.population, moments, (running.steps, norm.groups)):
            merge_fused(module.population, norm, moments, running)
        else:
            module.gather_steps(observed(moments, norm, running), running)


def can_merge(population: Population, moments: Tensor, positions: tuple[int, ...]) -> bool:
    """Whether the fused kernels can merge into a population: plainly, on the CPU."""
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
        and mean.dtype == moments.dtype
        and mean.shape[-1] == population.num_features + 3
        and count.shape in (positions, (0,))
    )


def merge_fused(population: Population, norm: SequenceNorm, moments: Tensor, running: Running) -> None:
    """Merge into the population's own buffers, or into new ones for the first batch."""
    if not population.takes_batch:
        return
    width, dtype = population.num_features, moments.dtype
    (steps, _, sizes, _), groups = running, norm.groups
    batch_sizes = None if sizes is None else torch.tensor(sizes, device="cpu")
    before = Moments(*map(own_buffers(population).__getitem__, Moments._fields))  # type: ignore[arg-type]
    places = tuple(before.count.shape)
    shapes = places, (*places, width + 3), (*places, width + 3)
    names, dtypes = map("population.{}".format, Moments._fields), (torch.int64, dtype, dtype)
    old = Moments(*map(admit, names, before, shapes, dtypes))  # type: ignore[arg-type]
    is_own = places == (steps, groups) and all(map(is_, old, before))
    size = (steps, groups, width + 3)
    new = old if is_own else Moments(old.count.new_empty(size[:2]), old.mean.new_empty(size), old.m2.new_empty(size))
    args = gather_arguments(norm, width, running, old, new)
    args.batch_sizes = pointer(batch_sizes)
    merge(args, moments)
    if not is_own:
        population.assign(new)


def gather_arguments(norm: SequenceNorm, width: int, running: Running, old: Moments, new: Moments) -> GatherArgs:
    """The library's structure for a population's moments, old and new, without those of a batch."""
    equation, (steps, samples, _, _), groups = norm.equation, running, norm.groups
    has_batch, has_feature = int(equation.w_batch is not None), int(equation.w_feature is not None)
    args = GatherArgs(steps, groups, width, samples, has_batch, has_feature)
    args.old_count, args.old_mean, args.old_m2 = map(pointer, old)
    args.count, args.mean, args.m2 = map(pointer, new)
    return args


def merge(args: GatherArgs, moments: Tensor) -> None:
    """Merge a batch's moments."""
    args.batch_moments = address = moments.data_ptr()
    args.feature_moments = address + args.steps * 2 * args.groups * args.width * moments.element_size()
    call("gather", args, moments.dtype)


def observed(moments: Tensor, norm: SequenceNorm, running: Running) -> Statistics:
    """The moments as :func:`~lightning_bln.equation.observation` gives them, time first."""
    steps, samples, *_ = running
    batch, feature = moments.tensor_split([moments.numel() - steps * 2 * norm.groups * samples])
    batch, feature = batch.view(steps, 2, norm.groups, -1), feature.view(steps, 2, norm.groups, samples)
    counts = running.counts(moments.device)
    mean = feature.mean(-1)
    if isinstance(counts, Tensor):
        mean = feature.sum(-1) / counts[..., None].to(feature.dtype)
    found = Statistics(*batch.unbind(1), *mean.unbind(1))
    return observation(found, norm.equation, (steps, norm.groups), batch)
