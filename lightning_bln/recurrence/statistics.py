"""Statistics of a fused recurrence on their way into a population."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bln.equation import Statistics, observation
from lightning_bln.merging import merge
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
    sizes = None if running.sizes is None else torch.tensor(running.sizes, device="cpu")
    own = sizes_of(norm, module.population.num_features, running)
    if running.start or not merge(module.population, moments, (running.steps, norm.groups), own, sizes):
        module.gather_steps(observed(moments, norm, running), running)


def sizes_of(norm: SequenceNorm, width: int, running: Running) -> tuple[int, ...]:
    """Sizes of a batch's moments and which halves there are, as :func:`~lightning_bln.merging.merge` takes them."""
    has_batch, has_feature = int(norm.equation.w_batch is not None), int(norm.equation.w_feature is not None)
    return running.steps, norm.groups, width, running.samples, 0, has_batch, has_feature


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
