"""Contents of tensors to put back after steps that may write into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_bln._torch import storage_address, writes, written_arguments

LARGE = 2**22
"""Bytes from which on a tensor is copied only once something is about to write into it."""

LEAKS = {
    *("numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__set__", "__setitem__"),
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}
"""Functions that write into a tensor, or after which its memory may be written into unseen, by names without ``_``."""

KEEPERS = {"batch_norm", "instance_norm"}
"""Functions that write into running statistics among their arguments."""


class Backup:
    """Contents of tensors as they are: copies of small ones, and of large ones no copy before they are written into.

    Within its context it sees what functions of torch write into large ones, by whatever view of them.

    Args:
        tensors: The tensors by the names that errors give them.
        large: Bytes from which on a tensor is large.
    """

    def __init__(self, tensors: Mapping[str, Tensor], large: int = LARGE) -> None:
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self.tensors = {id(tensor): tensor for tensor in tensors.values() if has_memory(tensor)}
        self.homes = {key: tensor.data for key, tensor in self.tensors.items()}
        watched = {key: tensor for key, tensor in self.tensors.items() if tensor.nbytes >= large and shows_slices()}
        self.copies = {key: copied(tensor) for key, tensor in self.tensors.items() if key not in watched}
        self.versions = {key: version(tensor) for key, tensor in watched.items()}
        self.watched: dict[int, list[int]] = {}
        for key, tensor in watched.items():
            self.watched.setdefault(memory(tensor), []).append(key)
        self.watch = Watch(self.before_write) if watched else None

    def __enter__(self) -> Backup:
        if self.watch is not None:
            self.watch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.watch is not None:
            self.watch.__exit__(*error)

    def before_write(self, tensor: Tensor) -> None:
        """Copy the large tensors that share memory with one that is written into."""
        for key in self.watched.pop(memory(tensor), ()):
            self.copies[key] = copied(self.homes[key])

    def changed(self) -> list[Tensor]:
        """Tensors that have other contents than before.

        Raises:
            RuntimeError: One was written into unseen, so that its contents are lost.
        """
        for key in [key for keys in self.watched.values() for key in keys]:
            if version(self.tensors[key]) != self.versions[key]:
                raise RuntimeError(
                    f"a step changed {self.names[key]}, a tensor of {self.tensors[key].nbytes} bytes, by a function "
                    "that torch does not show, so that it cannot be put back; assign a new tensor in its place"
                )
        return [
            self.tensors[key]
            for key, kept in self.copies.items()
            if self.is_moved(key) or not has_same_bits(self.tensors[key], kept)
        ]

    def is_moved(self, key: int) -> bool:
        """Whether a tensor has been given other memory."""
        tensor, home = self.tensors[key], self.homes[key]
        return tensor.shape != home.shape or tensor.dtype != home.dtype or tensor.data_ptr() != home.data_ptr()

    def restore(self) -> list[str]:
        """Put the contents back; return the names of tensors that had changed."""
        changed = self.changed()
        for tensor in changed:
            self.put_back(tensor)
        return [self.names[id(tensor)] for tensor in changed]

    def put_back(self, tensor: Tensor) -> None:
        """Give a tensor its contents back, past the count of its writes, which graphs of training may look at."""
        home = self.homes[id(tensor)]
        with torch.inference_mode(home.is_inference()), torch.no_grad():
            home.copy_(self.copies[id(tensor)])
        if self.is_moved(id(tensor)):
            tensor.data = home


@cache
def shows_slices() -> bool:
    """Whether torch shows what is assigned to a slice, as 2.3 does not: there every tensor is copied beforehand."""
    seen: list[Tensor] = []
    with Watch(seen.append):
        torch.zeros(1)[:] = torch.zeros(1)
    return bool(seen)


class Watch(TorchFunctionMode):
    """Context in which ``before_write`` is called with each tensor that a function of torch is about to write into."""

    def __init__(self, before_write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.before_write = before_write

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = PLACES.get(func, PLACES)  # most functions only read
        if place is None and not kwargs:
            return func(*args)
        kwargs = kwargs or {}
        if place is PLACES:
            place = PLACES[func] = written_place(func)
        for tensor in written_by(place, args, kwargs):
            if has_memory(tensor):
                self.before_write(tensor)
        return func(*args, **kwargs)


PLACES: dict[Any, Any] = {}
"""Of every function called so far, what :func:`written_place` says."""


def written_place(func: Any) -> Any:
    """Arguments that a function of torch writes into by its name: the first, all, those of its schema, or None."""
    name = getattr(func, "__name__", "").partition(".")[0]
    if name in KEEPERS:
        return "all"
    if name in LEAKS or (name.endswith("_") and not name.startswith("__")):
        return "first"
    return written_arguments(func)


def written_by(place: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that a call may write into, of a function of which :func:`written_place` is known."""
    if place == "all" or kwargs.get("inplace") or kwargs.get("max_norm") is not None:
        yield from tensors_in([*args, *kwargs.values()])
    elif place == "first":
        yield from tensors_in(args[:1] or kwargs.values())
    elif place is not None:  # of a library's operator
        yield from tensors_in([args[one] for one in place if one < len(args)])
        yield from tensors_in([kwargs[one] for one in place.values() if one in kwargs])
    if "out" in kwargs:
        yield from tensors_in([kwargs["out"]])


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory of its own that can be copied."""
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return is_plain and tensor.layout == torch.strided and not tensor.is_meta


def memory(tensor: Tensor) -> int:
    """The address of the memory that a tensor shares with its views."""
    return storage_address(tensor)


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def version(tensor: Tensor) -> int:
    """Number of times a tensor has been written into, where torch counts them."""
    return 0 if tensor.is_inference() else writes(tensor)


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors hold the same numbers, NaN among them."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())
