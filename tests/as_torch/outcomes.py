"""What comes of a way of use and a layer, over all cases."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from tests.as_torch import carrying, compiling, derivatives, running
from tests.as_torch.expected import EXPECTED
from tests.as_torch.layers import Case
from tests.as_torch.ways import WAYS, Way

for module in (running, derivatives, compiling, carrying):  # in which order the page names their ways
    for own in [each for each in WAYS.values() if each.check.__module__ == module.__name__]:
        WAYS[own.name] = WAYS.pop(own.name)

RIGHT, WRONG, ABSENT = "yes", "no", ""


class Outcome(NamedTuple):
    """A cell of the page."""

    text: str
    """Whether all cases are right, and the numbers of the documented errors."""
    failures: tuple[str, ...]
    """Cases that are wrong, or that raise what is not documented."""
    right: int
    documented: int


def documented(way: Way, case: Case) -> int | None:
    """Number of the error that the way raises in this case."""
    for number, error in enumerate(EXPECTED, 1):
        if way.name in error.ways and error.applies(case):
            return number
    return None


def fails(way: Way, case: Case, number: int | None) -> str | None:
    """How a case fails; ``None`` if it is right or raises the documented error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            way.check(case)
    except Exception as error:
        if number is not None:
            known = EXPECTED[number - 1]
            if isinstance(error, known.error) and re.search(known.pattern, str(error)):
                return None
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{case.label}: {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return None if number is None else f"{case.label}: right, but an error is documented: {number}"


def outcome(way: Way, cases: Sequence[Case], *, has_errors: bool = True) -> Outcome:
    """Try a way on all cases that it applies to."""
    failures, numbers, right = [], [], 0
    cases = [case for case in cases if way.applies(case)]
    for case in cases:
        number = documented(way, case) if has_errors else None
        failure = fails(way, case, number)
        if failure is not None:
            failures.append(failure)
        elif number is None:
            right += 1
        else:
            numbers.append(number)
    notes = "".join(f" [{number}]" for number in sorted(set(numbers)))
    text = (RIGHT * bool(right) + notes).strip() if cases else ABSENT
    return Outcome(WRONG if failures else text, tuple(failures), right, len(numbers))
