"""Comparison of a file with its model: results at batches of many sizes, and times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.exporting.axes import Axes, is_small, other_sizes
from lightning_bln.exporting.calls import Call, tensors_in
from lightning_bln.exporting.errors import ExportError, first_line
from lightning_bln.exporting.formats import Run
from lightning_bln.folding.difference import Difference, difference, leaves
from lightning_bln.sweep.pytree import kept

TOLERANCES = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}
"""Differences that rounding explains, by the dtype of results, relative to their largest number or to 1."""
COARSE = 1e-2
"""That of half precision."""

SECONDS, REPEATS = 1.0, 30
"""Bounds of the time to measure a median for, and of its runs."""


def allowed_for(tolerance: float | None) -> Callable[[Any], float]:
    """A function that gives the tolerance of a result, by its dtype unless one is given."""

    def allowed(result: Any) -> float:
        if tolerance is not None:
            return tolerance
        if not isinstance(result, Tensor):
            return 0.0
        coarse = COARSE if result.is_floating_point() or result.is_complex() else 0.0  # of integers, which are equal
        return TOLERANCES.get(result.dtype, coarse)

    return allowed


class Comparison:
    """A model's results, beside which those of files are put.

    Args:
        model: The model, in evaluation.
        calls: What it is called with.
        tolerance: Difference that is accepted, by default as the dtype of results explains by rounding.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call], tolerance: float | None) -> None:
        self.model, self.calls, self.allowed = model, calls, allowed_for(tolerance)
        self.expected = [self.results(call) for call in calls]
        for place, one in leaves(self.expected[0]):
            if not isinstance(one, Tensor) and one is not None:
                raise ExportError(
                    f"output{place} of {type(model).__name__}.forward is of type {type(one).__name__}, where a file "
                    "gives tensors alone; export a module whose forward returns tensors"
                )

    def results(self, call: Call) -> Any:
        """The results of the model itself."""
        with torch.no_grad():
            return kept(call.run(self.model))  # a model may write into what it has returned

    def distance(self, found: Any, expected: Any) -> Difference:
        """The difference of results, relative to their largest number or to 1."""
        return difference(found, expected, self.allowed, least=1.0)

    def check_repeats(self) -> None:
        """Raise where the model gives other results when it is called once more, as one that draws numbers does."""
        distance = self.distance(self.results(self.calls[0]), self.expected[0])
        if not distance.is_alike:
            raise ExportError(
                f"{type(self.model).__name__} itself gives other results on a second call, by up to "
                f"{distance.largest:.3g}: its forward draws numbers or keeps what it computed; export one that repeats"
            )

    def remarks(self) -> list[str]:
        """A sentence on results that are no numbers."""
        every = [one for expected in self.expected for one in tensors_in(expected)]
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
        own, others = (", ".join(str(x.dtype) for x in tensors_in(one)) for one in (expected, found))
        if own != others:
            raise ExportError(f"the file's results on an input of shape {shapes} are of {others}, not {own}")
        distance = self.distance(found, expected)
        if not distance.is_alike:
            raise ExportError(
                f"the file's results differ from the model's by up to {distance.largest:.3g} on an input of shape "
                f"{shapes}; the tolerance is {distance.tolerance:g}, relative to the largest number"
            )
        return distance.largest

    def check_sizes(self, run: Run, axes: Axes) -> None:
        """Raise where a file does not serve other sizes along an open axis as the model does.

        Where some size becomes 1 the file may fail, but not compute something else.
        """
        call = self.calls[0]
        for name, places in axes.open.items():
            tried, may_fail = (
                [*other_sizes(call, places, name), *axes.doubtful.get(name, ())],
                axes.special.get(name, ()),
            )
            for size in dict.fromkeys((*tried, *may_fail)):
                if not is_small(call, places, size) and size not in tried[:2]:
                    continue
                changed = call.resized(places, size)
                try:
                    expected = self.results(changed)
                except Exception:  # the model does not take this size, and need not
                    continue
                if size in tried or runs(run, changed):
                    self.at(run, changed, expected)


def runs(run: Run, call: Call) -> bool:
    """Whether a file takes a call."""
    try:
        run(call)
    except Exception:  # of the library that runs the file
        return False
    return True


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
