"""Checks of arguments: each raises by name, value and way out, or returns the value as Python's own type."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch


def check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    is_name = value is None or isinstance(value, str)  # an array or a tensor would be compared element by element
    if not is_name or value not in choices:
        raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, choices))}")


def check_bool(name: str, value: Any) -> bool:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}, but it must be a bool; pass True or False")
    return value


def check_int(name: str, value: Any, least: int | None = None) -> int:
    """Raise unless ``value`` is an integer, and no less than ``least``, which is 0 or 1.

    Example:
        >>> check_int("hidden_size", 3.0)
        Traceback (most recent call last):
        TypeError: hidden_size=3.0, but it must be an integer; pass an int
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}, but it must be an integer; pass an int")
    if least is not None and value < least:
        needed = "be positive" if least else "not be negative"
        raise ValueError(f"{name}={value}, but it must {needed}; pass at least {least}")
    return int(value)


def check_axes(name: str, value: Any, axes: int, least: int) -> None:
    """Raise unless ``value`` is an integer, or has one for each axis."""
    parts = value if isinstance(value, (tuple, list)) else (value,) * axes
    if len(parts) != axes:
        raise ValueError(f"{name}={value}, but {axes} are needed, one for each spatial axis; pass these, or an int")
    for part in parts:
        check_int(name, part, least)


def check_number(name: str, value: Any) -> float:
    """Raise unless ``value`` is a finite number."""
    number = as_float(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value}, but it must be finite; pass another number")
    return number


def check_probability(name: str, value: Any) -> float:
    """Raise unless ``value`` is a number in [0, 1]."""
    number = as_float(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}={value}, but it is a probability; pass a number in [0, 1]")
    return number


def check_option(name: str, value: Any, default: Any) -> None:
    """Raise unless a cell's option is a bool where its default is one, and no name or flag where that is a number."""
    if isinstance(default, bool):
        check_bool(name, value)
    elif isinstance(default, Real) and isinstance(value, (str, bool, float)):
        check_number(name, value)


def check_eps(eps: Any) -> float:
    """Raise unless ``eps`` can be added to a variance."""
    number = as_float("eps", eps)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"eps={eps}, but it must be finite and not negative; pass a small positive number")
    return number


def check_momentum(momentum: Any) -> float | None:
    """Raise unless ``momentum`` is ``None`` or a share of a batch."""
    if momentum is None:
        return None
    number = as_float("momentum", momentum)
    if not 0 < number <= 1:
        raise ValueError(f"momentum={momentum}, but it must lie in (0, 1], or be None to gather and freeze")
    return number


def check_scale(scale: Any) -> bool | float:
    """Raise unless ``scale`` is a bool or a finite number."""
    return scale if isinstance(scale, bool) else check_number("scale", scale)


def check_floating(dtype: Any) -> None:
    """Raise unless ``dtype`` is ``None`` or one in which parameters learn."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}, but it must be a torch.dtype; pass one such as torch.float32")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}, but it holds no real fractions; pass one such as torch.float32")


def as_float(name: str, value: Any) -> float:
    """``value`` as a float; raise unless it is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}, but it must be a number; pass a float")
    return float(value)
