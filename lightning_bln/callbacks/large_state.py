"""Large attributes of a module: shared by all modes until a step writes into one."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bln.callbacks.backup import LARGE, Backup, has_memory, version
from lightning_bln.per_mode import PerMode

MANY = 10_000
"""Entries of a container from which on it is large, if they are plain."""
ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)


def is_large(value: Any) -> bool:
    """Whether ``value`` is a tensor, an array or a container of plain entries that takes long to copy."""
    if isinstance(value, PerMode):
        return False
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter) and value.nbytes >= LARGE and has_memory(value)
    if isinstance(value, np.ndarray):
        return value.nbytes >= LARGE
    return type(value) in CONTAINERS and len(value) >= MANY and set(map(type, entries_of(value))) <= ATOMS


def entries_of(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def large_values(values: Iterable[Any]) -> Iterator[Any]:
    """Large values among ``values``, and in their containers."""
    for value in values:
        if type(value) in ATOMS:
            continue
        if is_large(value):
            yield value
        elif isinstance(value, (list, tuple, set, frozenset, dict, deque)):
            yield from large_values(entries_of(value))


class Snapshot(list[dict[str, Any]]):
    """Values of attributes by name, one owner after the other; ``sharing`` if others share large ones."""

    __slots__ = ("__weakref__", "sharing")

    def __init__(self, values: Iterable[dict[str, Any]], sharing: Sharing | None = None) -> None:
        super().__init__(values)
        self.sharing = sharing


class Sharing:
    """Large values that snapshots share, and who shares them.

    Values are shared by reference until a run's steps change one in place: then it becomes the run's own, and all
    others get a copy of what it was before.
    """

    def __init__(self) -> None:
        self.values: dict[int, Contents] = {}
        self.members: WeakValueDictionary[int, Snapshot] = WeakValueDictionary()
        self.may_have_changed = False

    def takes(self, value: Any) -> bool:
        """Whether a copy of a snapshot is to hold ``value`` itself."""
        if id(value) not in self.values and is_large(value):
            self.values[id(value)] = Contents(value)
        return id(value) in self.values

    def join(self, snapshot: Snapshot) -> None:
        """Add a snapshot that shares values, and is to be spared what others write into them."""
        self.members[id(snapshot)] = snapshot

    def check(self) -> None:
        """Part values that have changed outside of :meth:`guarded`; they belong to who changed them.

        Raises:
            RuntimeError: A tensor has, and nobody kept what it was before.
        """
        changed = [
            one for one in self.values.values() if (one.is_tensor or self.may_have_changed) and one.has_changed()
        ]
        for contents in changed:
            self.part(contents)
        self.may_have_changed = False

    def settle(self) -> None:
        """After a batch, take arrays that no step has changed for constants, which need no comparison any more."""
        self.may_have_changed = True  # by Lightning's own step, which follows
        for contents in self.values.values():
            contents.settle()

    @contextmanager
    def guarded(self, run: Any) -> Iterator[None]:
        """Context for steps of ``run`` that may write into shared values, at whose end ``run.state`` is its own state.

        What the steps have changed belongs to the run alone afterwards, and others have what it was before.
        """
        if not self.values:
            yield
            return
        arrays = [one.value for one in self.values.values() if one.is_settled]
        tensors = [one.value for one in self.values.values() if one.is_tensor]
        backup = Backup({f"large attribute {place}": one for place, one in enumerate(tensors)}, large=0)
        try:
            with backup, read_only(arrays):
                yield
        finally:
            self.separate(run.state, backup)

    def separate(self, state: Snapshot, backup: Backup) -> None:
        """Put values of its own into ``state``, in place of those that steps have changed."""
        changed = [self.values[id(tensor)] for tensor in backup.changed()]
        changed += [one for one in self.values.values() if not one.is_tensor and one.has_changed()]
        for contents in changed:
            value = contents.value
            substitute(state, value, copied(value))
            if contents.is_tensor:
                backup.put_back(value)
                contents.kept = backup.copies[id(value)]
            else:
                contents.put_back()
            self.part(contents)
        self.join(state)

    def part(self, contents: Contents) -> None:
        """Give every member a copy of a value as it was; it belongs to who holds it besides them."""
        holders = [member for member in list(self.members.values()) if holds(member, contents.value)]
        if contents.kept is None and holders:
            raise RuntimeError(
                f"a tensor of {contents.value.nbytes} bytes among the module's attributes was changed in one "
                "statistics mode and in no other, which have lost it thereby; assign a new tensor in its place"
            )
        del self.values[id(contents.value)]
        for member in holders:
            substitute(member, contents.value, partial(copied, contents.kept))


def copied(value: Any) -> Any:
    """A copy of a large value."""
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()


def holds(holder: Any, wanted: Any) -> bool:
    """Whether lists and dictionaries hold ``wanted`` somewhere."""
    values = holder.values() if isinstance(holder, dict) else holder
    return any(
        one is wanted or (isinstance(one, (list, dict)) and not is_large(one) and holds(one, wanted)) for one in values
    )


def substitute(holder: Any, old: Any, new: Any) -> None:
    """Put ``new``, or what it returns, in place of ``old`` wherever lists and dictionaries hold it."""
    places = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for place, value in list(places):
        if value is old:
            holder[place] = new() if isinstance(new, partial) else new
        elif isinstance(value, (list, dict)) and not is_large(value):
            substitute(value, old, new)


class Contents:
    """A large value as it is, to tell whether it has changed and put it back.

    Of containers and arrays a copy is ``kept``; of tensors the count of writes, and ``kept`` is None.
    """

    def __init__(self, value: Any) -> None:
        self.value, self.is_tensor = value, isinstance(value, Tensor)
        self.version = version(value) if self.is_tensor else 0
        self.kept: Any = None if self.is_tensor else value if is_constant(value) else value.copy()

    @property
    def is_settled(self) -> bool:
        """Whether this is an array that steps may no longer write into, of which there is no copy."""
        return self.value is self.kept

    def settle(self) -> None:
        """Drop the copy of an array."""
        if isinstance(self.value, np.ndarray):
            self.kept = self.value

    def has_changed(self) -> bool:
        """Whether there is something else in it now."""
        value, kept = self.value, self.kept
        if self.is_tensor:
            return version(value) != self.version
        if self.is_settled:
            return False
        if isinstance(value, np.ndarray):
            return value.shape != kept.shape or not has_same_bytes(value, kept)
        return value != kept  # compares plain entries, by identity first

    def put_back(self) -> None:
        """Give the value its entries back."""
        value = self.value
        if isinstance(value, np.ndarray):
            value[...] = self.kept
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(self.kept)
        else:
            value.clear()
            value.extend(self.kept)


@contextmanager
def read_only(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """Context in which arrays cannot be written into.

    Raises:
        RuntimeError: A step has tried to.
    """
    locked = [array for array in arrays if array.flags.writeable]
    for array in locked:
        array.flags.writeable = False
    try:
        yield
    except ValueError as error:
        if not locked or "read-only" not in str(error):
            raise
        raise RuntimeError(
            f"a step wrote into a large array, of {locked[0].nbytes} bytes or so, which no step on the first batch of "
            "this validation did; write at every batch, assign a new array in its place, or keep it as a tensor"
        ) from error
    finally:
        for array in locked:
            array.flags.writeable = True


def is_constant(value: Any) -> bool:
    """Whether ``value`` is an array that cannot be written into."""
    return isinstance(value, np.ndarray) and not value.flags.writeable


def has_same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether arrays of one shape hold the same, as fast as memory where they can be compared as bytes."""
    if one.dtype.hasobject or not (one.flags.c_contiguous and other.flags.c_contiguous):
        return np.array_equal(one, other)
    raw = (torch.from_numpy(array.reshape(-1).view(np.uint8)) for array in (one, other))
    return torch.equal(*raw)
