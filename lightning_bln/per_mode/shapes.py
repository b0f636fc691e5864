"""Functions that change a shape, or join several tensors, on the stack of all modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln.per_mode.rules import Args, Kwargs, register, shifted, wrapped
from lightning_bln.per_mode.tensor import RULES, PerMode, holds


def shape_of(args: Args) -> tuple[int, ...] | None:
    """Sizes or axes given one by one or as a tuple; None where they are no integers."""
    given = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return tuple(given) if all(isinstance(one, int) and not isinstance(one, bool) for one in given) else None


def is_stack(value: Any, kwargs: Kwargs) -> bool:
    """Whether ``value`` is a stack, so that a view of it is one of all parts, and all else is given by position."""
    return isinstance(value, PerMode) and value.stack is not None and not kwargs


def reshaped(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``reshape`` and ``view``: a view of the stack wherever one of a part is."""
    first, shape = args[0], shape_of(args)
    if not is_stack(first, kwargs) or not shape:
        return NotImplemented
    shape = (first.modes, *shape)
    try:
        return PerMode.of_stack(first.stack.view(shape))
    except RuntimeError:
        if func is Tensor.view:
            raise
        return PerMode.of_stack(first.stack.reshape(shape))


def flattened(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``flatten``."""
    first, rest = (
        args[0],
        {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), args[1:], strict=False))},
    )
    if not is_stack(first, {}) or not first.ndim:
        return NotImplemented
    rest |= kwargs
    try:
        return PerMode.of_stack(torch.flatten(first.stack, *(shifted(rest[name], first.ndim) for name in rest)))
    except (TypeError, IndexError):
        return NotImplemented


def permuted(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``permute``."""
    first, order = args[0], shape_of(args) if len(args) > 1 else None
    if not is_stack(first, kwargs) or order is None or len(order) != first.ndim:
        return NotImplemented
    return PerMode.of_stack(first.stack.permute(0, *shifted(order, first.ndim)))


def squeezed(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``squeeze`` of one axis, or of all of length 1."""
    first = args[0]
    if not is_stack(first, kwargs) or len(args) > 2:
        return NotImplemented
    if not first.ndim:
        return PerMode.of_stack(first.stack.view_as(first.stack)) if len(args) == 1 else NotImplemented
    try:
        over = shifted(args[1] if len(args) == 2 else tuple(range(first.ndim)), first.ndim)
    except (TypeError, IndexError):
        return NotImplemented
    return PerMode.of_stack(first.stack.squeeze(over))


def expanded(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``expand`` and ``repeat``."""
    first, sizes = args[0], shape_of(args)
    if not is_stack(first, kwargs) or not sizes or len(sizes) < first.ndim:
        return NotImplemented
    return PerMode.of_stack(func(first.stacked(len(sizes)), (-1 if func is Tensor.expand else 1, *sizes)))


def indexed(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``x[...]`` by numbers, slices, new axes, and one tensor that all modes have."""
    first, index = args[0], args[1]
    index = index if isinstance(index, tuple) else (index,)
    tensors = [one for one in index if isinstance(one, Tensor)]
    is_basic = all(one is None or one is ... or isinstance(one, (int, slice, Tensor)) for one in index)
    if not is_stack(first, kwargs) or not is_basic or holds(index) or len(tensors) > 1:
        return NotImplemented
    if tensors and any(type(one) is int for one in index):
        return NotImplemented  # numbers are indices of the same kind beside a tensor
    if any(
        isinstance(one, slice) and not all(isinstance(end, (int, type(None))) for end in ends(one)) for one in index
    ):
        return NotImplemented
    return PerMode.of_stack(first.stack[(slice(None), *index)])


def ends(one: slice) -> tuple[Any, Any, Any]:
    return one.start, one.stop, one.step


def combined(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``cat`` and ``stack``."""
    tensors = args[0] if args else kwargs.get("tensors", ())
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    shapes = {one.ndim for one in tensors}
    if kwargs.keys() - {"dim", "tensors"} or len(shapes) != 1 or len({one.dtype for one in tensors}) != 1:
        return NotImplemented
    (ndim,) = shapes
    size = next(one.modes for one in tensors if isinstance(one, PerMode))
    if func in (torch.cat, torch.concat) and not ndim:
        return NotImplemented
    try:
        dim = shifted(dim, ndim + (func is torch.stack))
    except (TypeError, IndexError):
        return NotImplemented
    stacks = [one.stacked() if isinstance(one, PerMode) else one.expand(size, *one.shape) for one in tensors]
    return wrapped(func(stacks, dim))


def turned(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``x.mT``, and ``x.T`` of two axes."""
    first = args[0]
    if not is_stack(first, {}) or first.ndim < 2 or (func == TRANSPOSED and first.ndim != 2):
        return NotImplemented
    return PerMode.of_stack(first.stack.mT)


TRANSPOSED = Tensor.T.__get__  # type: ignore[attr-defined]
RULES[TRANSPOSED] = RULES[Tensor.mT.__get__] = turned  # type: ignore[attr-defined]
register("t", turned, Tensor, torch)
register("reshape view", reshaped, Tensor, torch)
register("flatten", flattened, Tensor, torch)
register("permute", permuted, Tensor, torch)
register("squeeze", squeezed, Tensor, torch)
register("expand repeat", expanded, Tensor)
register("__getitem__", indexed, Tensor)
register("cat concat stack", combined, torch)
