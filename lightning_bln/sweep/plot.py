"""What a sweep found as a picture: batch statistics down, feature statistics across."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

from lightning_bln.modes import StatisticsMode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_bln.sweep.result import SweepResult


def draw(result: SweepResult, metric: str) -> Figure:
    """The heat map of :meth:`SweepResult.plot`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    column = result._column(metric)
    halves = ["".join(letters) for letters in product("pc", repeat=2)]
    grid = [[column.get(StatisticsMode(row + name), math.nan) for name in halves] for row in halves]
    is_monitor = metric == result.monitor
    small_is_good = is_monitor and result.mode == "min"

    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    finite = [value for row in grid for value in row if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    colours = colormaps["viridis_r" if small_is_good else "viridis"]
    image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high)
    for (row, batch), (place, feature) in product(enumerate(halves), enumerate(halves)):
        value = grid[row][place]
        if math.isnan(value) and StatisticsMode(batch + feature) not in column:
            continue
        depth = (value - low) / (high - low) if high > low else 0.5
        is_dark = math.isfinite(depth) and (depth > 0.5) == small_is_good
        axes.text(place, row, number(value), ha="center", va="center", color="white" if is_dark else "black")
    frames = {"best": (result.best(), "dotted", 0.36), "incumbent": (result.incumbent, "dashed", 0.42)}
    frames["chosen"] = (result.chosen, "solid", 0.48)
    if result.chosen in (None, result.best()):
        frames["best"], frames["chosen"] = (result.best(), "solid", 0.48), (None, "solid", 0.48)
    for label, (mode, style, inset) in frames.items():
        if mode is None or not is_monitor:
            continue
        place, row = halves.index(mode[2:]), halves.index(mode[:2])
        corner = (place - inset, row - inset)
        axes.add_patch(
            Rectangle(
                corner, 2 * inset, 2 * inset, fill=False, ec="crimson", lw=2.5, ls=style, label=f"{label}: {mode}"
            )
        )
    names = {"p": "population", "c": "current"}
    ticks = [f"mean {names[half[0]]}\nvar {names[half[1]]}" for half in halves]
    axes.set_xticks(range(4), ticks, fontsize=7)
    axes.set_yticks(range(4), ticks, fontsize=7)
    axes.set_xlabel("feature statistics")
    axes.set_ylabel("batch statistics")
    axes.set_title(metric)
    if axes.patches:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.colorbar(image, ax=axes)
    return figure


def number(value: float | None) -> str:
    """A score as the table shows it."""
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"
