"""Contents of one value put into the objects of another."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bln.sweep.pytree import is_identical


def written(target: Any, source: Any, memo: dict[int, Any]) -> Any:
    """``target`` with the contents of ``source``, all the way down; or ``source`` where it cannot have them.

    Args:
        target: The object that others may refer to.
        source: What it is to hold.
        memo: Results so far by the identity of the source.
    """
    if source is target or type(source) is not type(target):
        return source
    if id(source) in memo:
        return memo[id(source)]
    made = source
    if isinstance(source, Tensor):
        made = written_tensor(target, source)
    elif isinstance(source, np.ndarray):
        if source.shape == target.shape and source.dtype == target.dtype and target.flags.writeable:
            target[...] = source
            made = target
    elif isinstance(source, (list, deque)):
        rows = [written(*pair, memo) for pair in zip(target, source, strict=False)]
        rows += list(source)[len(rows) :]
        target.clear()
        target.extend(rows)
        made = target
    elif isinstance(source, dict):
        entries = {key: written(target.get(key), value, memo) for key, value in source.items()}
        target.clear()
        target.update(entries)
        made = target
    elif isinstance(source, set):
        target.clear()
        target.update(source)
        made = target
    elif type(source) is tuple and len(source) == len(target):
        parts = tuple(written(*pair, memo) for pair in zip(target, source, strict=True))
        made = target if all(one is other for one, other in zip(parts, target, strict=True)) else parts
    memo[id(source)] = made
    return made


def written_tensor(target: Tensor, source: Tensor) -> Tensor:
    """``target`` with the numbers of ``source``, if it has their shape and kind and no graph needs its own."""
    fits = target.shape == source.shape and target.dtype == source.dtype and target.device == source.device
    if not fits or isinstance(target, nn.Parameter) or target.requires_grad or target.layout != torch.strided:
        return source
    if not is_identical(target, source):
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(source)
    return target
