"""Elementwise operations of recorded steps in Triton's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_bln.recurrence.program.graph import SUMS, Value

Written = Callable[[Sequence[str], float, float], str]
"""Text of an operation from those of its operands and its two numbers."""


def chosen(comparison: str) -> Written:
    """One where a comparison with the first number holds, else zero."""
    return lambda a, s, u: f"tl.where({a[0]} {comparison} {s!r}, 1.0, 0.0)"


ON_SUMS: dict[str, str] = {
    "sum": "{}",
    "sigmoid": "tl.sigmoid({})",
    "tanh": "tanh({})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "softplus": "softplus({})",
    "hardsigmoid": "hardsigmoid({})",
}
"""Functions of the sum of all operands."""

ELEMENTWISE: dict[str, Written] = {
    "sigmoid_gradient": lambda a, s, u: f"{a[0]} * {a[1]} * (1.0 - {a[1]})",
    "tanh_gradient": lambda a, s, u: f"{a[0]} * (1.0 - {a[1]} * {a[1]})",
    "relu_gradient": lambda a, s, u: f"tl.where({a[1]} > 0.0, {a[0]}, 0.0)",
    "softplus_gradient": lambda a, s, u: f"{a[0]} * (1.0 - tl.exp(-{a[1]}))",
    "hardsigmoid_gradient": lambda a, s, u: f"tl.where(({a[1]} > 0.0) & ({a[1]} < 1.0), {a[0]} * (1.0 / 6.0), 0.0)",
    "affine": lambda a, s, u: f"{s!r} * {a[0]} + {u!r}",
    "blend": lambda a, s, u: f"{s!r} * {a[0]} + {u!r} * {a[1]}",
    "multiply": lambda a, s, u: f"{a[0]} * {a[1]}",
    "addcmul": lambda a, s, u: f"{a[0]} + {s!r} * {a[1]} * {a[2]}",
    "lerp": lambda a, s, u: f"{a[0]} + {a[2]} * ({a[1]} - {a[0]})",
    "difference": lambda a, s, u: f"{a[0]} * ({a[1]} - {a[2]})",
    "divide": lambda a, s, u: f"{a[0]} / {a[1]}",
    "exp": lambda a, s, u: f"tl.exp({a[0]})",
    "maximum": lambda a, s, u: f"tl.where(({a[0]} > {a[1]}) | ({a[0]} != {a[0]}), {a[0]}, {a[1]})",
    "maximum_gradient": lambda a, s, u: (
        f"tl.where({a[1]} > {a[2]}, {a[0]}, tl.where({a[1]} < {a[2]}, 0.0, 0.5 * {a[0]}))"
    ),
    "equals": chosen("=="),
    "differs": chosen("!="),
    "greater": chosen(">"),
    "at_least": chosen(">="),
    "less": chosen("<"),
    "at_most": chosen("<="),
    "where": lambda a, s, u: f"tl.where({a[0]} != 0.0, {a[1]}, {a[2]})",
    "clamp_max": lambda a, s, u: f"tl.where({a[0]} > {s!r}, {s!r}, {a[0]})",
    "clamp_max_gradient": lambda a, s, u: f"tl.where({a[1]} > {s!r}, 0.0, {a[0]})",
}


def written(value: Value, operands: Sequence[str]) -> str:
    """An operation on operands of these names."""
    if value.op in SUMS:
        return ON_SUMS[value.op].format(f"({' + '.join(operands)})")
    return ELEMENTWISE[value.op](operands, *value.numbers)
