"""A tensor subclass with a part for each mode: code written for one mode computes all modes in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bln._torch import make_wrapper_subclass, refuse_data_pointer, storage_address, writes
from lightning_bln.per_mode.errors import NotTogether, name_of
from lightning_bln.per_mode.writes import JOURNALS, WRITTEN, is_sole_owner, target_of

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Any, Rule] = {}
"""How functions of torch are computed on the stack of all modes; a rule gives NotImplemented where it does not hold."""


class PerMode(Tensor):
    """A tensor with a part for each of several modes, all of one shape.

    torch's functions apply to each part, with the same result as if the modes ran one after the other: those in
    :data:`RULES` on all parts at once, all others part by part, each from the same random state. Where Python asks for
    one value, as a shape, a truth value or a number, it must be equal for all modes.

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
        lightning_bln.per_mode.errors.NotTogether: __bool__ gives False in one mode and True in another
    """

    stack: Tensor | None
    separate: Sequence[Tensor] | None
    largest: ClassVar[int] = 0
    """Bytes of the largest part made so far; to be set to zero where one begins to count."""

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
        refuse_data_pointer(own)
        own.stack, own.separate = None, list(parts)
        return own

    def __init__(self, parts: Sequence[Tensor]) -> None: ...

    @classmethod
    def of_stack(cls, stack: Tensor) -> PerMode:
        """From a tensor with a first axis of modes; the parts are views of it."""
        own = make_wrapper_subclass(cls, stack.shape[1:], dtype=stack.dtype, device=stack.device)
        refuse_data_pointer(own)
        own.stack, own.separate = stack, None
        size = stack.nbytes // stack.shape[0]
        if size > PerMode.largest:
            PerMode.largest = size
        return own

    @property
    def parts(self) -> Sequence[Tensor]:
        """The tensor of each mode."""
        if self.separate is None:
            assert self.stack is not None
            self.separate = self.stack.unbind(0)
        return self.separate

    @property
    def modes(self) -> int:
        """The number of parts."""
        return len(self.parts) if self.stack is None else self.stack.shape[0]

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

    @property
    def requires_grad(self) -> bool:
        return self.like.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        raise NotTogether("requires_grad is set on what differs between modes")

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.like.is_cuda

    @property
    def _version(self) -> int:  # type: ignore[override]
        # views count writes together with the stack
        return self.stack._version if self.stack is not None else sum(one._version for one in self.parts)

    def is_floating_point(self) -> bool:
        return self.like.is_floating_point()

    def is_inference(self) -> bool:
        return self.like.is_inference()

    def stacked(self, ndim: int = 0) -> Tensor:
        """The parts along a first axis, followed by axes of length 1 so that each broadcasts against ``ndim`` axes."""
        stack = torch.stack(self.parts) if self.stack is None else self.stack  # type: ignore[arg-type]
        missing = ndim + 1 - stack.ndim
        return stack[(slice(None), *(None,) * missing)] if missing > 0 else stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func) if kwargs.get("out") is None else None  # what it writes into has no stack
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return part_by_part(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # reached by compiled code alone, such as a scripted module: Python's calls are seen by __torch_function__
        if func.namespace in ("c10d", "_c10d_functional"):
            raise NotTogether("what differs between modes is sent to other processes")
        return part_by_part(func, tuple(args), kwargs or {})


def part_by_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` of each mode's arguments in turn, all from the same random state."""
    first: Any = args[0] if args else None
    size = count((*args, *kwargs.values()))
    target = target_of(func, first, kwargs)
    if target is not None:
        prepare(target, func, size)
    plain = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and not isinstance(one, PerMode)]
    plain = [one for one in plain if not one.is_inference()]
    before, random = [writes(one) for one in plain], Generators(first, kwargs.get("generator"))
    results, draws = [], False
    for place in range(size):
        if draws:
            random.restore()
        own = {name: part(value, place) for name, value in kwargs.items()}
        results.append(func(*(part(one, place) for one in args), **own))
        if place == 0:
            draws = random.has_moved()
            if before != [writes(one) for one in plain]:
                raise NotTogether(f"{name_of(func)} writes into a tensor that all modes have")
    for given in (first, target):
        if isinstance(given, PerMode) and all(map(same, results, given.parts)):
            return given
    return join(results, func, addresses((*args, *kwargs.values())))


def same(a: Any, b: Any) -> bool:
    return a is b


class Generators:
    """Generators that torch's functions draw from by default, and one that is given to them, with their states."""

    def __init__(self, value: Any, generator: torch.Generator | None = None) -> None:
        self.device = value.device if isinstance(value, PerMode) and value.is_cuda else None
        self.generator = generator
        self.states = self.now()

    def now(self) -> list[Tensor]:
        given = [] if self.generator is None else [self.generator.get_state()]
        own = [] if self.device is None else [torch.cuda.get_rng_state(self.device)]
        return [torch.get_rng_state(), *own, *given]

    def has_moved(self) -> bool:
        return not all(map(torch.equal, self.states, self.now()))

    def restore(self) -> None:
        torch.set_rng_state(self.states[0])
        if self.device is not None:
            torch.cuda.set_rng_state(self.states[1], self.device)
        if self.generator is not None:
            self.generator.set_state(self.states[-1])


def prepare(target: Any, func: Any, size: int) -> None:
    """Note what a write into ``target`` will change; a plain tensor gets a part for each mode in place.

    Raises:
        NotTogether: It is a plain tensor whose memory another one shares, or that a graph or other modes have.
    """
    if isinstance(target, (list, tuple)):
        for one in target:
            prepare(one, func, size)
        return
    if not isinstance(target, PerMode):
        if not is_sole_owner(target) or target.device.type == "meta":
            raise NotTogether(f"{name_of(func)} writes what differs between modes into a tensor that all have")
        promote(target, size)
    memory = (target.like,) if target.separate is None else target.parts
    for written in WRITTEN:
        written.update(map(storage_address, memory))
    for journal in JOURNALS[-1:]:
        journal.note(memory)


def promote(tensor: Tensor, size: int) -> None:
    """Make a plain tensor a :class:`PerMode` of equal parts, for all that refer to it."""
    stack = tensor.detach().expand(size, *tensor.shape).clone()
    other = PerMode.of_stack(stack)
    try:
        torch.utils.swap_tensors(tensor, other)
    except RuntimeError as error:
        raise NotTogether(f"what differs between modes is written into a tensor that all have ({error})") from None
    for journal in JOURNALS[-1:]:
        journal.promoted(tensor, other)


def addresses(values: Iterable[Any]) -> set[int]:
    """The places where the memory of the first mode's arguments begins."""
    found: set[int] = set()
    for value in values:
        if isinstance(value, (list, tuple)):
            found |= addresses(value)
        elif isinstance(value, Tensor):
            found.add(storage_address(part(value, 0)))
    return found


def holds(value: Any) -> bool:
    """Whether an argument, which may be a list of tensors or an index, holds a :class:`PerMode`."""
    if isinstance(value, (list, tuple)):
        return any(holds(one) for one in value)
    if isinstance(value, dict):
        return any(holds(one) for one in value.values())
    return isinstance(value, PerMode)


def count(values: Iterable[Any]) -> int:
    """The number of modes among the arguments of a call."""
    for value in values:
        if isinstance(value, PerMode):
            return value.modes
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, (list, tuple)):
            continue
        if size := count(value):
            return size
    return 0


def part(value: Any, place: int) -> Any:
    """The argument of the mode at ``place``."""
    if isinstance(value, PerMode):
        return value.parts[place]
    if isinstance(value, (list, tuple)) and holds(value):
        made = (part(one, place) for one in value)
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict) and holds(value):
        return {key: part(one, place) for key, one in value.items()}
    return value


def join(results: list[Any], func: Any, taken: set[int] | None = None) -> Any:
    """The results of all modes as one value; tensors in memory of their own, besides that ``taken``, are stacked."""
    first = results[0]
    if isinstance(first, Tensor):
        if all(result is first for result in results):
            return first
        joined = PerMode(results)
        if taken is None or first.layout != torch.strided or storage_address(first) in taken or first.requires_grad:
            return joined
        return PerMode.of_stack(torch.stack(results))
    if isinstance(first, (list, tuple)):
        if any(len(result) != len(first) for result in results):
            raise NotTogether(f"{name_of(func)} gives results of other lengths in one mode than in another")
        columns = [join(list(column), func, taken) for column in zip(*results, strict=True)]
        return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)
    for result in results:
        if result is not first and not is_equal(result, first):
            raise NotTogether(f"{name_of(func)} gives {first} in one mode and {result} in another")
    return first


def is_equal(a: Any, b: Any) -> bool:
    """Whether two results are equal, NaN too; those that compare element by element are not."""
    try:
        return bool(a == b) or bool(a != a and b != b)
    except (RuntimeError, ValueError, TypeError):
        return False
