"""Heat map of a metric over the statistics modes: batch statistics down, feature statistics across."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning_bln.modes import StatisticsMode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALVES = ["".join(letters) for letters in product("pc", repeat=2)]
"""Both letters of the batch statistics, or of the feature statistics, in the order of rows and columns."""

FRAMES = {"best": ("dotted", 0.36), "incumbent": ("dashed", 0.42), "chosen": ("solid", 0.48)}
"""Line style and half the side length of each mark's frame."""


def draw(
    scores: Mapping[StatisticsMode, float],
    title: str,
    marks: Mapping[str, StatisticsMode | None],
    *,
    small_is_good: bool,
) -> Figure:
    """Draw a 4 x 4 heat map.

    Args:
        scores: The metric's value in each mode.
        title: The metric's name.
        marks: The modes to frame under the names of :data:`FRAMES`; None frames nothing.
        small_is_good: Whether small values have the bright colours.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    grid = [[scores.get(StatisticsMode(row + name), math.nan) for name in HALVES] for row in HALVES]
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    finite = [value for row in grid for value in row if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    image = axes.imshow(grid, cmap=colormaps["viridis_r" if small_is_good else "viridis"], vmin=low, vmax=high)
    for (row, batch), (column, feature) in product(enumerate(HALVES), enumerate(HALVES)):
        value = grid[row][column]
        if math.isnan(value) and StatisticsMode(batch + feature) not in scores:
            continue
        depth = (value - low) / (high - low) if high > low else 0.5
        is_dark = math.isfinite(depth) and (depth > 0.5) == small_is_good
        axes.text(column, row, number(value), ha="center", va="center", color="white" if is_dark else "black")
    add_frames(axes, marks)
    names = {"p": "population", "c": "current"}
    ticks = [f"mean {names[half[0]]}\nvar {names[half[1]]}" for half in HALVES]
    axes.set_xticks(range(4), ticks, fontsize=7)
    axes.set_yticks(range(4), ticks, fontsize=7)
    axes.set_xlabel("feature statistics")
    axes.set_ylabel("batch statistics")
    axes.set_title(title)
    if axes.patches:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.colorbar(image, ax=axes)
    return figure


def add_frames(axes: Any, marks: Mapping[str, StatisticsMode | None]) -> None:
    """Frame the marked modes; where the best one is chosen, or none is, its frame is the solid one."""
    from matplotlib.patches import Rectangle

    best_is_chosen = marks.get("chosen") in (None, marks.get("best"))
    for name, mode in marks.items():
        if mode is None or (name == "chosen" and best_is_chosen):
            continue
        style, inset = FRAMES["chosen" if name == "best" and best_is_chosen else name]
        corner = (HALVES.index(mode[2:]) - inset, HALVES.index(mode[:2]) - inset)
        label = f"{name}: {mode}"
        axes.add_patch(Rectangle(corner, 2 * inset, 2 * inset, fill=False, ec="crimson", lw=2.5, ls=style, label=label))


def number(value: float | None) -> str:
    """A score with four decimals, or four digits where it is very large or small."""
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
