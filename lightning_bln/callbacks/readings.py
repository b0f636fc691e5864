"""Second readings of the training data, of which loaders, samplers and data sets show no trace afterwards."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_bln._torch import altered, tree_flatten, tree_map
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.backup import Backup
from lightning_bln.sweep.generators import GENERATORS, set_state, state_of

CONTAINERS = (list, dict, set, deque)
ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None)})
DEPTH = 6
"""How far from a loader state is looked for."""
MANY = 10_000
"""Entries of a data set's containers and arrays from which on they are data, and no state."""
VERY_MANY = 10**8
"""The same of a sampler's containers and orders."""


def training_batches(trainer: Any, opened: Callable[[Any], Any]) -> Iterator[Any]:
    """A separate pass over the training data, beside the one that trains.

    Args:
        trainer: A Trainer within ``fit``.
        opened: Gives for each loader the one to read.
    """
    source = _lightning.train_loader(trainer)
    loaders = tree_map(lambda loader: opened(independent(trainer, loader)), source.iterables)
    with restored(source.flattened):
        for batch, _, _ in _lightning.recombined(source, loaders):
            yield batch


def check_readable(trainer: Any, loaders: Any) -> None:
    """Raise where training data could not be read a second time, before anything has changed."""
    for loader in tree_flatten(loaders)[0]:
        independent(trainer, loader)


def independent(trainer: Any, loader: Any) -> Any:
    """A loader of the same batches that shares no iterator with ``loader``, or an error where there cannot be one."""
    name, problem = type(loader).__name__, None
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        problem = f"{name} keeps its place in the data, which a second reading would move"
    elif isinstance(loader, DataLoader) and loader.persistent_workers and loader.num_workers:
        # persistent workers serve one iterator: a second one would take the batches that the first still waits for
        if type(loader) is DataLoader:
            return altered(loader)
        problem = (
            f"{name}(persistent_workers=True) cannot be read a second time while it trains; set "
            "persistent_workers=False, or"
        )
    elif isinstance(loader, Iterator):
        problem = f"the training data is a {name}, which can be read only once"
    else:
        problem = read_once(loader)
    if problem is not None:
        mend = problem if problem.endswith(" or") else f"{problem};"
        raise _lightning.misconfiguration(
            trainer, f"population='recompute', but {mend} pass stats_dataloader=, or set population='epoch'"
        )
    return loader


def read_once(loader: Any) -> str | None:
    """A reason why a loader's data set or sampler can be read only once, or None."""
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) and not getattr(loader, "num_workers", 0):
        parts.append(dataset)
    for part in parts:
        if isinstance(part, Iterator):
            return f"{type(part).__name__} iterates itself, so that a second reading would move its place"
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, Iterator):
                return f"{type(part).__name__}.{name} is a {type(value).__name__}, which a second reading would move on"
    return None


@contextmanager
def restored(loaders: Iterable[Any]) -> Iterator[None]:
    """After the context, what loaders, samplers and data sets hold is as before: attributes, containers, generators."""
    kept = Kept()
    for loader in loaders:
        is_loader = isinstance(loader, DataLoader)
        samplers = [getattr(loader, name, None) for name in ("generator", "sampler", "batch_sampler")]
        datasets = [getattr(loader, "dataset", None)]
        if is_loader and loader.num_workers:
            datasets = []  # workers have copies
        for part in datasets:
            kept.shield(part)
        for part in samplers:
            kept.add(part, DEPTH, VERY_MANY)
        if not is_loader:
            kept.add(loader, DEPTH, MANY if isinstance(loader, (list, tuple)) else VERY_MANY)
        for part in datasets:
            kept.unshield(part)
            kept.add(part, DEPTH, MANY)
    try:
        yield
    finally:
        kept.restore()


class Kept:
    """State of objects and of all that they hold, put back in place, so that iterators over it stay valid."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}
        self.actions: list[Callable[[], Any]] = []

    def shield(self, value: Any) -> None:
        """Leave an object out for now."""
        self.seen[id(value)] = value

    def unshield(self, value: Any) -> None:
        self.seen.pop(id(value), None)

    def add(self, value: Any, depth: int, most: int) -> None:
        """Keep the state of ``value``, and of what it holds as far as ``depth``, but of containers up to ``most``."""
        if type(value) in ATOMS or id(value) in self.seen or depth < 0:
            return
        self.seen[id(value)] = value
        if isinstance(value, CONTAINERS):
            if len(value) > most:
                return
            self.actions.append(refill(value))
            self.add_all(value.values() if isinstance(value, dict) else value, depth, most)
        elif isinstance(value, (tuple, frozenset)):
            self.add_all(value, depth, most)
        elif isinstance(value, (Tensor, np.ndarray)):
            if is_state(value, most):
                self.actions.append(rewrite(value))
        elif isinstance(value, GENERATORS):
            self.actions.append(partial(set_state, value, state_of(value)))
        elif is_stateful(value):
            self.actions.append(refill(vars(value)))
            self.add_all(vars(value).values(), depth, most)

    def add_all(self, values: Iterable[Any], depth: int, most: int) -> None:
        for value in [one for one in values if type(one) not in ATOMS]:
            self.add(value, depth - 1, most)

    def restore(self) -> None:
        for action in self.actions:
            action()


def is_state(value: Any, most: int) -> bool:
    """Whether an array may be state: a small one, or an order of up to ``most`` samples."""
    size = value.size if isinstance(value, np.ndarray) else value.numel()
    is_integer = value.dtype.kind in "iu" if isinstance(value, np.ndarray) else not value.dtype.is_floating_point
    return size <= (most if value.ndim == 1 and is_integer else min(most, MANY))


def is_stateful(value: Any) -> bool:
    """Whether ``value`` is an object of data: none of a model's or a Trainer's, no class, function or module."""
    if isinstance(value, type) or not hasattr(value, "__dict__") or hasattr(value, "__code__"):
        return False
    if isinstance(value, nn.Module):
        return not any(True for _ in value.parameters())
    return not {"Trainer", "LightningModule", "LightningDataModule", "module"} & set(_lightning.bases(value))


def refill(container: Any) -> Callable[[], Any]:
    """A function that gives a container the entries that it has now."""
    entries: Any = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> None:
        if isinstance(container, list):
            container[:] = entries
        elif isinstance(container, dict):
            if not same_entries(container, entries):
                container.clear()
                container.update(entries)
        else:
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(entries)

    return restore


def same_entries(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether dictionaries have the same keys in the same order, and the very same values."""
    pairs = zip(one.items(), other.items(), strict=False)
    return len(one) == len(other) and all(a is b and x is y for (a, x), (b, y) in pairs)


def rewrite(value: Any) -> Callable[[], Any]:
    """A function that gives an array the numbers that it has now."""
    if isinstance(value, np.ndarray):
        before = value.copy()

        def restore_array() -> None:
            if value.flags.writeable and value.tobytes() != before.tobytes():
                value[...] = before

        return restore_array
    backup = Backup({"": value}, large=sys.maxsize)
    return backup.restore
