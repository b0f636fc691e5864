"""Warnings of norms: a population that is missing, or of other weights, single samples, or a size that is fixed."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

import torch

from lightning_bln._torch import is_exporting
from lightning_bln.equation import Uses
from lightning_bln.moments import are_of_image

UNFROZEN: WeakSet[Any] = WeakSet()
"""Layers that have warned of a missing population; no attribute of theirs, which would be a change of the model."""
STALE: WeakSet[Any] = WeakSet()
"""Layers that have warned of a population of other weights."""
SINGLE: WeakSet[Any] = WeakSet()
"""Layers that have warned of a batch of one."""

MENDS = (
    "call recompute_population(model, batches) before eval(), train with "
    "lightning.Trainer(callbacks=[BLNStatsCallback()]), or set momentum"
)


def reads_population(layer: Any, uses: Uses) -> bool:
    """Whether a norm takes one of these statistics from the population."""
    relevant = (() if layer.norm == "layer" else uses[:2]) + (() if layer.norm == "batch" else uses[2:])
    return any(use is not False for use in relevant)


def warn_unfrozen(layer: Any, uses: Uses) -> None:
    """Warn that nothing is frozen, where the mode needs it."""
    if layer in UNFROZEN or not reads_population(layer, uses):
        return
    UNFROZEN.add(layer)
    warnings.warn(
        f"mode={str(layer.mode)!r} needs a population, but none is frozen, so the current input's statistics are used; "
        + MENDS,
        stacklevel=3,
    )


def warn_stale(layer: Any, uses: Uses) -> None:
    """Warn that what is frozen belongs to weights that have been trained since, unless it follows each batch."""
    is_followed = layer.population.momentum is not None
    if torch.compiler.is_compiling() or is_followed or layer in STALE or not reads_population(layer, uses):
        return
    STALE.add(layer)
    warnings.warn(
        f"the layer has been trained since its population was frozen, which is that of other weights; {MENDS}",
        stacklevel=3,
    )


def warn_fixed(layer: Any, positions: tuple[int, ...]) -> None:
    """Warn that an exported program is for one size, where its population has statistics of each place."""
    fixed = positions if are_of_image(positions, layer.population.channel_dim) else positions[1:]
    if is_exporting() and any(isinstance(size, torch.SymInt) for size in fixed):
        warnings.warn(
            "positions='separate' keeps statistics of each place, so the exported program takes inputs of this size "
            "alone; fix these axes, or build the layer with positions='shared'",
            stacklevel=3,
        )


def warn_single(layer: Any, seen: int) -> None:
    """Warn that batches of one leave nothing of an input."""
    if not layer.training or layer.norm != "batch" or seen != 1 or layer in SINGLE:
        return
    SINGLE.add(layer)
    warnings.warn(
        "norm='batch' and a batch of one: its variance is zero and its output nothing but the bias, and so are the "
        "population's; train with larger batches, or with norm='bln' or 'layer'",
        stacklevel=3,
    )
