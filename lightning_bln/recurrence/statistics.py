"""What a norm's population takes in of a sequence, merged by the compiled kernels: one call in place of fifty."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bln.functional import Statistics, is_zero
from lightning_bln.kernels.library import GatherArgs, load, pointer
from lightning_bln.moments import Moments
from lightning_bln.population import Population
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm


def gather(
    module: GateNorm, norm: SequenceNorm, moments: Tensor, steps: int, samples: int, sizes: Sequence[int] | None
) -> None:
    """Let the population of ``module`` take in the moments that the operator wrote of a training sequence.

    Args:
        module: The norm.
        norm: What it was for this sequence.
        moments: Flat: ``(T, 2, G', H')`` batch means and variances, then ``(T, 2, G', B)`` of the features.
        steps: Number of steps.
        samples: Number of sequences.
        sizes: How many of them run at each step; ``None`` if all run to the end.
    """
    if takes_compiled(module.population, moments, (steps, norm.groups)):
        return gather_compiled(module.population, norm, moments, steps, samples, sizes)
    running = [samples] * steps if sizes is None else sizes
    module.gather(statistics(moments, norm, steps, samples, sizes), running)


def takes_compiled(population: Population, moments: Tensor, positions: tuple[int, ...]) -> bool:
    """Whether nothing but a plain merge is asked for."""
    return (
        not torch.compiler.is_compiling()
        and population.estimator == "pooled"
        and population.momentum is None
        and not population.merge_positions
        and population.mean.dtype == moments.dtype
        and population.mean.device.type == "cpu"
        and population.count.shape in (positions, (0,))
    )


def gather_compiled(
    population: Population, norm: SequenceNorm, moments: Tensor, steps: int, samples: int, sizes: Sequence[int] | None
) -> None:
    """Merge into new buffers: those before may be kept by someone, to go back to."""
    width = population.num_features
    count = torch.empty(steps, norm.groups, dtype=torch.long)
    mean, m2 = (moments.new_empty(steps, norm.groups, width + 3) for _ in range(2))
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    old = population.count.contiguous(), population.mean.contiguous(), population.m2.contiguous()
    args = GatherArgs(
        steps, norm.groups, width, samples, int(not is_zero(norm.w_batch)), int(not is_zero(norm.w_feature)),
        pointer(batch_sizes), pointer(moments),
        moments.data_ptr() + steps * 2 * norm.groups * width * moments.element_size(),
        pointer(old[0]), pointer(old[1]), pointer(old[2]), pointer(count), pointer(mean), pointer(m2),
    )  # fmt: skip
    library = load()
    assert library is not None
    merge = library.bln_gather_float if moments.dtype == torch.float32 else library.bln_gather_double
    merge(ctypes.byref(args))
    population._assign(Moments(count, mean, m2))


def statistics(
    moments: Tensor, norm: SequenceNorm, steps: int, samples: int, sizes: Sequence[int] | None
) -> Statistics:
    """What a norm observed, as the reference gives it; the unused half is zero and one."""
    moments = moments.detach()
    split = moments.numel() - steps * 2 * norm.groups * samples
    batch = moments[:split].view(steps, 2, norm.groups, -1)
    feature = moments[split:].view(steps, 2, norm.groups, samples)
    mean = feature.mean(-1)
    if sizes is not None:
        mean = feature.sum(-1) / torch.tensor(sizes, dtype=feature.dtype)[:, None, None]
    unused = moments.new_tensor([0.0, 1.0]).view(1, 2, 1)
    if is_zero(norm.w_batch):
        batch = unused[..., None].expand_as(batch)
    if is_zero(norm.w_feature):
        mean = unused.expand_as(mean)
    return Statistics(batch[:, 0], batch[:, 1], mean[:, 0], mean[:, 1])
