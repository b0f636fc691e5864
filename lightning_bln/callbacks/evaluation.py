"""One pass over the validation data for all modes: Lightning runs one of them, the others run beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_bln import _compat
from lightning_bln.callbacks.user_state import Snapshot, UserState
from lightning_bln.fanout import SharedForward
from lightning_bln.modes import StatisticsMode, assign_modes, mode_layers

EPOCH_END = "on_validation_epoch_end"


class Silent:
    """Stands in for a logger while other modes run; takes every call and does nothing."""

    def __getattr__(self, name: str) -> Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:
        return self

    def __getitem__(self, index: Any) -> Silent:
        return self


class Run:
    """What one mode has gathered so far in this validation."""

    def __init__(self, mode: StatisticsMode, results: Any, state: Snapshot, metrics: list[dict[str, Any]]) -> None:
        self.mode = mode
        self.results = results
        self.state = state
        self.metrics = metrics
        self.hook: str | None = None


class Evaluation:
    """The runs of several modes through one validation loop, made on its first batch.

    A run has its own result collection (what ``self.log`` fills), its own user state, and starts every step from the
    same random state. Whatever a run does, the Trainer is left as it was found.
    """

    def __init__(
        self, trainer: Any, module: Any, modes: Iterable[StatisticsMode], shared: SharedForward | None = None
    ) -> None:
        self.trainer, self.module, self.shared = trainer, module, shared
        self.is_first = True
        self.on_step: Callable[[], None] = nothing
        self.loop = _compat.evaluation_loop(trainer)
        self.connector = _compat.connector(trainer)
        self.layers = mode_layers(module)
        modes_set = {layer.mode for layer in self.layers}
        self.incumbent = modes_set.pop() if len(modes_set) == 1 else None
        self.user = UserState(module)
        self.base = UserState.copy(self.user.take())
        self.base_results = _compat.results(self.loop)
        self.early = {
            key: value
            for key, value in self.base_results.items()
            if not value.has_reset and not value.meta.fx.startswith("validation_step")
        }
        self.early = copied(self.early)
        self.early_metrics = [dict(getattr(self.connector, name)) for name in _compat.CONNECTOR_METRICS]
        self.silent = [Silent() for _ in trainer.loggers]
        self.takes_batch_idx = _compat.takes_batch_idx(module.validation_step)
        self.dataloader_idx = self.base_results.dataloader_idx
        self.runs = {mode: self.new_run(mode) for mode in modes if mode != self.incumbent}

    def new_run(self, mode: StatisticsMode) -> Run:
        """A run that has seen no batch yet; values logged before the first batch belong to every run."""
        results = _compat.new_results(self.loop)
        results.update(copied(self.early))
        return Run(mode, results, UserState.copy(self.base), [dict(values) for values in self.early_metrics])

    @contextmanager
    def acting(self, run: Run) -> Iterator[Any]:
        """Within the context everything belongs to ``run``: mode, log, user state, loggers."""
        connector, module, trainer = self.connector, self.module, self.trainer
        results = _compat.swap_results(self.loop, run.results)
        state = self.user.take()
        hook, fx = connector._current_fx, _compat.current_hook(module)
        metrics = [getattr(connector, name) for name in _compat.CONNECTOR_METRICS]
        loggers, modes = trainer.loggers, [layer.mode for layer in self.layers]
        try:
            self.user.put(run.state)
            connector._current_fx = run.hook
            for name, values in zip(_compat.CONNECTOR_METRICS, run.metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = self.silent
            assign_modes(self.layers, [run.mode] * len(self.layers))
            yield run.results
        finally:
            run.state = self.user.take()
            run.hook = connector._current_fx
            run.metrics = [getattr(connector, name) for name in _compat.CONNECTOR_METRICS]
            self.user.put(state)
            _compat.swap_results(self.loop, results)
            connector._current_fx = hook
            _compat.set_current_hook(module, fx)
            for name, values in zip(_compat.CONNECTOR_METRICS, metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = loggers
            assign_modes(self.layers, modes)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """Every run's turn at a batch that Lightning is about to give to the incumbent."""
        if dataloader_idx != self.dataloader_idx:
            self.close_dataloader(self.runs.values(), self.dataloader_idx)
            self.dataloader_idx = dataloader_idx
        copies = Copies(batch)
        state = RandomState(self.module.device)

        def turn(run: Run) -> None:
            self.run_step(run, copies.next(), batch_idx, dataloader_idx)
            state.restore()

        runs = list(self.runs.values())
        if self.shared is None:
            for run in runs:
                turn(run)
        else:
            # the incumbent's turn is Lightning's own step, which comes next
            self.shared.each(runs, turn, recheck=self.is_first, follows=self.incumbent)
        self.is_first = False

    def run_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int | None) -> Any:
        """One validation step of one mode, with the module's own hooks around it."""
        where = [] if dataloader_idx is None else [dataloader_idx]
        module, strategy = self.module, self.trainer.strategy
        with self.acting(run) as results:
            results.batch, results.batch_size, results.dataloader_idx = batch, None, dataloader_idx
            _compat.set_current_hook(module, "on_validation_batch_start")
            module.on_validation_batch_start(batch, batch_idx, *where)
            _compat.set_current_hook(module, "validation_step")
            output = strategy.validation_step(batch, *([batch_idx] if self.takes_batch_idx else []), *where)
            _compat.set_current_hook(module, "on_validation_batch_end")
            module.on_validation_batch_end(output, batch, batch_idx, *where)
            results.batch = results.batch_size = None
        self.on_step()
        return output

    def close_dataloader(self, runs: Iterable[Run], dataloader_idx: int | None) -> None:
        """Compute what belongs to a dataloader when it ends, as Lightning does: its metrics may serve the next one."""
        for run in runs:
            with self.acting(run) as results:
                results.dataloader_idx = dataloader_idx
                self.publish(results.metrics(on_step=False))

    def publish(self, metrics: Any) -> None:
        for name, kind in zip(_compat.CONNECTOR_METRICS, ("callback", "log", "pbar"), strict=True):
            getattr(self.connector, name).update(metrics[kind])

    def finish(self) -> dict[StatisticsMode, dict[str, float]]:
        """Every mode's metrics at the end of the pass, the incumbent's among them; changes nothing."""
        self.close_dataloader(self.runs.values(), self.dataloader_idx)
        if self.incumbent is not None:
            self.runs[self.incumbent] = self.incumbent_run(self.incumbent)
        return {mode: self.epoch_scores(run) for mode, run in self.runs.items()}

    def score(self, mode: StatisticsMode, batches: Iterable[tuple[Any, int | None]], monitor: str) -> float:
        """What ``mode`` scores in a pass over ``batches``, each with its dataloader's index; changes nothing."""
        run, index, state = self.new_run(mode), None, RandomState(self.module.device)
        for batch_idx, (batch, dataloader_idx) in enumerate(batches):
            if batch_idx and dataloader_idx != index:
                self.close_dataloader([run], index)
            index = dataloader_idx
            self.run_step(run, Copies(batch).next(), batch_idx, dataloader_idx)
        self.close_dataloader([run], index)
        scores = self.epoch_scores(run)
        state.restore()
        return self.agreed([scores.get(monitor, math.nan)])[0]

    def agreed(self, values: list[float]) -> list[float]:
        """``values`` averaged over ranks, so that all of them choose alike."""
        if self.trainer.world_size == 1:
            return values
        strategy = self.trainer.strategy
        return strategy.reduce(torch.tensor(values, device=strategy.root_device), reduce_op="mean").tolist()

    def incumbent_run(self, mode: StatisticsMode) -> Run:
        """The run Lightning itself did, without what other callbacks logged in it."""
        results = _compat.new_results(self.loop)
        results.update({key: value for key, value in self.base_results.items() if not self.is_foreign(key, value)})
        metrics = [dict(getattr(self.connector, name)) for name in _compat.CONNECTOR_METRICS]
        run = Run(mode, results, self.user.take(), metrics)
        run.hook = self.connector._current_fx
        return run

    def is_foreign(self, key: str, value: Any) -> bool:
        """Whether a callback logged ``value``: no run of the module alone has it."""
        if value.meta.fx.partition(".")[0] == "validation_step":
            return False
        others = [run for run in self.runs.values() if run.mode != self.incumbent]
        is_early = value.meta.fx.partition(".")[0] != EPOCH_END
        return not (is_early and (not others or any(key in run.results for run in others)))

    def epoch_scores(self, run: Run) -> dict[str, float]:
        """What ``run`` would log at the end of the epoch; its state stays as before the module's hook."""
        kept, kept_metrics, hook = run.state, run.metrics, run.hook
        run.state = UserState.copy(kept)
        run.metrics = [dict(values) for values in kept_metrics]
        state = RandomState(self.module.device)
        try:
            with self.acting(run) as results:
                scores = self.collect(results)
                _compat.set_current_hook(self.module, EPOCH_END)
                self.module.on_validation_epoch_end()
                scores.update(results.metrics(on_step=False)["callback"])
                for key in [key for key in results if key.startswith(f"{EPOCH_END}.")]:
                    del results[key]
        finally:
            state.restore()
            run.state, run.metrics, run.hook = kept, kept_metrics, hook
        return {name: float(value) for name, value in scores.items() if value.numel() == 1}

    def collect(self, results: Any) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for metrics in self.per_dataloader(results):
            scores.update(metrics["callback"])
        return scores

    def per_dataloader(self, results: Any) -> list[Any]:
        """What each dataloader logged, in order; one entry where they are not kept apart."""
        count = self.loop.num_dataloaders
        indices: list[int | None] = [None]
        if count > 1 and _compat.is_sequential(self.loop):
            indices = list(range(count))
        found = []
        for index in indices:
            results.dataloader_idx = index
            found.append(results.metrics(on_step=False))
        results.dataloader_idx = None
        return found

    def install(self, mode: StatisticsMode) -> None:
        """Make ``mode`` the one that was validated, for everything that looks at the Trainer from now on."""
        assign_modes(self.layers, [mode] * len(self.layers))
        if mode == self.incumbent:
            return
        run, results = self.runs[mode], self.base_results
        foreign = {key: value for key, value in results.items() if self.is_foreign(key, value)}
        lost = self.names(results)
        self.user.put(run.state)
        dict.clear(results)
        dict.update(results, {**foreign, **{key: _compat.plain_row(row) for key, row in run.results.items()}})
        lost -= self.names(results)
        for name in _compat.CONNECTOR_METRICS:
            values = getattr(self.connector, name)
            for one in lost:
                values.pop(one, None)
        outputs = _compat.logged_outputs(self.loop)
        for index, metrics in enumerate(self.per_dataloader(results)):
            outputs[index] = metrics["log"]
            self.publish(metrics)

    def names(self, results: Any) -> set[str]:
        return {name for metrics in self.per_dataloader(results) for kind in metrics.values() for name in kind}


class Copies:
    """Batches for runs that may change theirs: fresh containers each time, fresh tensors once one was written to."""

    def __init__(self, batch: Any) -> None:
        self.original = batch
        self.renew()

    def renew(self) -> None:
        self.shared = apply_to_collection(self.original, Tensor, torch.clone)
        self.tensors: list[Tensor] = []
        apply_to_collection(self.shared, Tensor, self.tensors.append)
        self.versions = self.current_versions()

    def current_versions(self) -> list[int] | None:
        # inference tensors count no versions, so there every run gets tensors of its own
        if any(tensor.is_inference() for tensor in self.tensors):
            return None
        return [tensor._version for tensor in self.tensors]

    def next(self) -> Any:
        if self.versions is None or self.versions != self.current_versions():
            self.renew()
        return apply_to_collection(self.shared, Tensor, same)


class RandomState:
    """The random state of everything a step may draw from, to be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.numpy = np.random.get_state()  # noqa: NPY002
        self.python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


def copied(rows: dict[str, Any]) -> dict[str, Any]:
    """Logged values of one's own; one that is a metric object stays the user's."""
    return {key: copied_row(value) if value.is_tensor else value for key, value in rows.items()}


def copied_row(row: Any) -> Any:
    # not a deep copy: a row refers to the strategy by the function that reduces it
    own = object.__new__(type(row))
    state = row.__getstate__()
    own.__setstate__({name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()})
    return own


def nothing() -> None: ...


def same(tensor: Tensor) -> Tensor:
    return tensor
