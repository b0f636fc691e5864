"""torch's batch norms as layers with a population: their running statistics, computed over batches at fixed weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_bln._scoped import setting
from lightning_bln._torch import BatchNorm, eagerly
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
        self.is_asked, self.within = True, ExitStack()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within the context the layer gathers where the step has it in training mode, and keeps its own statistics."""
        (norm,) = self.layer
        with (
            setting([norm], training=True, track_running_stats=False),
            # behind the user's own hooks, which may change the input
            norm.register_forward_pre_hook(self.enter, with_kwargs=True),
            norm.register_forward_hook(self.leave, always_call=True),
        ):
            yield

    def enter(self, norm: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in what the layer normalises, and tell it how.

        That is what it is called with, or with a forward of its own what that gives to torch's function.
        """
        self.is_asked = norm.training
        norm.track_running_stats = False  # at each call: attributes are put back before batches that run again
        if norm.training and has_own_forward(norm):
            self.within.enter_context(Intercepting(self))
        elif norm.training:
            norm.training = self.take_in(next(iter((*args, *kwargs.values())), None))

    def leave(self, norm: BatchNorm, *_: Any) -> None:
        """Give the layer the mode back that the step has it in."""
        self.within.close()
        norm.training = self.is_asked

    def take_in(self, whole: Any) -> bool:
        """Take in an input ``(N, C, ...)``; return whether it is normalised by itself.

        It is not where samples are to be told apart, nor where it has one number for each channel, of which torch takes
        no variance: there running statistics normalise.
        """
        if not self.takes(whole):
            return False  # torch says what is wrong
        x = whole.detach()
        numbers = x.numel() // x.shape[1]  # of each channel
        if numbers:
            moments = mean_and_var(widen(x), (0, *range(2, x.ndim)))
            mean, var = (one.view(1, -1) for one in moments)
            count = torch.full((1,), numbers, device=x.device)
            nothing, one = mean.new_zeros(1), mean.new_ones(1)
            size = torch.full((1,), len(whole), device=x.device)
            self.gather(Observed(mean, var, nothing, one, count, size))
        return not self.ignores_batch and numbers > 1

    def takes(self, x: Any) -> bool:
        """Whether the layer can normalise an input."""
        return isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == self.layer[0].num_features

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


def has_own_forward(norm: BatchNorm) -> bool:
    """Whether a layer computes by other code than torch's, which may do more than to normalise its input."""
    return "forward" in vars(norm) or type(norm).forward not in (BatchNorm.forward, nn.SyncBatchNorm.forward)


PARAMETERS = tuple(signature(F.batch_norm).parameters)


class Intercepting(TorchFunctionMode):
    """Context in which :func:`torch.nn.functional.batch_norm` normalises by its input, which a population takes in.

    Args:
        population: That of the layer that calls it.
    """

    def __init__(self, population: RunningStatistics) -> None:
        super().__init__()
        self.population = population

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        (norm,) = self.population.layer
        if func is not F.batch_norm or not self.population.takes(args[0]):
            return func(*args, **given)
        given = dict(zip(PARAMETERS, args, strict=False)) | given
        if self.population.take_in(given["input"]):
            given |= {"running_mean": None, "running_var": None, "training": True}
        else:
            given |= {"running_mean": norm.running_mean, "running_var": norm.running_var, "training": False}
        return F.batch_norm(**given)


@contextmanager
def observing(norms: Mapping[str, BatchNorm]) -> Iterator[dict[str, RunningStatistics]]:
    """Context in which batch norms gather statistics of their inputs, and keep their own; a population by each name.

    It runs eagerly: graphs that were compiled before would not call a hook.
    """
    found = {name: RunningStatistics(norm) for name, norm in norms.items()}
    with ExitStack() as stack:
        stack.enter_context(eagerly() if found else nullcontext())
        for population in found.values():
            stack.enter_context(population.observing())
        yield found
