"""Runs of single modes merged into one of all: what differs gets a part for each mode."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_bln.per_mode import NotTogether, PerMode
from lightning_bln.sweep.pytree import is_identical

VALUES = (
    *(int, float, complex, str, bytes, type(None), range, slice, set, frozenset, np.ndarray, np.generic),
    *(torch.dtype, torch.device),
)
"""Types whose equal objects may stand for one another; of others, each mode may change its own."""


def merged(values: Sequence[Any], memo: dict[tuple[int, ...], tuple[Any, Any]]) -> Any:
    """The values of all modes as one.

    Args:
        values: A value for each mode, all of one structure.
        memo: Merged values by the identities of what they were made of, so that one object stays one.

    Raises:
        NotTogether: Something that is no tensor differs between modes.
    """
    first = values[0]
    if all(value is first for value in values):
        return first
    key = tuple(map(id, values))
    if key in memo:
        return memo[key][0]
    kind = type(first)
    if any(type(value) is not kind for value in values):
        raise NotTogether("what a step keeps is of another type in one mode than in another")
    made: Any = None
    if isinstance(first, Tensor):
        made = merged_tensors(values)
    elif isinstance(first, dict):
        made = merged_dicts(values, memo)
    elif isinstance(first, (list, tuple, deque)):
        if len({len(value) for value in values}) != 1:
            raise NotTogether("what a step keeps has another length in one mode than in another")
        rows = [merged(column, memo) for column in zip(*values, strict=True)]
        made = copy(first)
        if isinstance(first, tuple):
            made = tuple.__new__(kind, rows)
        else:
            made.clear()
            made.extend(rows)
    elif isinstance(first, VALUES) and all(is_identical(value, first) for value in values):
        made = copy(first) if isinstance(first, (set, np.ndarray)) else first
    else:
        raise NotTogether(f"what a step keeps differs between modes: a {kind.__name__}")
    memo[key] = made, values
    return made


def merged_tensors(values: Sequence[Any]) -> Any:
    """Tensors of all modes: one, if they are equal, for what a step writes into it may not differ."""
    first = values[0]
    if any(value.shape != first.shape or value.dtype != first.dtype for value in values):
        raise NotTogether("a tensor that a step keeps has another shape in one mode than in another")
    if first.layout != torch.strided or any(value.requires_grad for value in values):
        raise NotTogether("a tensor that a step keeps cannot be stacked")
    with torch.inference_mode(False):  # a copy of each, since the runs may be needed again
        if all(is_identical(value, first) for value in values):
            return first.detach().clone()
        return PerMode.of_stack(torch.stack([value.detach() for value in values]))


def merged_dicts(values: Sequence[Any], memo: Any) -> Any:
    """Dictionaries of all modes, which have the same keys in the same order."""
    first, keys = values[0], list(values[0])
    if any(list(value) != keys for value in values):
        raise NotTogether("a dictionary that a step keeps has other keys in one mode than in another")
    made = copy(first)
    for key in keys:
        made[key] = merged([value[key] for value in values], memo)
    return made
