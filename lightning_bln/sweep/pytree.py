"""Nested inputs and outputs: comparison leaf by leaf, and the axes along which modes are laid out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln import _torch
from lightning_bln._torch import tree_flatten, tree_map
from lightning_bln.recurrence.fan_out import order_of


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nested value, those of a packed batch among them."""
    leaves = tree_flatten(value)[0]
    parts = [part for leaf in leaves for part in (leaf if isinstance(leaf, PackedSequence) else (leaf,))]
    return [part for part in parts if isinstance(part, Tensor)]


def versions(value: Any) -> list[int] | None:
    """The number of writes into each tensor; None where one is an inference tensor, which does not count them."""
    found = tensors(value)
    return None if any(tensor.is_inference() for tensor in found) else [_torch.writes(tensor) for tensor in found]


def kept(value: Any) -> Any:
    """A nested value whose tensors are copies, so that it stays as it is, whatever is written into it later."""
    return tree_map(copied, value)


def copied(leaf: Any) -> Any:
    if isinstance(leaf, PackedSequence):
        return leaf._replace(data=leaf.data.clone())
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def trees_match(a: Any, b: Any, same_leaf: Callable[[Any, Any], bool]) -> bool:
    """Whether two nested values have the same containers and, by ``same_leaf``, the same leaves."""
    (leaves, spec), (others, other) = tree_flatten(a), tree_flatten(b)
    return spec == other and all(map(same_leaf, leaves, others))


def is_same_input(a: Any, b: Any) -> bool:
    """Whether a module computes the same from either leaf; objects of unknown types have to be one object."""
    if a is b:
        return True
    if isinstance(a, PackedSequence) and isinstance(b, PackedSequence):
        return all(map(is_same_input, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and isinstance(a, (int, float, str, bytes, tuple)) and a == b


def is_close(a: Any, b: Any) -> bool:
    """Whether two leaves are equal up to rounding, and not finite at the same places."""
    if isinstance(a, PackedSequence) and isinstance(b, PackedSequence):
        return is_close(a.data, b.data) and has_same_order(a, b)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return is_equal(a, b)
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(1e-5, 8 * torch.finfo(a.dtype).eps)
    finite = a[a.isfinite()]
    scale = float(finite.abs().amax()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two objects of unknown types are equal; those that compare element by element have to be one object."""
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError):
        return False


def has_same_order(a: PackedSequence, b: PackedSequence) -> bool:
    """Whether two packed batches hold sequences of the same lengths in the same order, given or implied."""
    return torch.equal(a.batch_sizes, b.batch_sizes) and torch.equal(order_of(a).cpu(), order_of(b).cpu())


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
        return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(trees_match(value, b[key], is_identical) for key, value in a.items())
    if hasattr(a, "__len__") and hasattr(a, "__iter__") and not isinstance(a, (str, bytes, set, frozenset)):
        return trees_match(list(a), list(b), is_identical)
    return bool(a == b) or (a != a and b != b)


def is_close_or_identical(a: Any, b: Any) -> bool:
    """:func:`is_close` of two tensors of floats, :func:`is_identical` of all else."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
        return is_close(a, b)
    if isinstance(a, float) and isinstance(b, float):
        return is_close(torch.tensor(a), torch.tensor(b))
    return is_identical(a, b)
