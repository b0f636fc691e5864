"""Masks of data among padding: checked, applied, and carried through a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def check_mask(mask: Tensor, x: Tensor, channel_dim: int = -1) -> None:
    """Raise unless ``mask`` has a bool for each vector of features of ``x``, whose batch axis is first."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}, but it must be a tensor; pass one of dtype torch.bool")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask has dtype {mask.dtype}, but it must be torch.bool, True where there is data; convert it with "
            "mask.bool()"
        )
    shape = list(x.shape)
    del shape[channel_dim]
    if list(mask.shape) != shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but the input without its feature axis, batch first, has "
            f"{tuple(shape)}; pass one bool for each of those"
        )
    if mask.device != x.device:
        raise RuntimeError(f"x is on {x.device}, but mask is on {mask.device}; move one with .to()")


def blank(x: Tensor, mask: Tensor, channel_dim: int = -1) -> Tensor:
    """``x`` with zeros at padding, which may hold NaN: neither it nor its gradients go on."""
    return x.masked_fill(~mask.unsqueeze(channel_dim), 0)


def sizes_of(mask: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
    """Samples with data at each position, no less than one, as they broadcast against the input."""
    return mask.sum(axis, keepdim=True)[..., None].clamp(min=1).to(dtype)


def counts_of(mask: Tensor, over: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Batch size and entries with data, of each position that is not among the axes ``over``.

    Over several positions the batch size is their mean: entries with data divided by positions with any.
    """
    seen = mask.sum(tuple(over))
    if len(over) < 2:
        return seen.clamp(min=1), seen
    return (seen / mask.any(0).sum().clamp(min=1).to(dtype)).clamp(min=1), seen


def convolved(
    mask: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The mask of a convolution's output, so that padded samples have as many outputs as they have by themselves.

    Along each axis the convolution would add ``padding`` zeros at both ends of a sample, so as many places under the
    kernel may be without data at either end; at all others there has to be data. With ``padding="same"`` the one place
    left is the kernel's centre, without padding all are.

    Args:
        mask: True where there is data, ``(batch, *spatial)``.
        kernel_size: Of each spatial axis, as the others.
        stride: As of the convolution.
        padding: As of the convolution, ``"same"`` or ``"valid"`` too.
        dilation: As of the convolution.

    Example:
        >>> mask = torch.tensor([[True, True, True, True, False, False]])
        >>> convolved(mask, [3], [1], "same", [1]).tolist()
        [[True, True, True, True, False, False]]
        >>> convolved(mask, [3], [1], "valid", [1]).tolist()
        [[True, True, False, False]]
    """
    for index, (size, step, spread) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        reach = spread * (size - 1)
        added = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding[index]
        mask = slid(mask, index + 1, reach - added, step)
    return mask


def slid(mask: Tensor, axis: int, reach: int, step: int) -> Tensor:
    """Windows of ``reach + 1`` entries along an axis: whether all are true; if they have fewer than one, see below.

    Padding by more than half the kernel gives outputs beyond a sample's ends. Then ``reach`` is negative, and an output
    holds data if any of the ``1 - reach`` entries up to its place does.
    """
    length, width = mask.shape[axis], abs(reach) + 1
    outputs = (length - 1 - reach) // step + 1
    before = F.pad(mask.movedim(axis, -1).long().cumsum(-1), (1, 0))
    last = torch.arange(outputs, device=mask.device) * step + max(reach, 0)
    start, end = (last + 1 - width).clamp(min=0), (last + 1).clamp(max=length)
    found = before.index_select(-1, end) - before.index_select(-1, start.clamp(max=length))
    return (found == width if reach >= 0 else found > 0).movedim(-1, axis)
