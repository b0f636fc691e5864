"""Batches that the population is computed over, read once a fit where they are few and plain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from typing import Any

import numpy as np
from torch import Tensor

from lightning_bln._torch import tree_flatten, tree_map
from lightning_bln.joining import serves_items
from lightning_bln.sweep.snapshot import state_of

BYTES = 2**26
"""Upper bound of what is kept."""


class KeptBatches:
    """The batches of one reading of the training data, to be read again at later weights.

    Samples are kept as data sets give them, random changes included. Another loader, data set or sampler, or one whose
    attributes have changed, is read anew; so is data that is no tensors, arrays and numbers, or too large.
    """

    def __init__(self) -> None:
        self.key: Any = None
        self.batches: list[Any] = []
        self.collate: list[Any] = []
        self.has_all = False

    def read(self, loaders: Iterable[Any], source: Callable[[], Iterable[Any]], collate: list[Any]) -> Iterator[Any]:
        """The batches of ``source()``, from memory as far as they were kept.

        Args:
            loaders: What ``source`` reads.
            source: Opens the reading.
            collate: The loaders' functions that make batches of samples, which ``source`` appends to.
        """
        loaders = list(loaders)
        key = [state_of_loader(one) for one in loaders] if all(map(serves_items, loaders)) else None
        if key is None or key != self.key:
            self.key, self.batches, self.collate, self.has_all = key, [], [], False
        held = len(self.batches)
        if held:
            collate += self.collate
        for batch in self.batches[:held]:
            yield copied(batch)
        if held and self.has_all:
            return
        collate.clear()  # source() numbers them anew, and alike
        room, is_keeping = BYTES - sum(map(size_of, self.batches)), key is not None
        for place, batch in enumerate(source()):
            if place < held:
                continue
            room -= size_of(batch)
            is_keeping = is_keeping and room >= 0
            if is_keeping:
                self.batches.append(copied(batch))
                self.collate = self.collate or list(collate)
            yield batch
        self.has_all = is_keeping


def copied(batch: Any) -> Any:
    """A batch in containers, tensors and arrays of its own, sooner than by a deep copy where it has many."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        if isinstance(leaf, list):  # samples not collated yet
            made = copy(leaf)
            made[:] = map(copied, leaf)
            return made
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return tree_map(of_leaf, batch)


def state_of_loader(loader: Any) -> Any:
    """Marks that tell a loader that would read the same samples from one that would not."""
    parts = (loader.dataset, loader.sampler, loader.batch_sampler)
    return id(loader), [state_of(part) for part in parts if part is not None]


def size_of(batch: Any) -> float:
    """Bytes of a batch's tensors and arrays; infinite where it holds anything but these and plain values."""
    leaves = tree_flatten(batch)[0]
    total = 0.0
    for leaf in leaves:
        if isinstance(leaf, list):  # samples not collated yet are no container to torch
            total += size_of(list(leaf)) if type(leaf) is not list else 0
        elif isinstance(leaf, (Tensor, np.ndarray)):
            total += leaf.nbytes
        elif not isinstance(leaf, (int, float, bool, str, bytes, type(None), np.generic)):
            return float("inf")
    return total
