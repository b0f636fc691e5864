"""The ways of using a module, and the list they are entered in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.as_torch.layers import Case

Check = Callable[[Case], None]


class Way(NamedTuple):
    """One way of using a module."""

    name: str
    line: str
    """Explanation that the page prints."""
    check: Check
    """Raises unless the case is right."""
    applies: Callable[[Case], bool]


WAYS: dict[str, Way] = {}


def everything(case: Case) -> bool:
    """Every case."""
    return True


def few(case: Case) -> bool:
    """Those that stand for the others."""
    return case.few


def way(name: str, line: str, applies: Callable[[Case], bool] = everything) -> Callable[[Check], Check]:
    """Enter a check into the list."""

    def enter(check: Check) -> Check:
        WAYS[name] = Way(name, line, check, applies)
        return check

    return enter
