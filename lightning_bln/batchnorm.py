"""torch's batch norms as layers with a population: their running statistics, computed over batches at fixed weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bln._scoped import setting
from lightning_bln._torch import BatchNorm
from lightning_bln.equation import mean_and_var, widen
from lightning_bln.population import Observed, Population


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """torch's batch norms with running statistics by name, subclasses too; none that is lazy and has seen no input."""
    found = {name: one for name, one in model.named_modules() if isinstance(one, BatchNorm)}
    return {name: one for name, one in found.items() if has_running_statistics(one)}


def has_running_statistics(norm: BatchNorm) -> bool:
    """Whether there are running statistics to compute."""
    mean, var = norm.running_mean, norm.running_var
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and not is_lazy(mean)


class RunningStatistics(Population):
    """Population of a batch norm, which gathers from its input and freezes into ``running_mean`` and ``running_var``.

    Both are those over all numbers of a channel, the variance unbiased, as torch computes it for a batch.

    Args:
        norm: The layer; it is no child of this module.
    """

    def __init__(self, norm: BatchNorm) -> None:
        mean = norm.running_mean
        assert mean is not None
        dtype = torch.promote_types(mean.dtype, torch.float32)
        super().__init__(norm.num_features, device=mean.device, dtype=dtype)
        self.layer = [norm]  # in a list, which makes it no child

    def observe(self, norm: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what the layer is called with, and tell it how to normalise.

        That is by the batch itself, but by its running statistics where samples are to be told apart, and where a batch
        has one number for each channel, of which torch takes no variance.
        """
        whole = (args or tuple(kwargs.values()))[0].detach()
        x = whole.movedim(1, -1).flatten(0, -2)
        # at each call: attributes are put back before batches that run again
        norm.training, norm.track_running_stats = not self.ignores_batch and len(x) > 1, False
        if not len(x):
            return
        mean, var = mean_and_var(widen(x), (0,))
        count = torch.full((1,), len(x), device=x.device)
        nothing, one = mean.new_zeros(1), mean.new_ones(1)
        size = torch.full((1,), len(whole), device=x.device)
        self.gather(Observed(mean, var, nothing, one, count, size))

    def _assign_frozen(self, values: list[Tensor]) -> None:
        (norm,) = self.layer
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(values[0][0])
        norm.running_var.copy_(values[1][0])

    def broadcast_frozen(self) -> None:
        """Take over the running statistics of the first rank."""
        (norm,) = self.layer
        found: list[Any] = [[getattr(norm, name).cpu() for name in ("running_mean", "running_var")]]
        torch.distributed.broadcast_object_list(found, 0)
        for name, value in zip(("running_mean", "running_var"), found[0], strict=True):
            getattr(norm, name).copy_(value)


@contextmanager
def observing(norms: Mapping[str, BatchNorm]) -> Iterator[dict[str, RunningStatistics]]:
    """Context in which batch norms gather statistics of their inputs, and keep their own; a population by each name."""
    found = {name: RunningStatistics(norm) for name, norm in norms.items()}
    with ExitStack() as stack:
        for population in found.values():
            (norm,) = population.layer
            stack.enter_context(setting([norm], track_running_stats=False))
            stack.enter_context(norm.register_forward_pre_hook(population.observe, prepend=True, with_kwargs=True))
        yield found
