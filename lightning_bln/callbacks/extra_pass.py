"""A pass of some modes over batches by themselves, beside the one of the validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from lightning_bln.callbacks.copies import Copies
from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.random_state import RandomState

Batches = Sequence[tuple[Any, "int | None"]]
"""Batches, each with its dataloader's index."""


def scores(evaluation: Evaluation, modes: Sequence[StatisticsMode], batches: Batches, monitor: str) -> list[float]:
    """The score of each mode in a pass over ``batches``, averaged over ranks; changes nothing."""
    found: dict[StatisticsMode, dict[str, float]] = {}
    # in joint steps ranks could come to different numbers of collectives
    if len(modes) > 1 and evaluation.shared.is_active and evaluation.trainer.world_size == 1:
        found = passed(evaluation, tuple(modes), batches) or {}
    for mode in modes:
        if mode not in found:
            found |= passed(evaluation, (mode,), batches) or {}
    return evaluation.agreed([found[mode].get(monitor, math.nan) for mode in modes])


def passed(
    evaluation: Evaluation, modes: tuple[StatisticsMode, ...], batches: Iterable[tuple[Any, int | None]]
) -> dict[StatisticsMode, dict[str, float]] | None:
    """Metrics of one mode after a pass over ``batches``, or of several together; None where these cannot be."""
    run, state = evaluation.start.copy(evaluation.loop, modes), RandomState(evaluation.module.device)
    try:
        for batch_idx, (batch, dataloader_idx) in enumerate(batches):
            if batch_idx and dataloader_idx != run.results.dataloader_idx:
                evaluation.close_dataloader(run)
            own = Copies(batch).next()
            step = partial(evaluation.run_step, batch=own, batch_idx=batch_idx, dataloader_idx=dataloader_idx)
            if len(modes) == 1:
                step(run)
                evaluation.on_step(1)
                continue
            evaluation.shared.begin(len(modes))
            if evaluation.stepped(run, step, state) is None:
                return None
        evaluation.close_dataloader(run)
        return evaluation.epoch_scores(run)
    except Exception:  # the user's own come again from each mode by itself
        if len(modes) == 1:
            raise
        return None
    finally:
        evaluation.shared.close()
        state.restore()
