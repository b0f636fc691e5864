"""Arguments, models and data that the callback cannot serve, refused before anything has changed."""

from __future__ import annotations

import math
from typing import Any

from lightning_bln._torch import BatchNorm
from lightning_bln.callbacks import _lightning
from lightning_bln.modes import mode_layers


def check_arguments(
    *,
    population: str,
    guard: str,
    samples: int | None,
    recompute_batches: int | None,
    every_n_epochs: int,
    tolerance: float,
    batchnorm: Any,
) -> None:
    """Raise where an argument of the callback is none of those it documents."""
    rules = {
        "population": (population, population in ("recompute", "epoch"), "'recompute' or 'epoch'"),
        "guard": (guard, guard in ("strict", "warn", "off"), "'strict', 'warn' or 'off'"),
        "samples": (samples, samples is None or samples >= 1, "positive, or None for each batch by itself"),
        "recompute_batches": (
            recompute_batches,
            recompute_batches is None or recompute_batches >= 1,
            "positive, or None",
        ),
        "every_n_epochs": (every_n_epochs, every_n_epochs >= 1, "positive"),
        "batchnorm": (
            batchnorm,
            isinstance(batchnorm, bool) or batchnorm == "validate",
            "True, False or 'validate'",
        ),
        "tolerance": (tolerance, tolerance >= 0 and math.isfinite(tolerance), "zero or positive"),
    }
    for name, (value, is_allowed, rule) in rules.items():
        if not is_allowed:
            raise ValueError(f"{name}={value!r}, but it must be {rule}")


def check_model(trainer: Any, module: Any, batchnorm: bool | str) -> None:
    """Raise where a module has no mode to choose and no statistics to compute, or has a step that draws batches."""
    if not mode_layers(module) and not (batchnorm and has_batch_norm(module)):
        mend = (
            "put a BatchLayerNorm, a recurrent layer with norm='bln' or a BatchNorm with running statistics into it, "
            "make layers with a mode of its norms by to_bln(model, norm='keep'), or take the callback away"
        )
        if has_batch_norm(module):
            mend = (
                "with population='recompute' and batchnorm=True the running statistics of its batch norms are "
                "computed; else take the callback away"
            )
        raise _lightning.misconfiguration(
            trainer,
            f"model={type(module).__name__} has no layer with a statistics mode, so there is nothing to choose; {mend}",
        )
    if _lightning.takes_dataloader_iter(module.validation_step):
        raise _lightning.misconfiguration(
            trainer,
            "validation_step(dataloader_iter) draws its own batches, so modes cannot share them; declare it as "
            "validation_step(batch, batch_idx)",
        )


def check_validation_data(trainer: Any) -> None:
    """Raise where some ranks have validation batches and others none."""
    has_none = sum(trainer.num_val_batches) == 0
    decide = trainer.strategy.reduce_boolean_decision
    if decide(has_none, all=False) and not decide(has_none, all=True):
        raise _lightning.misconfiguration(
            trainer,
            "a rank has no validation batches while others do, and would choose no mode; give every rank at least "
            "one batch, of fewer samples each",
        )


def has_batch_norm(module: Any) -> bool:
    """Whether there is a batch norm of torch's with running statistics, or one that will have some."""
    return any(isinstance(one, BatchNorm) and one.track_running_stats for one in module.modules())
