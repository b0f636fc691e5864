"""Conditions on the sizes of inputs under which a program of torch.export was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNLIMITED = 2**31
"""The size from which on a bound is one of torch's own, of memory or of integers."""

LARGEST = 4096
"""The largest size to try."""


def limits_of(program: Any, symbols: Mapping[str, Any]) -> dict[str, int]:
    """The largest sizes of a program's open axes, where a condition bounds them."""
    found = {}
    for name, size in symbols.items():
        bounds = program.range_constraints.get(expression(size))
        upper = str(getattr(bounds, "upper", ""))  # torch's infinity is no number
        if upper.isdigit() and int(upper) < UNLIMITED:
            found[name] = int(upper)
    return found


def doubtful_sizes(
    symbols: Mapping[str, Any], example: Mapping[str, int], *, special: bool = False
) -> dict[str, tuple[int, ...]]:
    """Sizes along each open axis at which a condition does not hold that held for the example.

    Some are conditions of the operators, which the model does not fulfil then either; others are branches of a forward,
    of which the program has one. Running both tells.

    Args:
        symbols: Sizes of open axes, by names.
        example: The example's sizes.
        special: Look at conditions that some size is not 1, which torch adds by itself, instead of all others.
    """
    found = {}
    values = {expression(size): example[name] for name, size in symbols.items()}
    for name, size in symbols.items():
        symbol = expression(size)
        if getattr(symbol, "is_Symbol", False):
            guards = [guard for guard in guards_of(size) if symbol in guard.free_symbols]
            guards = [guard for guard in guards if is_special(guard) == special]
            sizes = {one for guard in guards for one in failing(guard, symbol, values)}
            found[name] = tuple(sorted(sizes | ({1} if special else set())))
    return found


def expression(size: Any) -> Any:
    """The expression of a size, of symbols."""
    return getattr(getattr(size, "node", None), "expr", size)


def guards_of(size: Any) -> list[Any]:
    """Conditions that torch has decided on sizes of the same program."""
    env = getattr(getattr(size, "node", None), "shape_env", None)
    return list(dict.fromkeys(guard.expr for guard in getattr(env, "guards", [])))


def is_special(guard: Any) -> bool:
    """Whether a condition says that a size is not 1, which torch treats by itself, mostly without harm."""
    return guard.func.__name__ in ("Unequality", "Ne") and "1" in map(str, guard.args)


def failing(guard: Any, symbol: Any, values: Mapping[Any, int]) -> Iterator[int]:
    """The size next below the example's, and the one next above, at which a condition does not hold."""
    own = values[symbol]
    numbers = {abs(int(one)) for one in guard.atoms() if one.is_Integer}
    near = {number + step for number in numbers | {own} for step in range(-2, 3)} | {*range(2, 9)}
    doubled = {own << power for power in range(1, 12)}
    tried = sorted(size for size in near | doubled | {own // 2} if 2 <= size <= LARGEST and size != own)
    for part in ([size for size in tried[::-1] if size < own], [size for size in tried if size > own]):
        size = next((size for size in part if not holds(guard, {**values, symbol: size})), None)
        if size is not None:
            yield size


def holds(guard: Any, values: Mapping[Any, int]) -> bool:
    """Whether a condition holds, or cannot be decided."""
    try:
        return bool(guard.subs(values))
    except (TypeError, ValueError, ArithmeticError, AssertionError):
        return True
