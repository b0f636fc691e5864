"""The base of modules of every kind, and the proof that the callback's table is that of sixteen plain validations."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BatchLayerNorm, set_mode
from lightning_bln.callbacks import choice

Values = Any
CALLS: Counter[str] = Counter()
"""Calls of hooks of all modules; it is no state of theirs, so that no mode has a copy."""


def norm(features: int = 8) -> BatchLayerNorm:
    return BatchLayerNorm(features, scale=False)


class Exact(pl.LightningModule):
    """A perceptron whose validation step logs what :meth:`values` gives for a batch."""

    learning_rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(zoo.FEATURES, 8), norm(), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), norm(), nn.ReLU())
        self.head = nn.Linear(8, zoo.CLASSES)
        self.build()

    def build(self) -> None:
        """Add layers and attributes."""

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Values:
        """What to log as ``val_loss``, or a dictionary."""
        return F.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = batch
        found = self.values(x, y, batch_idx)
        self.log_dict(found if isinstance(found, dict) else {"val_loss": found}, batch_size=len(y))

    def on_validation_epoch_start(self) -> None:
        CALLS["start"] += 1

    def on_validation_epoch_end(self) -> None:
        CALLS["end"] += 1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Functional(Exact):
    """What it logs is the result of a function of the module and the batch."""

    def __init__(self, function: Callable[..., Values]) -> None:
        super().__init__()
        self.function = function

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Values:
        return self.function(self, x, y, batch_idx)


class Keeps(pl.Callback):
    """Keeps the module as it was before the first step of each validation, and the table of that."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.modules: list[Any] = []
        self.results: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.evaluation = choice.Evaluation

        def made(trainer: Any, module: Any, *args: Any, **options: Any) -> Any:
            self.modules.append(copy.deepcopy(module))
            return self.evaluation(trainer, module, *args, **options)

        choice.Evaluation = made  # type: ignore[assignment, misc]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        choice.Evaluation = self.evaluation  # type: ignore[misc]

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.results.append(self.callback.result)


class SameSeed(pl.Callback):
    """Gives each batch a random state of its own, the same in every validation."""

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        seed_all(batch_idx)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 that users draw from
    random.seed(seed)


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


def fitted(make: Callable[[], Any], data: Callable[[], Any], train: Any, *callbacks: Any, **options: Any) -> Any:
    """A module after a fit, the calls of its hooks, and the random states."""
    seed_all(0)
    model = make()
    CALLS.clear()
    trainer = zoo.trainer(*callbacks, **options)
    trainer.fit(model, zoo.train_data() if train is None else train(), data())
    return model, dict(CALLS), random_states()


def plain_validations(model: Any, data: Callable[[], Any], trainer: Any) -> dict[str, dict[str, float]]:
    """What a validation of its own logs in each mode."""
    found = {}
    for mode in ALL_MODES:
        own = copy.deepcopy(model)
        own._metric_attributes = None  # Lightning finds metrics by their addresses
        set_mode(own, mode)
        trainer.validate(own, data(), verbose=False)
        found[mode] = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found


def assert_exact(
    make: Callable[[], Any],
    data: Callable[[], Any] = zoo.val_data,
    *,
    train: Any = None,
    monitor: str = "val_loss",
    tolerance: float = 1e-5,
    differ: bool = True,
    counts: bool = True,
    **options: Any,
) -> list[Any]:
    """Fit with and without the callback; every table is that of plain validations, and the fit is the same."""
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **options}
    callback = zoo.chooser(monitor)
    keeps = Keeps(callback)
    model, calls, states = fitted(make, data, train, SameSeed(), callback, keeps, **options)
    twin, plain_calls, plain_states = fitted(make, data, train, SameSeed(), **options)
    for name, weight in twin.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), f"the weight {name} is another without the callback"
    assert states == plain_states, "random states are others without the callback"
    assert calls == plain_calls or not counts
    assert len(keeps.results) == len(keeps.modules) > 0
    validates = zoo.trainer(SameSeed(), **{name: options[name] for name in VALIDATES & options.keys()})
    for module, result in zip(keeps.modules, keeps.results, strict=True):
        expected = plain_validations(module, data, validates)
        assert_table(expected, result, monitor, tolerance)
        if differ:
            distinct = {f"{values[monitor]:.5g}" for values in expected.values()}
            assert len(distinct) >= 4, "modes that agree prove nothing"
    return keeps.results


VALIDATES = {"precision", "inference_mode", "limit_val_batches", "barebones", "strategy", "detect_anomaly"}


def assert_table(expected: dict[str, dict[str, float]], result: Any, monitor: str, tolerance: float) -> None:
    assert set(result.scores) == set(expected)
    for mode, values in expected.items():
        if not monitor.startswith("end_"):
            values = {name: value for name, value in values.items() if not name.startswith("end_")}
        found = result.scores[mode]
        assert set(found) == set(values), f"{mode}: {set(found) ^ set(values)} [{result.reason}]"
        for name, value in values.items():
            is_same = math.isclose(found[name], value, rel_tol=tolerance, abs_tol=tolerance / 10)
            is_same |= math.isnan(found[name]) and math.isnan(value)
            assert is_same, f"{name} of {mode}: {found[name]} is not {value} [{result.reason}]"
    scores = [values[monitor] for values in expected.values() if not math.isnan(values[monitor])]
    if scores:
        best = min(scores)
        assert expected[str(result.chosen)][monitor] <= best + tolerance * max(1.0, abs(best))
