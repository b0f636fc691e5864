"""Batches of samples joined to one: of datasets, trees of tensors, packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import DataLoader

from lightning_bln._torch import altered, is_packed, tree_flatten, tree_unflatten


class Items(list[Any]):
    """Samples of a dataset, before the loader's collate function makes a batch of them."""

    loader: int
    """Number of the loader whose function that is."""


def as_items(loader: int, samples: Iterable[Any]) -> Items:
    """Collate samples to :class:`Items`."""
    items = Items(samples)
    items.loader = loader
    return items


def serves_items(loader: Any) -> bool:
    """Whether a loader makes its batches of single samples by a function that can be called later."""
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader.batch_sampler is not None
    )


def reading_items(loader: DataLoader[Any], number: int) -> DataLoader[Any]:
    """A loader of the same batches before they are collated."""
    return altered(loader, collate_fn=partial(as_items, number), pin_memory=False)


PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
"""Types of values that batches may have in common."""


def is_leaf(value: Any) -> bool:
    """Whether joining takes ``value`` whole: a packed batch, or a list of no tensors, such as names or lengths."""
    return is_packed(value) or (
        type(value) is list and bool(value) and not any(isinstance(one, (Tensor, list, tuple, dict)) for one in value)
    )


def flatten(batch: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of a batch."""
    return tree_flatten(batch, is_leaf=is_leaf)


def collated(batch: Any, functions: Sequence[Callable[[list[Any]], Any]]) -> Any:
    """A batch with its :class:`Items` made batches by their loaders' functions."""
    leaves, structure = flatten(batch)
    made = [functions[one.loader](list(one)) if isinstance(one, Items) else one for one in leaves]
    return tree_unflatten(made, structure)


def samples_along(batch: Any, axes: Sequence[int] | None = None) -> int:
    """Samples in a batch, by its first leaf that has several, along the first axis unless others are known."""
    leaves = flatten(batch)[0]
    for leaf, axis in zip(leaves, [0] * len(leaves) if axes is None else axes, strict=True):
        if is_packed(leaf):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[axis]
        if isinstance(leaf, list):
            return len(leaf)
        if isinstance(leaf, Mapping):
            return samples_along(dict(leaf))
        if hasattr(leaf, "__dict__") and not callable(leaf):
            return samples_along(vars(leaf))
    return 1


def owned(batch: Any) -> Any:
    """A batch whose tensors nobody else writes into, as a loader may that uses its memory again."""
    leaves, structure = flatten(batch)
    return tree_unflatten([leaf.clone() if type(leaf) is Tensor else leaf for leaf in leaves], structure)


def ways_to_join(batch: Any) -> Iterator[tuple[int, ...]]:
    """The batch axis of each leaf: the first of all, or the second of those with two, as time-first sequences have.

    Masks may come batch first beside these, too.
    """
    leaves, _ = flatten(batch)
    ranks = [leaf.ndim if isinstance(leaf, Tensor) else 0 for leaf in leaves]
    yield (0,) * len(ranks)
    if max(ranks, default=0) > 1:
        yield tuple(int(rank > 1) for rank in ranks)
        is_mask = [isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in leaves]
        others = tuple(int(rank > 1 and not mask) for rank, mask in zip(ranks, is_mask, strict=True))
        if any(others) and any(rank > 1 and mask for rank, mask in zip(ranks, is_mask, strict=True)):
            yield others


def join(batches: Sequence[Any], axes: Sequence[int]) -> Any:
    """One batch of the samples of all.

    Tensors are joined along the batch axis; where they differ in another, the shorter ones are padded with zeros.

    Args:
        batches: Trees of one structure.
        axes: From :func:`ways_to_join`.

    Raises:
        ValueError: They do not join; the text says why.

    Example:
        >>> join([{"x": torch.ones(1, 2), "n": [2]}, {"x": torch.ones(1, 3), "n": [3]}], (0, 0))
        {'x': tensor([[1., 1., 0.],
                [1., 1., 1.]]), 'n': [2, 3]}
    """
    trees = [flatten(batch) for batch in batches]
    _, structure = trees[0]
    if any(other != structure for _, other in trees):
        raise ValueError("batches differ in their structure")
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    return tree_unflatten([joined(column, axis) for column, axis in zip(columns, axes, strict=True)], structure)


def joined(leaves: Sequence[Any], axis: int) -> Any:
    """One leaf of :func:`join`."""
    first = leaves[0]
    if isinstance(first, Items):
        if any(leaf.loader != first.loader for leaf in leaves):
            raise ValueError("they come from different loaders")
        return as_items(first.loader, (sample for leaf in leaves for sample in leaf))
    if is_packed(first):
        return pack_sequence([one for leaf in leaves for one in unpack_sequence(leaf)], enforce_sorted=False)
    if type(first) is list:
        return [one for leaf in leaves for one in leaf]
    if type(first) is Tensor and first.ndim:
        return cat([*leaves], axis)
    if type(first) is Tensor and all(type(leaf) is Tensor and torch.equal(leaf, first) for leaf in leaves):
        return first
    if is_dataclass(first) and not isinstance(first, type) and all(type(leaf) is type(first) for leaf in leaves):
        parts = {one.name: joined([getattr(leaf, one.name) for leaf in leaves], axis) for one in fields(first)}
        return replace(first, **parts)
    alike = all(type(leaf) is type(first) for leaf in leaves)
    if isinstance(first, PLAIN) and alike and all(bool(leaf == first) for leaf in leaves):
        return first
    raise ValueError(f"a batch holds a {type(first).__name__}, of which it is not known how it joins")


def cat(tensors: list[Tensor], axis: int) -> Tensor:
    """Tensors joined along ``axis``, padded with zeros at the end of the others."""
    if len({one.ndim for one in tensors}) > 1:
        raise ValueError("tensors have different numbers of axes")
    shape = [max(sizes) for sizes in zip(*(one.shape for one in tensors), strict=True)]
    shape[axis] = sum(one.shape[axis] for one in tensors)
    whole, start = tensors[0].new_zeros(shape), 0
    for one in tensors:
        places = [slice(size) for size in one.shape]
        places[axis] = slice(start, start := start + one.shape[axis])
        whole[tuple(places)] = one
    return whole
