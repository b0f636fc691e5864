"""Statistics of a batch that several processes hold parts of, with exact gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_bln.equation import feature_statistics, widen


class JointBatch(NamedTuple):
    """Statistics over the parts of all ranks: at this rank's positions for use, at all positions for a population.

    ``P`` stands for the leading positions: those of this rank's input in ``mean`` and ``var``, the longest rank's else.
    """

    mean: Tensor
    """``(1, *positions, d)``, or for shared positions one of each feature; gradients flow to every rank's input."""
    var: Tensor
    batch_size: Tensor | float
    """Samples at each of this rank's positions, ``(*positions, 1)``; a number where positions are shared."""
    batch_mean: Tensor
    """``(P, ..., d)``, without gradient, as the next five."""
    batch_var: Tensor
    feature_mean: Tensor
    """``(P, ...)``: the mean over the samples of all ranks."""
    feature_var: Tensor
    seen: Tensor
    sizes: Tensor


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; a rank's gradient is the sum of what all ranks' losses ask for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of ``x`` over all ranks, on each; gradients flow back to every rank."""
    return _AllReduce.apply(x)


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def joint_batch(x: Tensor, shared: bool, takes_part: bool = True) -> JointBatch:
    """Statistics of the batch that is ``x`` on all ranks together; each rank must call this equally often.

    Args:
        x: This rank's part, ``(m, *positions, d)``; ``m`` and the first position axis may differ between ranks.
        shared: Whether statistics are taken over positions too.
        takes_part: Whether this rank's part counts; one that has run out of data still has to call.

    Raises:
        ValueError: Other axes than those differ between ranks.
    """
    x = widen(x)
    own = torch.tensor([len(x) if takes_part else 0, *x.shape[1:]], device=x.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    shapes = [one.tolist() for one in every]
    if not shared and any(shape[2:] != shapes[0][2:] for shape in shapes):
        raise ValueError(
            f"sync_batch_stats=True, but the ranks' inputs have {[tuple(shape[1:]) for shape in shapes]} positions and "
            "features, and only the first position axis may differ; use positions='shared' for inputs of any size"
        )
    weight = 1.0 if takes_part else 0.0
    local = x.detach()
    features = torch.stack([one.squeeze(-1) for one in feature_statistics(local)], -1)
    if shared:
        samples = sum(shape[0] for shape in shapes)
        seen = sum(torch.Size(shape[:-1]).numel() for shape in shapes)
        over = tuple(range(x.ndim - 1))
        mean = all_reduce_sum(x.sum(over) * weight) / seen
        var = all_reduce_sum((x - mean).square().sum(over) * weight) / seen
        means = all_reduce_sum(features.sum(over) * weight) / seen
        feature_mean, feature_var = means[None].unbind(-1)
        return JointBatch(
            mean=mean.expand([1] * (x.ndim - 1) + [-1]),
            var=var.expand([1] * (x.ndim - 1) + [-1]),
            batch_size=samples,
            batch_mean=mean.detach()[None],
            batch_var=var.detach()[None],
            feature_mean=feature_mean,
            feature_var=feature_var,
            seen=torch.full((1,), seen, device=x.device),
            sizes=torch.full((1,), samples, device=x.device),
        )
    places = tuple(x.shape[1:-1])
    longest = max(shape[1] for shape in shapes)
    sizes = torch.zeros(longest, *places[1:], dtype=torch.long, device=x.device)
    for shape in shapes:
        sizes[: shape[1]] += shape[0]
    count = sizes[..., None].to(x.dtype)

    def total(one: Tensor) -> Tensor:
        return all_reduce_sum(nn.functional.pad(one * weight, [0, 0] * (one.ndim - 1) + [0, longest - len(one)]))

    mean = total(x.sum(0)) / count
    here = slice(0, places[0])
    var = total((x - mean[here]).square().sum(0)) / count
    feature_mean, feature_var = (total(features.sum(0)) / count).unbind(-1)
    return JointBatch(
        mean=mean[here][None],
        var=var[here][None],
        batch_size=sizes[here][..., None].to(x.dtype),
        batch_mean=mean.detach(),
        batch_var=var.detach(),
        feature_mean=feature_mean,
        feature_var=feature_var,
        seen=sizes,
        sizes=sizes,
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of ``model`` lie in parts on several ranks (FSDP), so that no rank can run it alone."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    # torch 2.3 has the second kind as a prototype named FSDP, as anybody may have named a module
    return any(
        base.__name__ in ("FullyShardedDataParallel", "FSDPModule")
        or (base.__name__ == "FSDP" and base.__module__.startswith("torch.distributed."))
        for base in bases
    )


def in_step(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """``batches``; where ranks must run ``model`` together, as many on each rank as the longest has.

    They must where its weights are sharded, or its layers take statistics over ranks. A rank that has run out gets its
    last batch again, which then does not count.

    Raises:
        ValueError: A rank has no batch at all; raised on every rank.
    """
    synced = any(getattr(layer, "sync_batch_stats", False) for layer in model.modules())
    if not is_distributed() or not (synced or is_sharded(model)):
        yield from batches
        return
    iterator, last, is_first = iter(batches), None, True
    device = next((one.device for one in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    while True:
        batch = next(iterator, _END)
        going = torch.tensor(0 if batch is _END else 1, device=device)
        dist.all_reduce(going)
        if is_first and going < dist.get_world_size() and going > 0:
            raise ValueError(
                "a rank has no batch to compute a population from, but layers with sync_batch_stats=True and sharded "
                "weights (FSDP) need all ranks at each; give every rank at least one"
            )
        if not going:
            return
        if batch is _END:
            with idle(model):
                yield last
        else:
            last = batch
            yield batch
        is_first = False


_END = object()


@contextmanager
def idle(model: nn.Module) -> Iterator[None]:
    """Within the context nothing of this rank's inputs is gathered, nor counts in joint statistics."""
    layers: list[Any] = []
    for layer in model.modules():
        # a joint population gathers what all ranks have seen, and this rank must see that too
        if hasattr(layer, "takes_part") and not getattr(layer, "is_joint", False):
            layers.append(layer)
    for layer in layers:
        layer.takes_part = False
    try:
        yield
    finally:
        for layer in layers:
            layer.takes_part = True
