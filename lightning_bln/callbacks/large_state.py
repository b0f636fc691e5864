"""Large attributes of a module: shared by all modes until a step writes into one."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_bln.callbacks.backup import LARGE, has_memory

MANY = 10_000
"""Entries of a container from which on it is large, if they are plain."""
ATOMS = frozenset({int, float, complex, bool, str, bytes, type(None)})
CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)


def is_large(value: Any) -> bool:
    """Whether ``value`` is a tensor, an array or a container of plain entries that takes long to copy."""
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


class Contents:
    """Entries of a large container or array as they are, to tell whether a step has changed them and put them back."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.kept = value.copy()

    def has_changed(self) -> bool:
        """Whether there are other entries now."""
        value, kept = self.value, self.kept
        if isinstance(value, np.ndarray):
            return value.shape != kept.shape or not np.array_equal(value.view(np.uint8), kept.view(np.uint8))
        if len(value) != len(kept):
            return True
        if isinstance(value, dict):
            return not (all(map(is_, value, kept)) and all(map(is_, value.values(), kept.values())))
        return value != kept if isinstance(value, set) else not all(map(is_, value, kept))

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
