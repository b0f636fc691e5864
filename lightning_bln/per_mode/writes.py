"""Writes into tensors: which functions write, and how what they wrote is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_bln._torch import is_mutable_operator, is_sole, storage_address
from lightning_bln.per_mode.errors import NotTogether

IN_PLACE = {"__setitem__", "__set__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
"""Functions that write into their first argument, besides those whose name ends with one underscore."""


@cache
def is_in_place(func: Any) -> bool:
    """Whether ``func`` writes into its first argument: an operator says so, a Python function has a name for it."""
    if is_mutable_operator(func):
        return True
    name = getattr(func, "__name__", "")
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def target_of(func: Any, first: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that a call writes into, or None."""
    return first if is_in_place(func) else kwargs.get("out")


def is_sole_owner(tensor: Any) -> bool:
    """Whether a plain tensor can be exchanged for another without anyone else noticing, an array of numpy's neither."""
    return (
        type(tensor) is Tensor
        and not isinstance(tensor, nn.Parameter)
        and not tensor.requires_grad
        and is_sole(tensor)
        and tensor.untyped_storage().resizable()
    )


class Journal:
    """Notes of what was written into tensors with a part for each mode, to be taken back.

    Args:
        old: Where the memory lies that was there before, which alone has to be noted; None for all.
    """

    def __init__(self, old: set[int] | None = None) -> None:
        self.old = old
        self.held: list[tuple[Tensor, Tensor]] = []
        self.exchanged: list[tuple[Any, Tensor]] = []

    def note(self, written: Tensor | Sequence[Tensor]) -> None:
        """Keep the values of what is about to be written into."""
        for one in (written,) if isinstance(written, Tensor) else written:
            if self.old is None or storage_address(one) in self.old:
                self.held.append((one, one.clone()))

    def promoted(self, tensor: Tensor, plain: Tensor) -> None:
        """Keep the plain tensor in whose place ``tensor`` now has a part for each mode."""
        self.exchanged.append((ref(tensor), plain))

    def undo(self) -> None:
        for written, before in reversed(self.held):
            written.copy_(before)
        exchanged, self.exchanged = self.exchanged, []
        while exchanged:
            reference, plain = exchanged.pop()
            tensor = reference()
            del reference  # a tensor that is referred to weakly cannot be exchanged
            if tensor is not None:
                with suppress(RuntimeError):  # someone refers to it weakly by now: the others are put back all the same
                    torch.utils.swap_tensors(tensor, plain)

    def left(self) -> list[Tensor]:
        """Tensors that were exchanged and are still in use."""
        return [tensor for reference, _ in self.exchanged if (tensor := reference()) is not None]


WRITTEN: list[set[int]] = []
"""Sets, of those who look at them, of where the memory lies that was written into."""

JOURNALS: list[Journal] = []
"""The journals in force; the last one is written into."""


@contextmanager
def undoable(old: set[int] | None = None, reach: Callable[[], set[int]] | None = None) -> Iterator[None]:
    """Within the context, an error takes back what was written into a tensor with a part for each mode.

    Args:
        old: Where the memory lies that was there before, which alone has to be noted; None for all.
        reach: Gives at the end the ids of the tensors that may have got a part for each mode; another one is an error.
    """
    journal = Journal(old)
    JOURNALS.append(journal)
    try:
        yield
        if reach is not None and (left := journal.left()):
            known = reach()
            if any(id(tensor) not in known for tensor in left):
                raise NotTogether("what differs between modes was written into a tensor outside of the module")
    except BaseException:
        journal.undo()
        raise
    finally:
        JOURNALS.pop()
