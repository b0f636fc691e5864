"""Statistics of a fused recurrence on their way into a population, merged by one call of the fused kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bln.equation import Statistics, is_zero, observation
from lightning_bln.kernels.library import GatherArgs, load, pointer
from lightning_bln.moments import Moments
from lightning_bln.population import Population
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm


def gather(module: GateNorm, norm: SequenceNorm, moments: Tensor, running: Sequence[int]) -> None:
    """Let a norm's population take in the moments that the operator wrote of a training sequence.

    Args:
        module: The norm.
        norm: The same for the steps of this sequence.
        moments: Batch means and variances ``(T, 2, G', H')``, then those of the features ``(T, 2, G', B)``, flat.
        running: Running sequences at each step, longest first.
    """
    if can_merge(module.population, moments, (len(running), norm.groups)):
        merge_fused(module.population, norm, moments, running)
    else:
        module.gather_steps(observed(moments, norm, running), running)


def can_merge(population: Population, moments: Tensor, positions: tuple[int, ...]) -> bool:
    """Whether the fused kernels can merge into a population: plainly, on the CPU."""
    return (
        not torch.compiler.is_compiling()
        and population.estimator == "pooled"
        and population.momentum is None
        and not population.merge_positions
        and population.mean.dtype == moments.dtype
        and population.mean.device.type == "cpu"
        and population.count.shape in (positions, (0,))
    )


def merge_fused(population: Population, norm: SequenceNorm, moments: Tensor, running: Sequence[int]) -> None:
    """Merge into new buffers, since a snapshot may hold those before."""
    equation, width, steps, samples = norm.equation, population.num_features, len(running), running[0]
    count = torch.empty(steps, norm.groups, dtype=torch.long)
    mean, m2 = (moments.new_empty(steps, norm.groups, width + 3) for _ in range(2))
    batch_sizes = None if running[-1] == samples else torch.tensor(running)
    old = population.count.contiguous(), population.mean.contiguous(), population.m2.contiguous()
    args = GatherArgs(
        steps, norm.groups, width, samples, int(not is_zero(equation.w_batch)), int(not is_zero(equation.w_feature)),
        pointer(batch_sizes), pointer(moments),
        moments.data_ptr() + steps * 2 * norm.groups * width * moments.element_size(),
        pointer(old[0]), pointer(old[1]), pointer(old[2]), pointer(count), pointer(mean), pointer(m2),
    )  # fmt: skip
    library = load()
    assert library is not None
    merge = library.bln_gather_float if moments.dtype == torch.float32 else library.bln_gather_double
    merge(ctypes.byref(args))
    population.assign(Moments(count, mean, m2))


def observed(moments: Tensor, norm: SequenceNorm, running: Sequence[int]) -> Statistics:
    """The moments as :func:`~lightning_bln.equation.observation` gives them, time first."""
    steps, samples = len(running), running[0]
    split = moments.numel() - steps * 2 * norm.groups * samples
    batch = moments[:split].view(steps, 2, norm.groups, -1)
    feature = moments[split:].view(steps, 2, norm.groups, samples)
    mean = feature.mean(-1)
    if running[-1] != samples:
        mean = feature.sum(-1) / torch.tensor(running, dtype=feature.dtype)[:, None, None]
    found = Statistics(*batch.unbind(1), *mean.unbind(1))
    return observation(found, norm.equation, (steps, norm.groups), batch)
