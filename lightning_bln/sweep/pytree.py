"""Nested inputs and outputs: comparison leaf by leaf, and the axes along which modes are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_bln import _torch
from lightning_bln._torch import tree_flatten


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested value."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def versions(value: Any) -> list[int] | None:
    """The number of writes into each tensor; None where one is an inference tensor, which does not count them."""
    found = tensors(value)
    return None if any(tensor.is_inference() for tensor in found) else [_torch.writes(tensor) for tensor in found]


def trees_match(a: Any, b: Any, same_leaf: Callable[[Any, Any], bool]) -> bool:
    """Whether two nested values have the same containers and, by ``same_leaf``, the same leaves."""
    (leaves, spec), (others, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(map(same_leaf, leaves, others))


def is_same_input(a: Any, b: Any) -> bool:
    """Whether a module computes the same from either leaf; objects of unknown types have to be one object."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and isinstance(a, (int, float, str, bytes, tuple)) and a == b


def is_close(a: Any, b: Any) -> bool:
    """Whether two leaves are equal up to rounding."""
    if not isinstance(a, Tensor):
        return a is b or a == b
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(1e-5, 8 * torch.finfo(a.dtype).eps)
    scale = float(a.abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def is_identical(a: Any, b: Any) -> bool:
    """Whether two leaves have the same type and values; NaN equals NaN.

    Containers that torch's pytree does not know are leaves: these are walked here.
    """
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(trees_match(value, b[key], is_identical) for key, value in a.items())
    if hasattr(a, "__len__") and hasattr(a, "__iter__") and not isinstance(a, (str, bytes, set, frozenset)):
        return trees_match(list(a), list(b), is_identical)
    return bool(a == b) or (a != a and b != b)


def find_axes(plain: Any, fanned: Any, size: int) -> list[int | None] | None:
    """For each leaf, the axis along which ``fanned`` is ``size`` times as long; None where the trees do not fit."""
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


def repeated(value: Any, times: int) -> Any:
    """``value`` ``times`` times along its first axis, if it is a tensor that has one."""
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
