"""The difference of two models' outputs, whatever these are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bln.sweep.pytree import is_identical


@dataclass(frozen=True)
class Difference:
    """Distance of outputs from those expected, at the place where they are furthest from what is allowed."""

    largest: float
    """The largest distance of two numbers; infinite where outputs are of another kind, or one is no number."""
    relative: float
    """That distance relative to the largest number expected; of integers the share of entries that differ."""
    tolerance: float
    """The relative distance that is allowed."""
    place: str = ""
    """The output, such as ``[0]``."""

    @property
    def excess(self) -> float:
        """The relative distance over what is allowed: outputs are alike up to 1; NaN is no number up to 1."""
        if self.tolerance == 0.0:
            return math.inf if self.relative else 0.0
        return self.relative / self.tolerance

    @property
    def is_alike(self) -> bool:
        """Whether the distance is allowed."""
        return self.excess <= 1.0


def difference(found: Any, expected: Any, tolerance: float | Callable[[Any], float], least: float = 0.0) -> Difference:
    """Compare outputs place by place, and return the difference that exceeds its tolerance most.

    Tensors have to be of one shape and dtype. Floats and complex numbers differ by their distance relative to the
    largest number expected, integers by the share of entries that are not equal, and all else has to be equal. Where
    one is NaN or infinite, the other one has to be the same.

    Args:
        found: Outputs: tensors and other values, nested.
        expected: Those to compare with.
        tolerance: The relative distance that is allowed, or a function that gives it for an expected value.
        least: The number that the largest one counts as, if it is smaller.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.1).excess
        2.0
    """
    given = tolerance if callable(tolerance) else lambda _: tolerance
    own, others = dict(leaves(found)), dict(leaves(expected))
    if own.keys() != others.keys():
        place = next(name for name in (*others, *own) if not (name in own and name in others))
        return Difference(math.inf, math.inf, given(others.get(place)), place)
    each = [
        Difference(*distance(own[place], other, least), tolerance=given(other), place=place)
        for place, other in others.items()
    ]
    return max(each, key=lambda one: math.inf if math.isnan(one.excess) else one.excess)


def leaves(value: Any, name: str = "", seen: Collection[int] = ()) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values in nested outputs, each by its place; attributes of objects are among them."""
    if isinstance(value, (Tensor, nn.Module, str)) or id(value) in seen:
        yield name, value
        return
    seen = {*seen, id(value)}
    if isinstance(value, Mapping):
        inner = [(f"[{key!r}]", one) for key, one in value.items()]
    elif isinstance(value, (tuple, list)):
        inner = [(f"[{place}]", one) for place, one in enumerate(value)]
    else:
        inner = [(f".{key}", one) for key, one in getattr(value, "__dict__", {}).items()]
    if not inner:
        yield name, value
    for place, one in inner:
        yield from leaves(one, name + place, seen)


def distance(found: Any, expected: Any, least: float) -> tuple[float, float]:
    """The largest distance of two values, and the relative one."""
    found, expected = as_tensors(found, expected)
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return (0.0, 0.0) if is_equal(found, expected) else (math.inf, math.inf)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf, math.inf
    if found.layout != torch.strided or expected.layout != torch.strided:
        found, expected = found.to_dense(), expected.to_dense()
    if not expected.numel() or found.is_meta or expected.is_meta:
        return 0.0, 0.0
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if not (expected.is_floating_point() or expected.is_complex()):
        differs = found != expected  # of the integers themselves: floats have fewer digits
        gap = (found.double() - expected.double()).abs().max() if bool(differs.any()) else torch.zeros(())
        return max(float(gap), float(differs.any())), float(differs.double().mean())
    exact = torch.promote_types(expected.dtype, torch.float64)
    found, expected = found.to(exact), expected.to(exact)
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    if not bool((is_same | (found.isfinite() & expected.isfinite())).all()):
        return math.inf, math.inf
    size = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
    largest = float(torch.where(is_same, torch.zeros_like(found), found - expected).abs().max())
    return largest, largest / (max(size, least) or 1.0)


def as_tensors(found: Any, expected: Any) -> tuple[Any, Any]:
    """Two values, arrays of numbers among them as tensors, and two numbers too if one has digits after the point."""
    both = (found, expected)
    is_number = all(isinstance(one, (int, float, complex)) for one in both)
    if is_number and any(isinstance(one, (float, complex)) for one in both):
        kind = torch.complex128 if any(isinstance(one, complex) for one in both) else torch.float64
        return torch.tensor(found, dtype=kind), torch.tensor(expected, dtype=kind)
    is_array = [isinstance(one, np.ndarray) and one.dtype.kind in "biufc" for one in both]
    made = [torch.as_tensor(one) if is_numeric else one for one, is_numeric in zip(both, is_array, strict=True)]
    return made[0], made[1]


def is_equal(found: Any, expected: Any) -> bool:
    """Whether two values are equal; of objects that compare by identity, which a copy has another of, the type is."""
    if getattr(type(expected), "__eq__", None) is object.__eq__:
        return type(found) is type(expected)
    return is_identical(found, expected)
