"""Monitored metric of every mode: the same on all ranks, or an error on all of them that says why it is missing."""

from __future__ import annotations

import math
from typing import Any

from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.modes import StatisticsMode

Scores = dict[StatisticsMode, dict[str, float]]


def agree(evaluation: Evaluation, scores: Scores, monitor: str) -> Scores:
    """``scores``, averaged over ranks so that all of them choose alike and have the same table.

    Raises:
        MisconfigurationException: Some rank has no score named ``monitor``; raised on every rank.
    """
    trainer, known = evaluation.trainer, {name for values in scores.values() for name in values}
    if not trainer.strategy.reduce_boolean_decision(monitor in known, all=True):
        raise _lightning.misconfiguration(
            trainer, f"monitor={monitor!r}, but {why_missing(evaluation, known, monitor)}"
        )
    if trainer.world_size > 1:
        of_all = set.intersection(*map(set, gathered(trainer, sorted(known))))
        for name in sorted(of_all):
            values = evaluation.agreed([own.get(name, math.nan) for own in scores.values()])
            for own, value in zip(scores.values(), values, strict=True):
                own[name] = value
    return scores


def why_missing(evaluation: Evaluation, known: set[str], monitor: str) -> str:
    """The second half of an error, from what every rank has logged."""
    logged, unscored = (
        gathered(evaluation.trainer, sorted(known)),
        gathered(evaluation.trainer, unscored_of(evaluation)),
    )
    if any(monitor in names for names in unscored):
        return (
            "another callback logs it, which sees only the mode that the model came with, so that there is no value of "
            "each mode to compare; log it in validation_step or in the module's own on_validation_epoch_end"
        )
    has_it = [rank for rank, names in enumerate(logged) if monitor in names]
    if has_it:
        lacking = ", ".join(str(rank) for rank in range(len(logged)) if rank not in has_it)
        return f"rank {lacking} did not log it; log it on every rank, and with sync_dist=True"
    names = ", ".join(sorted({name for names in logged for name in names})) or "nothing"
    return f"the validation logged {names}; monitor one of these, or log it in validation_step"


def unscored_of(evaluation: Evaluation) -> list[str]:
    """Names of metrics that other callbacks logged in this validation, once and not for each mode."""
    return sorted(
        {
            row.meta.name
            for key, row in evaluation.base_results.items()
            if not row.has_reset and evaluation.is_foreign(key, row)
        }
    )


def gathered(trainer: Any, value: Any) -> list[Any]:
    """The ``value`` of each rank; by a broadcast from each, which every strategy has."""
    return [trainer.strategy.broadcast(value, src=rank) for rank in range(trainer.world_size)]
