"""Comparison of a file with its model: results at batches of many sizes, and times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from lightning_bln.exporting.axes import Axes, other_sizes
from lightning_bln.exporting.calls import Call, tensors_in
from lightning_bln.exporting.errors import ExportError, first_line
from lightning_bln.exporting.formats import Run

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Differences that rounding explains, by the dtype of results, relative to their largest number or to 1."""
COARSE, TINY = 1e-2, 1e-300
"""That of half precision, and a divisor for those of integers, which have to be equal."""

SECONDS, REPEATS = 1.0, 30
"""Bounds of the time to measure a median for, and of its runs."""


@dataclass(frozen=True)
class Difference:
    """Distance of results from those expected."""

    largest: float
    """The largest difference of two numbers."""
    excess: float
    """The largest one over what its tensor's tolerance allows; results are alike up to 1."""
    tolerance: float
    """The tolerance of that tensor, relative to its largest number or to 1."""


def difference(found: Any, expected: Any, tolerance: float | None = None) -> Difference:
    """The difference of results, by tolerances of their dtypes unless one is given.

    Example:
        >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.1)
        Difference(largest=0.5, excess=2.0, tolerance=0.1)
    """
    left, right = tensors_in(found), tensors_in(expected)
    if [one.shape for one in left] != [one.shape for one in right]:
        return Difference(math.inf, math.inf, tolerance or 0.0)
    each = [Difference(0.0, 0.0, tolerance or 0.0)]
    for one, other in zip(left, right, strict=True):
        if other.numel() == 0 or torch.equal(one, other):
            continue
        a, b = one.detach().double(), other.detach().double()
        distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        largest = float(distance.nan_to_num(math.inf, math.inf).max())
        own = TOLERANCES.get(other.dtype, COARSE if other.is_floating_point() else 0.0)
        allowed = own if tolerance is None else tolerance
        size = max(1.0, float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        each.append(Difference(largest, largest / size / max(allowed, TINY), allowed))
    return Difference(max(one.largest for one in each), *max((one.excess, one.tolerance) for one in each))


class Comparison:
    """A model's results, beside which those of files are put.

    Args:
        model: The model, in evaluation.
        calls: What it is called with.
        tolerance: Difference that is accepted, by default as the dtype of results explains by rounding.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], tolerance: float | None) -> None:
        self.model, self.calls, self.tolerance = model, calls, tolerance
        self.expected = [self.results(call) for call in calls]

    def results(self, call: Call) -> Any:
        """The results of the model itself."""
        with torch.no_grad():
            return call.run(self.model)

    def check_repeats(self) -> None:
        """Raise where the model gives other results when it is called once more, as one that draws numbers does."""
        distance = difference(self.results(self.calls[0]), self.expected[0], self.tolerance)
        if distance.excess > 1:
            raise ExportError(
                f"{type(self.model).__name__} itself gives other results on a second call, by up to "
                f"{distance.largest:.3g}: its forward draws numbers or keeps what it computed; export one that repeats"
            )

    def remarks(self) -> list[str]:
        """A sentence on results that are no numbers."""
        every = [one for expected in self.expected for one in tensors_in(expected) if one.is_floating_point()]
        return ["the model's results hold NaN"] if any(bool(one.isnan().any()) for one in every) else []

    def largest(self, run: Run) -> float:
        """The largest difference of a file's results from the model's.

        Raises:
            ExportError: It is above the tolerance.
        """
        return max(self.at(run, call, one) for call, one in zip(self.calls, self.expected, strict=True))

    def at(self, run: Run, call: Call, expected: Any) -> float:
        """The largest difference at one call; raise where it is above the tolerance."""
        shapes = " and ".join(str(tuple(x.shape)) for x in call.tensors())
        try:
            found = run(call)
        except Exception as error:  # of the library that runs the file
            raise ExportError(f"the file fails on an input of shape {shapes}: {first_line(error)}") from error
        own, others = (", ".join(str(tuple(x.shape)) for x in tensors_in(one)) for one in (expected, found))
        if own != others:
            raise ExportError(f"the file's results on an input of shape {shapes} are of shape {others}, not {own}")
        distance = difference(found, expected, self.tolerance)
        if distance.excess > 1:
            raise ExportError(
                f"the file's results differ from the model's by up to {distance.largest:.3g} on an input of shape "
                f"{shapes}; the tolerance is {distance.tolerance:g}, relative to the largest number"
            )
        return distance.largest

    def check_sizes(self, run: Run, axes: Axes) -> None:
        """Raise where a file does not serve other sizes along an open axis as the model does."""
        call = self.calls[0]
        for name, places in axes.open.items():
            for size in other_sizes(call, places, name):
                changed = call.resized(places, size)
                try:
                    expected = self.results(changed)
                except Exception:  # the model does not take this size, and need not
                    continue
                self.at(run, changed, expected)


def milliseconds(functions: Sequence[Callable[[], Any]], samples: int) -> list[float]:
    """Median times of functions for a sample, measured in turns."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + SECONDS
    with torch.no_grad():
        while len(times[0]) < 3 or (len(times[0]) < REPEATS and time.perf_counter() < end):
            for one, function in zip(times, functions, strict=True):
                start = time.perf_counter()
                function()
                one.append(time.perf_counter() - start)
    return [1e3 * median(one) / samples for one in times]
