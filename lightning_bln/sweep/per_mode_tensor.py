"""A tensor of which every mode has its own: code written for one mode, run once, computes all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dis import opname
from functools import cache
from itertools import repeat
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bln._torch import tree_flatten, tree_unflatten


class NotTogether(Exception):
    """Why modes cannot go through the same code at once."""


class PerMode(Tensor):
    """A tensor of which each of several modes has its own part, all of one shape.

    What is done to it by torch's functions is done to each part, by the same operations and with the same result as if
    the modes ran one after the other. What Python gets to see, a shape, a truth value, a number, must be equal for all
    modes; where it is not, the modes have to part and :class:`NotTogether` is raised.

    Args:
        parts: The tensor of each mode.

    Raises:
        NotTogether: Shapes, types or devices differ.

    Example:
        >>> loss = PerMode([torch.tensor(1.0), torch.tensor(2.0)])
        >>> (2 * loss + 1).parts
        (tensor(3.), tensor(5.))
        >>> bool(loss > 1.5)
        Traceback (most recent call last):
            ...
        lightning_bln.sweep.per_mode_tensor.NotTogether: __bool__ gives False in one mode and True in another
    """

    stack: Tensor | None
    separate: Sequence[Tensor] | None
    journal: ClassVar[list[tuple[Tensor, Tensor]] | None] = None
    """While :func:`undoable` lasts, every part that was written into, with what it held before."""

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor]) -> PerMode:
        first = parts[0]
        shape, dtype, device = first.shape, first.dtype, first.device
        for part in parts:
            if part.shape != shape or part.dtype != dtype or part.device != device:
                raise NotTogether(
                    f"a tensor is {first.shape} {dtype} in one mode and {part.shape} {part.dtype} in another"
                )
        own = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        own.stack, own.separate = None, list(parts)
        return own

    def __init__(self, parts: Sequence[Tensor]) -> None: ...

    @classmethod
    def of_stack(cls, stack: Tensor) -> PerMode:
        """From a tensor with a first axis of modes, of which the parts are views."""
        own = Tensor._make_wrapper_subclass(cls, stack.shape[1:], dtype=stack.dtype, device=stack.device)
        own.stack, own.separate = stack, None
        return own

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tensor of each mode."""
        if self.separate is None:
            assert self.stack is not None
            self.separate = self.stack.unbind(0)
        return self.separate

    @property
    def like(self) -> Tensor:
        """The stack, or one of the parts where there is none: of the type that all parts have."""
        return self.separate[0] if self.stack is None else self.stack  # type: ignore[index]

    # What Python asks for most often, and is equal for all parts, without the way through torch's dispatch.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.like.shape if self.stack is None else self.stack.shape[1:]

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self.like.ndim - (self.stack is not None)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.like.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.like.device

    def is_floating_point(self) -> bool:
        return self.like.is_floating_point()

    def stacked(self, ndim: int) -> Tensor:
        """The parts along a first axis, with axes between so that they broadcast as tensors of ``ndim`` do."""
        stack = torch.stack(self.parts) if self.stack is None else self.stack  # type: ignore[arg-type]
        missing = ndim + 1 - stack.ndim
        return stack[(slice(None), *(None,) * missing)] if missing else stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        is_own = isinstance(first, PerMode)
        if is_own and func in COMMON:
            return func(first.parts[0], *args[1:], **kwargs)
        if func in POINTWISE and (result := at_once(func, args, kwargs)) is not None:
            return first if is_own and result is first.stack else cls.of_stack(result)
        if is_own and func in ALONG and (result := along_dimensions(func, first, args[1:], kwargs)) is not None:
            return cls.of_stack(result)
        if is_own and func in RESHAPING and (result := reshaped(func, first, args[1:], kwargs)) is not None:
            return cls.of_stack(result)
        if func is Tensor.__hash__:
            return id(first)
        if func is Tensor.__iter__:
            return iter(first.unbind(0))
        target = first if is_in_place(func) else kwargs.get("out")
        if isinstance(target, PerMode):
            if PerMode.journal is not None:
                PerMode.journal += [(part, part.clone()) for part in target.parts]
        elif target is not None:
            if target is not first or not is_augmented_assignment(sys._getframe(1)):
                raise NotTogether(f"{func.__name__} writes what differs between modes into a tensor that all have")
            func = getattr(Tensor, func.__name__.removesuffix("_"))
        size = count((*args, *kwargs.values()))
        rows = zip(*(spread(one, size) for one in args), strict=True) if args else repeat((), size)
        if any(holds(one) for one in kwargs.values()):
            columns = [spread(one, size) for one in kwargs.values()]
            named = [dict(zip(kwargs, values, strict=True)) for values in zip(*columns, strict=True)]
            results = [func(*row, **own) for row, own in zip(rows, named, strict=True)]
        else:
            results = [func(*row, **kwargs) for row in rows]
        if is_own and all(result is part for result, part in zip(results, first.parts, strict=True)):
            return first
        if func in LOSSES and isinstance(results[0], Tensor):
            return cls.of_stack(torch.stack(results))
        return join(results, func)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotTogether(f"{func} was called past torch's Python functions")


COMMON = {
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    *(getattr(Tensor, name) for name in ("size", "dim", "numel", "is_inference")),
    *(torch.numel, torch.is_floating_point),
}
"""What is equal for all parts by construction."""

ALIASING = {getattr(Tensor, name) for name in ("detach", "to", "float", "double", "long", "int", "bool")}
POINTWISE = {
    *ALIASING,
    *(getattr(Tensor, name) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs")),
    *(getattr(Tensor, f"__{name}__") for name in ("eq", "ne", "lt", "le", "gt", "ge", "rsub", "and", "or", "invert")),
    *(Tensor.clone, torch.clone, torch.add, torch.sub, torch.mul, torch.div, torch.eq, torch.ne, torch.where),
}
"""What computes each number from those in the same place, rounded alike however many there are."""


def at_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A pointwise function of all modes' parts in one call, stacked along a first axis; None where that is no equal."""
    if func in ALIASING and args[0].stack is None:
        return None  # what shares memory with the parts cannot come from a copy of them
    ndim, types = 0, set()
    for one in args[1:] if func is torch.where else args:
        if isinstance(one, Tensor):
            ndim = max(ndim, one.ndim)
            types.add(one.dtype)
    if len(types) != 1 or not kwargs.keys().isdisjoint(TENSORS):
        return None  # a number of its own gives way to others' types, one in a stack does not
    return func(*(one.stacked(ndim) if isinstance(one, PerMode) else one for one in args), **kwargs)


ALONG = {Tensor.sum, Tensor.argmax, Tensor.argmin, Tensor.squeeze}
"""What runs along dimensions and rounds nothing, as long as the sums are of integers."""


def along_dimensions(func: Any, own: PerMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One of :data:`ALONG` for all modes' parts in one call; None where that is no equal."""
    if kwargs.keys() - {"dim", "keepdim"} or (func is Tensor.squeeze and (own.stack is None or len(args) > 1)):
        return None
    stack = own.stacked(0)
    ndim = stack.ndim - 1
    dim, *keepdim = args or (kwargs.get("dim"),)
    asked = range(ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    if not ndim and func is Tensor.squeeze:
        return stack.view_as(stack)
    if not ndim or any(not isinstance(one, int) or not -ndim <= one < ndim for one in asked):
        return None
    dims = tuple(one % ndim + 1 for one in asked)
    if func is Tensor.squeeze:
        return stack.squeeze(dims)
    options = {"keepdim": keepdim[0] if keepdim else kwargs.get("keepdim", False)}
    if func is Tensor.sum:
        return None if stack.is_floating_point() or stack.is_complex() or not dims else stack.sum(dims, **options)
    return None if dim is None else func(stack, *dims, **options)


RESHAPING = {Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten}
"""What gives the same numbers in another shape, and shares memory with a contiguous tensor."""


def reshaped(func: Any, own: PerMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One of :data:`RESHAPING` for all modes' parts in one call; None where that is no equal."""
    if own.stack is None or kwargs or not own.stack.is_contiguous() or not own.ndim:
        return None
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    if not all(isinstance(one, int) for one in shape):
        return None
    if func in (Tensor.flatten, torch.flatten):
        first, last = (shape + (0, -1)[len(shape) :])[:2]
        return own.stack.flatten(first % own.ndim + 1, last % own.ndim + 1)
    return own.stack.reshape(len(own.stack), *shape) if shape else None


LOSSES = {
    getattr(torch.nn.functional, name)
    for name in dir(torch.nn.functional)
    if name.endswith(("loss", "cross_entropy", "cross_entropy_with_logits"))
}
"""What gives numbers of its own, that share no memory with anything."""

TENSORS = {"input", "other", "self", "out"}
"""Arguments by name that may be tensors."""


@contextmanager
def undoable() -> Iterator[None]:
    """Within the context, what is written into a :class:`PerMode` is taken back if an error is raised."""
    before, PerMode.journal = PerMode.journal, []
    try:
        yield
    except BaseException:
        for part, held in reversed(PerMode.journal):
            part.copy_(held)
        raise
    finally:
        PerMode.journal = before


@cache
def is_in_place(func: Any) -> bool:
    """Whether ``func`` writes into its first argument, which torch tells by the name alone."""
    name = func.__name__
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def is_augmented_assignment(frame: FrameType) -> bool:
    """Whether the caller stands at ``x += y`` or one of its kind: ``x`` can then be given another tensor.

    For torch it is the same call as ``x.add_(y)``, after which a plain ``x`` would have to hold what differs.
    """
    code = frame.f_code.co_code
    name = opname[code[frame.f_lasti]]
    if name == "BINARY_OP":
        return code[frame.f_lasti + 1] in AUGMENTED
    return name.startswith("INPLACE_")


AUGMENTED = range(13, 26)
"""What tells ``+=`` and its kind from ``+`` in Python's instruction for both."""


def holds(value: Any) -> bool:
    """Whether a :class:`PerMode` is in an argument, which may be a list of tensors or an index."""
    if isinstance(value, (list, tuple)):
        return any(holds(one) for one in value)
    return isinstance(value, PerMode)


def count(values: Iterable[Any]) -> int:
    """How many modes the arguments of a call have."""
    for value in values:
        if isinstance(value, PerMode):
            return len(value.parts)
        if isinstance(value, (list, tuple)) and (size := count(value)):
            return size
    return 0


def spread(value: Any, size: int) -> Iterable[Any]:
    """An argument, mode by mode."""
    if isinstance(value, PerMode):
        return value.parts
    if isinstance(value, (list, tuple)) and holds(value):
        return [type(value)(row) for row in zip(*(spread(one, size) for one in value), strict=True)]
    return repeat(value, size)


def join(results: list[Any], func: Any) -> Any:
    """What a function gave for each mode, as one."""
    first = results[0]
    if isinstance(first, Tensor):
        return PerMode(results)
    if isinstance(first, (list, tuple)):
        columns = [join(list(column), func) for column in zip(*results, strict=True)]
        return type(first)(columns) if len(columns) == len(first) else first
    for result in results:
        if result != first:
            raise NotTogether(f"{func.__name__} gives {first} in one mode and {result} in another")
    return first


def join_trees(trees: Sequence[Any]) -> Any:
    """Outputs of one structure, one for each mode, as one: what is the same object in all of them stays plain."""
    flat = [tree_flatten(tree) for tree in trees]
    leaves: list[Any] = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        is_shared = all(leaf is column[0] for leaf in column)
        leaves.append(PerMode(column) if isinstance(column[0], Tensor) and not is_shared else column[0])
    return tree_unflatten(leaves, flat[0][1])
