"""A tensor subclass with a part for each mode: code written for one mode computes all modes in one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._torch import make_wrapper_subclass, tree_flatten, tree_unflatten


class NotTogether(Exception):
    """Raised where modes cannot be evaluated jointly; the message says why."""


class WritesIntoPlain(NotTogether, TypeError):
    """A function would write what differs between modes into a tensor that all have.

    For torch, ``x += y`` is the same call as ``x.add_(y)``, but its operators answer a TypeError with NotImplemented.
    Python then computes ``x + y`` and assigns that to ``x``; a call of ``add_`` itself gets the error.
    """


class PerMode(Tensor):
    """A tensor with a part for each of several modes, all of one shape.

    torch's functions apply to each part, by the same operations and with the same result as if the modes ran one after
    the other. Where Python asks for one value, as a shape, a truth value or a number, it must be equal for all modes.

    Args:
        parts: The tensor of each mode.

    Raises:
        NotTogether: Shapes, types or devices differ; or, in any function, a value that Python asks for does.

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
    """Within :func:`undoable`, every part that is written into, with its values before."""

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor]) -> PerMode:
        first = parts[0]
        shape, dtype, device = first.shape, first.dtype, first.device
        for part in parts:
            if part.shape != shape or part.dtype != dtype or part.device != device:
                raise NotTogether(
                    f"a tensor is {first.shape} {dtype} in one mode and {part.shape} {part.dtype} in another"
                )
        own = make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        own.stack, own.separate = None, list(parts)
        return own

    def __init__(self, parts: Sequence[Tensor]) -> None: ...

    @classmethod
    def of_stack(cls, stack: Tensor) -> PerMode:
        """From a tensor with a first axis of modes; the parts are views of it."""
        own = make_wrapper_subclass(cls, stack.shape[1:], dtype=stack.dtype, device=stack.device)
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
        """A tensor with the type and device of all parts: the stack, or else the first part."""
        return self.separate[0] if self.stack is None else self.stack  # type: ignore[index]

    # Python asks for these most often: they are equal for all parts and need no dispatch.
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
        """The parts along a first axis, followed by axes of length 1 so that each broadcasts against ``ndim`` axes."""
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
            error = WritesIntoPlain if target is first else NotTogether
            raise error(f"{func.__name__} writes what differs between modes into a tensor that all have")
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
"""Functions whose result is equal for all parts by construction."""

ALIASING = {getattr(Tensor, name) for name in ("detach", "to", "float", "double", "long", "int", "bool")}
POINTWISE = {
    *ALIASING,
    *(getattr(Tensor, name) for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "neg", "abs")),
    *(getattr(Tensor, f"__{name}__") for name in ("eq", "ne", "lt", "le", "gt", "ge", "rsub", "and", "or", "invert")),
    *(Tensor.clone, torch.clone, torch.add, torch.sub, torch.mul, torch.div, torch.eq, torch.ne, torch.where),
}
"""Functions of the numbers at one place, rounded alike however many places there are."""


def at_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One of :data:`POINTWISE` on all parts, stacked along a first axis; None where the result could differ."""
    if func in ALIASING and args[0].stack is None:
        return None  # the result may have to share memory with the parts, of which a stack is a copy
    ndim, types = 0, set()
    for one in args[1:] if func is torch.where else args:
        if isinstance(one, Tensor):
            ndim = max(ndim, one.ndim)
            types.add(one.dtype)
    if len(types) != 1 or not kwargs.keys().isdisjoint(TENSORS):
        return None  # 0-dim tensors promote differently once stacked
    return func(*(one.stacked(ndim) if isinstance(one, PerMode) else one for one in args), **kwargs)


ALONG = {Tensor.sum, Tensor.argmax, Tensor.argmin, Tensor.squeeze}
"""Functions along dimensions, exact in any order as long as sums are of integers."""


def along_dimensions(func: Any, own: PerMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One of :data:`ALONG` on all parts, stacked along a first axis; None where the result could differ."""
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
"""Functions that return a contiguous tensor's memory in another shape."""


def reshaped(func: Any, own: PerMode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One of :data:`RESHAPING` on all parts, stacked along a first axis; None where the result could differ."""
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
"""Functions whose result shares no memory with their arguments, so that it may be stacked."""

TENSORS = {"input", "other", "self", "out"}
"""Keyword arguments that may be tensors."""


@contextmanager
def undoable() -> Iterator[None]:
    """Within the context, an error takes back what was written into a :class:`PerMode`."""
    before, PerMode.journal = PerMode.journal, []
    try:
        yield
    except BaseException:
        for part, held in reversed(PerMode.journal):
            part.copy_(held)
        raise
    finally:
        PerMode.journal = before


IN_PLACE = {"__setitem__", "__set__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
"""Functions that write into their first argument, besides those whose name ends with one underscore."""


@cache
def is_in_place(func: Any) -> bool:
    """Whether ``func`` writes into its first argument, which torch tells by the name alone."""
    name = func.__name__
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def holds(value: Any) -> bool:
    """Whether an argument, which may be a list of tensors or an index, holds a :class:`PerMode`."""
    if isinstance(value, (list, tuple)):
        return any(holds(one) for one in value)
    return isinstance(value, PerMode)


def count(values: Iterable[Any]) -> int:
    """The number of modes among the arguments of a call."""
    for value in values:
        if isinstance(value, PerMode):
            return len(value.parts)
        if isinstance(value, (list, tuple)) and (size := count(value)):
            return size
    return 0


def spread(value: Any, size: int) -> Iterable[Any]:
    """The argument of each mode."""
    if isinstance(value, PerMode):
        return value.parts
    if isinstance(value, (list, tuple)) and holds(value):
        return [type(value)(row) for row in zip(*(spread(one, size) for one in value), strict=True)]
    return repeat(value, size)


def join(results: list[Any], func: Any) -> Any:
    """The results of all modes as one value."""
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
    """The outputs of all modes, of one structure, as one; a tensor that is the same object in all stays plain."""
    flat = [tree_flatten(tree) for tree in trees]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([join_leaves(column) for column in columns], flat[0][1])


def join_leaves(column: Sequence[Any]) -> Any:
    first = column[0]
    if all(leaf is first for leaf in column):
        return first
    if isinstance(first, PackedSequence):
        return packed_as(column, PerMode([leaf.data for leaf in column]))
    return PerMode(column) if isinstance(first, Tensor) else first


def join_stacks(stacks: Sequence[Any], number: int) -> Any:
    """The first ``number`` parts of tensors, or packed batches of tensors, that have a first axis of modes."""
    if isinstance(stacks[0], PackedSequence):
        return packed_as(stacks, join_stacks([stack.data for stack in stacks], number))
    stack = stacks[0] if len(stacks) == 1 else torch.cat(list(stacks))
    return PerMode.of_stack(stack[:number])


def packed_as(column: Sequence[PackedSequence], data: PerMode) -> PackedSequence:
    """``data``, packed as all of ``column`` are."""
    first = column[0]
    for other in column[1:]:
        for one, another in zip(first[1:], other[1:], strict=True):
            if one is not another and (one is None or another is None or not torch.equal(one, another)):
                raise NotTogether("sequences are packed in another order in one mode than in another")
    return first._replace(data=data)


def first_part(leaf: Any) -> Any:
    """The leaf of the first mode."""
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=first_part(leaf.data))
    return leaf.parts[0] if isinstance(leaf, PerMode) else leaf


def reason_of(error: Exception) -> str:
    """The end of a sentence that says why modes are not evaluated jointly."""
    message = str(error).partition("\n")[0].rstrip(".")
    return message if isinstance(error, NotTogether) else ": ".join(filter(None, [type(error).__name__, message]))
