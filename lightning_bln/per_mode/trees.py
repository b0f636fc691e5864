"""Nested values of several modes: joined to one, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._torch import tree_flatten, tree_unflatten
from lightning_bln.per_mode.errors import NotTogether
from lightning_bln.per_mode.tensor import PerMode, holds, part

__all__ = ["holds", "join_leaves", "join_trees", "part_of"]


def join_trees(trees: Sequence[Any]) -> Any:
    """The outputs of all modes, of one structure, as one; a tensor that is the same object in all stays plain."""
    flat = [tree_flatten(tree) for tree in trees]
    if any(spec != flat[0][1] for _, spec in flat):
        raise NotTogether("an output has another structure in one mode than in another")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return tree_unflatten([join_leaves(column) for column in columns], flat[0][1])


def join_leaves(column: Sequence[Any]) -> Any:
    """The leaves of all modes as one."""
    first = column[0]
    if all(leaf is first for leaf in column):
        return first
    if isinstance(first, PackedSequence):
        return packed_as(column, PerMode([leaf.data for leaf in column]))
    return PerMode(column) if isinstance(first, Tensor) else first


def packed_as(column: Sequence[PackedSequence], data: PerMode) -> PackedSequence:
    """``data``, packed as all of ``column`` are."""
    first = column[0]
    for other in column[1:]:
        for one, another in zip(first[1:], other[1:], strict=True):
            if one is not another and (one is None or another is None or not torch.equal(one, another)):
                raise NotTogether("sequences are packed in another order in one mode than in another")
    return first._replace(data=data)


def part_of(tree: Any, place: int) -> Any:
    """The nested value of the mode at ``place``, its tensors in contiguous memory."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten([part_of_leaf(leaf, place) for leaf in leaves], spec)


def part_of_leaf(leaf: Any, place: int) -> Any:
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=part_of_leaf(leaf.data, place))
    return part(leaf, place).contiguous() if isinstance(leaf, PerMode) else leaf
