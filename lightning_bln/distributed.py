"""Statistics of a batch that several processes hold parts of, with exact gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_bln._scoped import setting
from lightning_bln.equation import feature_statistics, widen
from lightning_bln.masks import blank


class JointBatch(NamedTuple):
    """Statistics over the parts of all ranks at all positions.

    ``P`` is the longest first position axis of any rank; with shared positions there is one.
    """

    mean: Tensor
    """``(P, ..., d)``; gradients flow to every rank's input, through this and ``var``."""
    var: Tensor
    feature_mean: Tensor
    """Mean over the samples of all ranks, ``(P, ...)``."""
    feature_var: Tensor
    seen: Tensor
    """Numbers that each batch statistic is taken over, ``(P, ...)``."""
    sizes: Tensor
    """Samples, ``(P, ...)``."""
    batch_size: Tensor | float
    """Samples at each of this rank's positions, ``(*positions, 1)``; a number where these are shared without masks."""
    has_gaps: bool = False
    """Whether a rank has a mask, so that there may be positions without samples."""


class _AllReduce(torch.autograd.Function):
    """The sum over ranks, and for its gradient the sum of all ranks' gradients."""

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
    """The sum of ``x`` over all ranks, on each rank; gradients flow back to every rank."""
    return _AllReduce.apply(x)


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def number_of_ranks() -> int:
    """One, if this is the only process."""
    return dist.get_world_size() if is_distributed() else 1


def joint_batch(x: Tensor, shared: bool, takes_part: bool = True, mask: Tensor | None = None) -> JointBatch:
    """Statistics of the batch whose parts lie on all ranks; every rank must call this equally often.

    Args:
        x: This rank's part, ``(m, *positions, d)``; ``m`` and the first position axis may differ between ranks.
        shared: Whether statistics are taken over positions too.
        takes_part: Whether this rank's part counts; a rank without further data passes ``False``.
        mask: True where ``x`` holds data, ``(m, *positions)``; some ranks may have one and others not.

    Raises:
        ValueError: Other axes than those differ between ranks.
    """
    x = widen(x)
    own = torch.tensor([len(x) if takes_part else 0, *x.shape[1:], int(mask is not None)], device=x.device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    shapes, masked = [shape.tolist()[:-1] for shape in gathered], [bool(shape[-1]) for shape in gathered]
    if any(masked):
        return masked_batch(x, shared, shapes, takes_part, mask)
    if not shared and any(shape[2:] != shapes[0][2:] for shape in shapes):
        raise ValueError(
            f"sync_batch_stats=True, but the ranks' inputs have {[tuple(shape[1:]) for shape in shapes]} positions and "
            "features, and only the first position axis may differ; use positions='shared' for inputs of any size"
        )
    features = torch.stack([statistic.squeeze(-1) for statistic in feature_statistics(x.detach())], -1)
    weight = 1.0 if takes_part else 0.0
    return (over_positions if shared else at_each_position)(x, features, shapes, weight)


def masked_batch(x: Tensor, shared: bool, shapes: list[list[int]], takes_part: bool, mask: Tensor | None) -> JointBatch:
    """:func:`joint_batch` of data among padding, on some rank at least."""
    mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    if x.ndim == 2:  # no axis of positions
        x, mask, shapes = x[:, None], mask[:, None], [[shape[0], 1, shape[1]] for shape in shapes]
    if any(shape[2:] != shapes[0][2:] for shape in shapes):
        raise ValueError(
            f"sync_batch_stats=True and mask is given, but the ranks' inputs have {[tuple(one[1:]) for one in shapes]} "
            "positions and features, and only the first position axis may differ; pass inputs of one size"
        )
    x, weight, length = blank(x, mask), 1.0 if takes_part else 0.0, x.shape[1]
    missing = max(shape[1] for shape in shapes) - length
    features = torch.stack([one.squeeze(-1) for one in feature_statistics(x.detach())], -1)

    def total(part: Tensor) -> Tensor:
        part = nn.functional.pad(part.sum(0) * weight, [0, 0] * (part.ndim - 2) + [0, missing])
        part = all_reduce_sum(part)
        return part.flatten(0, -2).sum(0)[None] if shared else part

    each = all_reduce_sum(nn.functional.pad(mask.sum(0) * weight, [0, 0] * (mask.ndim - 2) + [0, missing])).long()
    seen = each.sum()[None] if shared else each
    count = seen.clamp(min=1)[..., None].to(x.dtype)
    mean = total(x) / count
    var = total(blank(x - mean[:length], mask).square()) / count
    feature_mean, feature_var = (total(blank(features, mask)) / count).unbind(-1)
    sizes = (seen / (each > 0).sum().clamp(min=1).to(x.dtype)).clamp(min=1) if shared else each.clamp(min=1)
    batch_size = each[:length].clamp(min=1)[..., None].to(x.dtype)
    return JointBatch(mean, var, feature_mean, feature_var, seen, sizes, batch_size, has_gaps=True)


def over_positions(x: Tensor, features: Tensor, shapes: list[list[int]], weight: float) -> JointBatch:
    """:func:`joint_batch` over all positions, from feature statistics ``(m, *positions, 2)`` and the parts' shapes."""
    samples = sum(shape[0] for shape in shapes)
    seen = sum(torch.Size(shape[:-1]).numel() for shape in shapes)
    over = tuple(range(x.ndim - 1))
    mean = all_reduce_sum(x.sum(over) * weight) / seen
    var = all_reduce_sum((x - mean).square().sum(over) * weight) / seen
    feature_mean, feature_var = (all_reduce_sum(features.sum(over) * weight) / seen)[None].unbind(-1)
    counts = torch.tensor([[seen], [samples]], device=x.device)
    return JointBatch(mean[None], var[None], feature_mean, feature_var, counts[0], counts[1], batch_size=samples)


def at_each_position(x: Tensor, features: Tensor, shapes: list[list[int]], weight: float) -> JointBatch:
    """:func:`joint_batch` at each position, over the ranks that reach it."""
    length, *further = x.shape[1:-1]
    longest = max(shape[1] for shape in shapes)
    sizes = torch.zeros(longest, *further, dtype=torch.long, device=x.device)
    for shape in shapes:
        sizes[: shape[1]] += shape[0]
    count = sizes[..., None].to(x.dtype)

    def total(part: Tensor) -> Tensor:
        return all_reduce_sum(nn.functional.pad(part * weight, [0, 0] * (part.ndim - 1) + [0, longest - len(part)]))

    mean = total(x.sum(0)) / count
    var = total((x - mean[:length]).square().sum(0)) / count
    feature_mean, feature_var = (total(features.sum(0)) / count).unbind(-1)
    return JointBatch(mean, var, feature_mean, feature_var, seen=sizes, sizes=sizes, batch_size=count[:length])


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of ``model`` are sharded over ranks (FSDP), so that no rank can run it alone."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    # torch 2.3 calls FSDPModule FSDP, a name that users may have given a module of their own
    return any(
        base.__name__ in ("FullyShardedDataParallel", "FSDPModule")
        or (base.__name__ == "FSDP" and base.__module__.startswith("torch.distributed."))
        for base in bases
    )


def in_step(model: nn.Module, batches: Iterable[Any], others: Iterable[nn.Module] = ()) -> Iterator[Any]:
    """Yield ``batches``, on every rank as many as the rank with most has, where ranks must run ``model`` together.

    They must if its weights are sharded or its layers take statistics over ranks. A rank that has run out repeats its
    last batch, which does not count, nor for ``others`` that gather.

    Raises:
        ValueError: Some rank has no batch, others have; raised on every rank.
    """
    synced = any(getattr(layer, "sync_batch_stats", isinstance(layer, nn.SyncBatchNorm)) for layer in model.modules())
    if not is_distributed() or not (synced or is_sharded(model)):
        yield from batches
        return
    iterator, last, is_first = iter(batches), None, True
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
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
            with idle([*model.modules(), *others]):
                yield last
        else:
            last = batch
            yield batch
        is_first = False


_END = object()


def idle(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Context in which this rank's inputs are neither gathered nor counted in joint statistics."""
    layers = [layer for layer in modules if hasattr(layer, "takes_part")]
    # a joint population gathers the batch of all ranks, and must do so on this rank too
    return setting([layer for layer in layers if not getattr(layer, "is_joint", False)], takes_part=False)
