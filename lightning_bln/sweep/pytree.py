"""Nested inputs and outputs: whether two are the same, and along which axes modes were laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import tree_flatten


def find_axes(plain: Any, fanned: Any, size: int) -> list[int | None] | None:
    """For each tensor, the axis along which ``fanned`` is ``size`` times as long; None where they do not match."""
    (leaves, spec), (many, other) = tree_flatten(plain), tree_flatten(fanned)
    if spec != other:
        return None
    axes: list[int | None] = []
    for one, all_modes in zip(leaves, many, strict=True):
        if not isinstance(one, Tensor):
            if one is not all_modes and one != all_modes:
                return None
            axes.append(None)
            continue
        if one.ndim != all_modes.ndim:
            return None
        differing = [axis for axis in range(one.ndim) if one.shape[axis] != all_modes.shape[axis]]
        if not differing:
            axes.append(None)
        elif len(differing) == 1 and one.shape[differing[0]] * size == all_modes.shape[differing[0]]:
            axes.append(differing[0])
        else:
            return None
    return axes


def same_tree(a: Any, b: Any) -> bool:
    """Whether two inputs are equal."""
    (leaves, spec), (others, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(same_leaf(one, two) for one, two in zip(leaves, others, strict=True))


def same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and isinstance(a, (int, float, str, bytes, tuple)) and a == b


def close_tree(a: Any, b: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    return all(close_leaf(one, two) for one, two in zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True))


def close_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return a is b or a == b
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(1e-5, 8 * torch.finfo(a.dtype).eps)
    scale = float(a.abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def repeated(value: Any, times: int) -> Any:
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
