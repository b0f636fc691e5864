"""Heat map of a metric over the statistics modes: batch statistics down, feature statistics across, or one of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_bln.modes import StatisticsMode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"p": "population", "c": "current"}
"""Sources of a statistic by their letter."""

BATCH, FEATURE = slice(0, 2), slice(2, 4)
"""Letters of the batch statistics and of the feature statistics."""

FRAMES = {"best": ("dotted", 0.36), "incumbent": ("dashed", 0.42), "chosen": ("solid", 0.48)}
"""Line style and half the side length of each mark's frame."""


class Axis(NamedTuple):
    """One direction of the heat map."""

    letters: slice
    """The letters of a mode that give its place."""
    label: str

    @property
    def values(self) -> list[str]:
        """The letters at each place."""
        return ["".join(one) for one in product("pc", repeat=self.letters.stop - self.letters.start)]

    @property
    def ticks(self) -> list[str]:
        """A name for each place."""
        if len(self.values) == 2:
            return [NAMES[letter] for letter in self.values]
        return [f"mean {NAMES[one[0]]}\nvar {NAMES[one[1]]}" for one in self.values]

    def place(self, mode: StatisticsMode) -> int:
        """The place of ``mode``."""
        return self.values.index(mode[self.letters])


def axes_of(modes: Iterable[StatisticsMode]) -> tuple[Axis, Axis]:
    """Rows and columns for ``modes``: mean and variance where they differ in one pair of letters only."""
    modes = list(modes)
    batch, feature = ({mode[half] for mode in modes} for half in (BATCH, FEATURE))
    for name, start, differing, same in (("batch", 0, batch, feature), ("feature", 2, feature, batch)):
        if len(differing) > 1 and len(same) == 1:
            mean, var = slice(start, start + 1), slice(start + 1, start + 2)
            return Axis(mean, f"{name} mean"), Axis(var, f"{name} variance")
    return Axis(BATCH, "batch statistics"), Axis(FEATURE, "feature statistics")


def draw(
    scores: Mapping[StatisticsMode, float],
    title: str,
    marks: Mapping[str, StatisticsMode | None],
    *,
    small_is_good: bool,
) -> Figure:
    """Draw a 4 x 4 heat map, or a 2 x 2 one for modes that differ in their batch letters or feature letters only.

    Args:
        scores: The metric's value in each mode.
        title: The metric's name.
        marks: The modes to frame under the names of :data:`FRAMES`; None frames nothing.
        small_is_good: Whether small values have the bright colours.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    down, across = axes_of([*scores, *(mode for mode in marks.values() if mode is not None)])
    grid = [[math.nan] * len(across.values) for _ in down.values]
    for mode, value in scores.items():
        grid[down.place(mode)][across.place(mode)] = value
    figure = Figure(figsize=(6.4, 5.4), layout="compressed")
    axes = figure.add_subplot()
    finite = [value for value in scores.values() if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    image = axes.imshow(grid, cmap=colormaps["viridis_r" if small_is_good else "viridis"], vmin=low, vmax=high)
    for mode, value in scores.items():
        depth = (value - low) / (high - low) if high > low else 0.5
        color = "white" if math.isfinite(depth) and (depth > 0.5) == small_is_good else "black"
        axes.text(across.place(mode), down.place(mode), number(value), ha="center", va="center", color=color)
    add_frames(axes, down, across, marks)
    axes.set_xticks(range(len(across.values)), across.ticks, fontsize=7)
    axes.set_yticks(range(len(down.values)), down.ticks, fontsize=7)
    axes.set_xlabel(across.label)
    axes.set_ylabel(down.label)
    axes.set_title(title)
    if axes.patches:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.colorbar(image, ax=axes)
    return figure


def add_frames(axes: Any, down: Axis, across: Axis, marks: Mapping[str, StatisticsMode | None]) -> None:
    """Frame the marked modes; where the best one is chosen, or none is, its frame is the solid one."""
    from matplotlib.patches import Rectangle

    best_is_chosen = marks.get("chosen") in (None, marks.get("best"))
    for name, mode in marks.items():
        if mode is None or (name == "chosen" and best_is_chosen):
            continue
        style, inset = FRAMES["chosen" if name == "best" and best_is_chosen else name]
        corner = (across.place(mode) - inset, down.place(mode) - inset)
        label = f"{name}: {mode}"
        axes.add_patch(Rectangle(corner, 2 * inset, 2 * inset, fill=False, ec="crimson", lw=2.5, ls=style, label=label))


def number(value: float | None) -> str:
    """A score with four decimals, or four digits where it is very large or small."""
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
