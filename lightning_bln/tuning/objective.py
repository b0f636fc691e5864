"""Objective of a trial: train once, score every statistics mode, report the best."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_bln._torch import is_packed
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.equal_modes import letters_read, standard
from lightning_bln.modes import ALL_MODES, mode_layers
from lightning_bln.sweep.result import Direction, SweepResult

MODE, SCORES = "bln_mode", "bln_scores"
"""Names of a trial's user attributes: the mode chosen, and the monitored metric of every mode."""


@dataclass(frozen=True)
class Objective:
    """An Optuna objective that trains one model a trial and takes its best statistics mode.

    A :class:`~lightning_bln.callbacks.BLNStatsCallback` sweeps the modes at each validation, so that pruning compares
    models in the mode they would be used in. The trial keeps the last sweep as user attributes.

    Args:
        build: Makes Trainer, model and datamodule of a trial; the datamodule is None for a model with its own loaders.
            A Trainer without a BLNStatsCallback gets one.
        monitor: The validation metric to optimise.
        mode: Its direction, ``"min"`` or ``"max"``.
        latency: Also minimise the milliseconds of a forward on one validation batch, as a second objective.
        prune: Let the study's pruner end a trial early; without effect with ``latency``, since Optuna prunes only where
            there is one objective.

    Example:
        >>> import lightning as L
        >>> from lightning_bln.demo import DigitRows, RowClassifier
        >>> def build(trial):
        ...     model = RowClassifier(hidden_size=trial.suggest_int("hidden_size", 16, 64), norm=suggest_norm(trial))
        ...     return L.Trainer(max_epochs=3), model, DigitRows()
        >>> objective = Objective(build)  # then: optuna.create_study().optimize(objective, n_trials=20)
    """

    build: Callable[[optuna.Trial], tuple[Any, Any, Any]]
    monitor: str = "val_loss"
    mode: Direction = "min"
    latency: bool = False
    prune: bool = True

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, float]:
        trainer, model, data = self.build(trial)
        callback = stats_callback(trainer, self.monitor, self.mode)
        pruning: Any = None
        if self.prune and not self.latency:
            from optuna_integration import PyTorchLightningPruningCallback

            pruning = PyTorchLightningPruningCallback(trial, monitor=self.monitor)
            trainer.callbacks.append(pruning)
        try:
            trainer.fit(model, datamodule=data)
        finally:
            record(trial, callback.result, model)
        if pruning is not None:
            pruning.check_pruned()
        value = best_score(callback.result, self.monitor)
        return (value, measure_latency(model, validation_batch(trainer))) if self.latency else value


def stats_callback(trainer: Any, monitor: str, mode: Direction) -> BLNStatsCallback:
    """The Trainer's own BLNStatsCallback, or a new one added to it.

    Raises:
        ValueError: The Trainer's callback chooses the mode by another metric or direction.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, BLNStatsCallback)]
    if not found:
        callback = BLNStatsCallback(monitor=monitor, direction=mode, verbose=False)
        trainer.callbacks.append(callback)
        return callback
    if (found[0].monitor, found[0].direction) != (monitor, mode):
        raise ValueError(
            f"monitor={monitor!r} (mode={mode!r}), but the BLNStatsCallback chooses the statistics mode by "
            f"{found[0].monitor!r} ({found[0].direction!r}); give both the same"
        )
    return found[0]


def record(trial: optuna.Trial, result: SweepResult | None, model: nn.Module) -> None:
    """Store the mode chosen and every mode's finite score in the trial."""
    if result is None:
        return
    scores = monitored(result, model)
    trial.set_user_attr(SCORES, {mode: value for mode, value in scores.items() if math.isfinite(value)})
    trial.set_user_attr(MODE, str(result.chosen))


def monitored(result: SweepResult, model: nn.Module) -> dict[str, float]:
    """The monitored metric of every mode that has it, or that is equal for ``model`` to one that has it.

    Models of all norms get as many scores, so that each weighs as much in the report.
    """
    letters = letters_read(mode_layers(model))
    found = {
        standard(mode, letters): values[result.monitor]
        for mode, values in result.scores.items()
        if result.monitor in values
    }
    return {str(mode): found[standard(mode, letters)] for mode in ALL_MODES if standard(mode, letters) in found}


def best_score(result: SweepResult | None, monitor: str) -> float:
    """The monitored metric of the mode chosen, or an error where there is none or it is NaN."""
    if result is None or result.chosen is None:
        raise ValueError("no validation has run, so there is no mode and no score; validate at least once a training")
    value = result.scores[result.chosen].get(monitor, math.nan)
    if math.isnan(value):
        raise ValueError(f"monitor={monitor!r} is NaN in every statistics mode; the training has diverged")
    return value


def validation_batch(trainer: Any) -> Any:
    """The first batch of the Trainer's validation data."""
    loaders = trainer.val_dataloaders
    return next(iter(loaders[0] if isinstance(loaders, (list, tuple)) else loaders))


def measure_latency(model: nn.Module, batch: Any, repeats: int = 20) -> float:
    """Median time of a forward in evaluation, in milliseconds.

    Args:
        model: The model, which stays on its device and in its statistics mode.
        batch: Its input; of a tuple or list the first entry.
        repeats: Number of timed calls, after three that are not timed.
    """
    device = next(model.parameters()).device
    inputs = apply_to_collection(batch, Tensor, lambda one: one.to(device))
    inputs = inputs[0] if isinstance(inputs, (tuple, list)) and not is_packed(inputs) else inputs
    was_training = model.training
    model.eval()
    times = []
    try:
        with torch.inference_mode():
            for _ in range(3 + repeats):
                start = time.perf_counter()
                model(inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
    finally:
        model.train(was_training)
    return 1000 * statistics.median(times[3:])
