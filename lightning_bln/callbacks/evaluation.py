"""One pass over the validation data for all modes: Lightning runs the incumbent, the others run beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.run import Copies, RandomState, Run, copied_row, nothing
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.distributed import is_sharded
from lightning_bln.modes import StatisticsMode, assign_modes, mode_layers
from lightning_bln.sweep.per_mode_tensor import NotTogether, PerMode, reason_of
from lightning_bln.sweep.shared_forward import SharedForward

EPOCH_END = "on_validation_epoch_end"


class Evaluation:
    """The runs of several modes through one validation loop, set up on its first batch.

    A run has its own result collection (what ``self.log`` fills) and user state, and starts every step from the same
    random state. The Trainer is left as it was found, whatever a run does.

    In joint evaluation one run has all modes. On the verification batch, the first of the first evaluation, every mode
    runs on its own and all run jointly; if both come to the same values, joint evaluation goes on. Once a step does not
    allow it, each mode gets a run of its own with the values gathered so far.

    Args:
        trainer: A Trainer within its validation loop.
        module: The module it validates.
        modes: The modes to evaluate.
        shared: The shared forward of all evaluations of a fit; None if modes do not share forwards.

    Attributes:
        reason: Why modes were evaluated one after the other; None where all were evaluated jointly.
    """

    def __init__(
        self, trainer: Any, module: Any, modes: Iterable[StatisticsMode], shared: SharedForward | None = None
    ) -> None:
        self.trainer, self.module, self.shared = trainer, module, shared
        self.is_first = True
        self.on_step: Callable[[int], None] = nothing
        self.loop = _lightning.evaluation_loop(trainer)
        self.connector = _lightning.connector(trainer)
        self.layers = mode_layers(module)
        modes_set = {layer.mode for layer in self.layers}
        self.incumbent = modes_set.pop() if len(modes_set) == 1 else None
        self.user = UserState(module)
        self.base = UserState.copy(self.user.take())
        self.base_results = _lightning.results(self.loop)
        self.early = {
            key: copied_row(row)
            for key, row in self.base_results.items()
            if not row.has_reset and not row.meta.fx.startswith("validation_step")
        }
        self.early_metrics = [dict(getattr(self.connector, name)) for name in _lightning.CONNECTOR_METRICS]
        self.silent = [_lightning.silent_logger(trainer) for _ in trainer.loggers]
        self.takes_batch_idx = _lightning.takes_batch_idx(module.validation_step)
        self.dataloader_idx = self.base_results.dataloader_idx
        self.others = tuple(mode for mode in modes if mode != self.incumbent)
        self.reason = self.obstacle() if len(self.others) > 1 else None
        self.joint: Run | None = None
        self.runs: dict[StatisticsMode, Run] = {}
        if shared is not None and shared.is_joint and self.may_be_joint:
            self.joint = self.new_run(self.others)
        else:
            self.runs = {mode: self.new_run((mode,)) for mode in self.others}

    @property
    def may_be_joint(self) -> bool:
        """Whether joint evaluation has not been ruled out."""
        return self.reason is None and len(self.others) > 1

    def obstacle(self) -> str | None:
        """Obstacle to joint evaluation from the start, or None."""
        if self.shared is None:
            return "weights are sharded" if is_sharded(self.trainer.strategy.model) else "shares_forwards is False"
        if self.trainer.world_size > 1:
            # they could stop joint evaluation at different batches, and then call different collectives
            return "there are several ranks"
        return self.shared.reason

    def new_run(self, modes: tuple[StatisticsMode, ...]) -> Run:
        """A run before its first batch, with the values logged so far, which belong to every run."""
        results = _lightning.new_results(self.loop, has_bar=len(modes) == 1)
        for key, row in self.early.items():
            results[key] = copied_row(row)
        return Run(modes, results, UserState.copy(self.base), [dict(values) for values in self.early_metrics])

    @contextmanager
    def acting(self, run: Run) -> Iterator[Any]:
        """Within the context mode, log and user state are those of ``run``, and loggers take no note."""
        connector, module, trainer = self.connector, self.module, self.trainer
        results = _lightning.swap_results(self.loop, run.results)
        state = self.user.take()
        hook, fx = _lightning.current_fx(connector), _lightning.current_hook(module)
        metrics = [getattr(connector, name) for name in _lightning.CONNECTOR_METRICS]
        loggers, modes = trainer.loggers, [layer.mode for layer in self.layers]
        try:
            self.user.put(run.state)
            _lightning.set_current_fx(connector, run.hook)
            for name, values in zip(_lightning.CONNECTOR_METRICS, run.metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = self.silent
            if len(run.modes) == 1:
                assign_modes(self.layers, run.modes * len(self.layers))
            yield run.results
        finally:
            run.state = self.user.take()
            run.hook = _lightning.current_fx(connector)
            run.metrics = [getattr(connector, name) for name in _lightning.CONNECTOR_METRICS]
            self.user.put(state)
            _lightning.swap_results(self.loop, results)
            _lightning.set_current_fx(connector, hook)
            _lightning.set_current_hook(module, fx)
            for name, values in zip(_lightning.CONNECTOR_METRICS, metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = loggers
            assign_modes(self.layers, modes)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """Run every mode but the incumbent on a batch; Lightning's own step of that follows."""
        if dataloader_idx != self.dataloader_idx:
            self.close_dataloaders()
            self.dataloader_idx = dataloader_idx
        copies = Copies(batch)
        state = RandomState(self.module.device)

        def step(run: Run) -> None:
            self.run_step(run, copies.next(), batch_idx, dataloader_idx)

        if self.joint is None or not self.step_jointly(self.joint, step, state):
            self.step_per_mode(step, state)
            if self.is_first and self.may_be_joint:
                self.verify_joint(step, state)
        self.is_first = False

    def step_per_mode(self, step: Callable[[Run], None], state: RandomState) -> None:
        """Run one mode after the other, each from the same random state."""

        def step_and_restore(run: Run) -> None:
            step(run)
            state.restore()
            self.on_step(1)

        runs = list(self.runs.values())
        if self.shared is None:
            for run in runs:
                step_and_restore(run)
        else:
            self.shared.step_per_mode(
                runs, step_and_restore, verify=self.is_first, follows=self.incumbent, records=self.is_first
            )

    def step_jointly(self, joint: Run, step: Callable[[Run], None], state: RandomState) -> bool:
        """Run all modes in one step; where that fails, undo it, part the modes and return False."""
        assert self.shared is not None
        try:
            with joint.undoable():
                self.shared.step_jointly(joint.modes, lambda: step(joint), verify=self.is_first, follows=self.incumbent)
                if state.has_moved():
                    raise NotTogether("a step draws random numbers")
        except Exception as error:
            # fall back to per-mode steps; user errors resurface there
            self.shared.close()
            self.shared.refuse(reason_of(error))
            state.restore()
            self.part(joint, error)
            return False
        self.on_step(len(joint.modes))
        return True

    def verify_joint(self, step: Callable[[Run], None], state: RandomState) -> None:
        """After the per-mode steps on the verification batch, evaluate jointly from now on if that gives the same."""
        assert self.shared is not None
        if self.shared.is_joint is not None:
            return
        joint = self.new_run(tuple(self.runs))
        try:
            if self.shared.failure is not None:
                raise NotTogether(self.shared.failure)
            self.shared.step_jointly(joint.modes, lambda: step(joint))
            if state.has_moved():
                raise NotTogether("a step draws random numbers")
            parts = [joint.part(_lightning.new_results(self.loop), place) for place in range(len(joint.modes))]
            if not all(part.is_same_as(run) for part, run in zip(parts, self.runs.values(), strict=True)):
                raise NotTogether("a joint step leaves other values than one step for each mode")
            self.shared.is_joint, self.joint, self.runs = True, joint, {}
        except Exception as error:
            # errors of the user's have been raised by the per-mode steps
            self.reason = reason_of(error)
            self.shared.refuse(self.reason)
        state.restore()

    def part(self, joint: Run, error: Exception) -> None:
        """Give every mode a run of its own from now on."""
        self.reason = reason_of(error)
        self.joint = None
        self.runs = {mode: self.run_of(mode, joint) for mode in joint.modes}

    def run_of(self, mode: StatisticsMode, joint: Run | None) -> Run:
        """The run of one mode."""
        if joint is None or mode not in joint.modes:
            return self.runs[mode]
        return joint.part(_lightning.new_results(self.loop), joint.modes.index(mode))

    def run_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int | None) -> Any:
        """One validation step of a run, between the module's own hooks."""
        where = [] if dataloader_idx is None else [dataloader_idx]
        module, strategy = self.module, self.trainer.strategy
        with self.acting(run) as results:
            results.batch, results.batch_size, results.dataloader_idx = batch, None, dataloader_idx
            _lightning.set_current_hook(module, "on_validation_batch_start")
            module.on_validation_batch_start(batch, batch_idx, *where)
            _lightning.set_current_hook(module, "validation_step")
            output = strategy.validation_step(batch, *([batch_idx] if self.takes_batch_idx else []), *where)
            _lightning.set_current_hook(module, "on_validation_batch_end")
            module.on_validation_batch_end(output, batch, batch_idx, *where)
            results.batch = results.batch_size = None
        return output

    def close_dataloaders(self) -> None:
        """:meth:`close_dataloader` for all runs."""
        if self.joint is not None:
            try:
                return self.close_dataloader([self.joint], self.dataloader_idx)
            except Exception as error:
                self.part(self.joint, error)
        self.close_dataloader(self.runs.values(), self.dataloader_idx)

    def close_dataloader(self, runs: Iterable[Run], dataloader_idx: int | None) -> None:
        """Compute a dataloader's metrics when it ends, as Lightning does: the next one may use the same objects."""
        for run in runs:
            with self.acting(run) as results:
                results.dataloader_idx = dataloader_idx
                self.publish(results.metrics(on_step=False))

    def publish(self, metrics: Any) -> None:
        for name, kind in zip(_lightning.CONNECTOR_METRICS, ("callback", "log", "pbar"), strict=True):
            getattr(self.connector, name).update(metrics[kind])

    def finish(self) -> dict[StatisticsMode, dict[str, float]]:
        """Metrics of every mode at the end of the pass, the incumbent included; changes nothing."""
        self.close_dataloaders()
        scores: dict[StatisticsMode, dict[str, float]] = {}
        if self.joint is not None:
            try:
                scores = self.epoch_scores(self.joint)
            except Exception as error:
                self.part(self.joint, error)
        if self.incumbent is not None:
            self.runs[self.incumbent] = self.incumbent_run(self.incumbent)
        for run in self.runs.values():
            scores |= self.epoch_scores(run)
        return scores

    def score(self, mode: StatisticsMode, batches: Iterable[tuple[Any, int | None]], monitor: str) -> float:
        """The score of ``mode`` in a pass over ``batches``, each with its dataloader's index; changes nothing."""
        run, index, state = self.new_run((mode,)), None, RandomState(self.module.device)
        for batch_idx, (batch, dataloader_idx) in enumerate(batches):
            if batch_idx and dataloader_idx != index:
                self.close_dataloader([run], index)
            index = dataloader_idx
            self.run_step(run, Copies(batch).next(), batch_idx, dataloader_idx)
            self.on_step(1)
        self.close_dataloader([run], index)
        scores = self.epoch_scores(run)[mode]
        state.restore()
        return self.agreed([scores.get(monitor, math.nan)])[0]

    def agreed(self, values: list[float]) -> list[float]:
        """``values`` averaged over ranks, so that all choose the same mode."""
        if self.trainer.world_size == 1:
            return values
        strategy = self.trainer.strategy
        return strategy.reduce(torch.tensor(values, device=strategy.root_device), reduce_op="mean").tolist()

    def incumbent_run(self, mode: StatisticsMode) -> Run:
        """The run of Lightning itself, without values that other callbacks logged."""
        results = _lightning.new_results(self.loop)
        results.update({key: value for key, value in self.base_results.items() if not self.is_foreign(key, value)})
        metrics = [dict(getattr(self.connector, name)) for name in _lightning.CONNECTOR_METRICS]
        run = Run((mode,), results, self.user.take(), metrics)
        run.hook = _lightning.current_fx(self.connector)
        return run

    def is_foreign(self, key: str, value: Any) -> bool:
        """Whether a callback logged ``value``, so that no run of the module has it."""
        if value.meta.fx.partition(".")[0] == "validation_step":
            return False
        others = [run for run in self.runs.values() if run.mode != self.incumbent]
        others += [self.joint] if self.joint is not None else []
        is_early = value.meta.fx.partition(".")[0] != EPOCH_END
        return not (is_early and (not others or any(key in run.results for run in others)))

    def epoch_scores(self, run: Run) -> dict[StatisticsMode, dict[str, float]]:
        """The values each mode of ``run`` would log at the end of the epoch; the run itself does not change."""
        kept, kept_metrics, hook = run.state, run.metrics, run.hook
        run.state = UserState.copy(kept)
        run.metrics = [dict(values) for values in kept_metrics]
        state = RandomState(self.module.device)
        try:
            with self.acting(run) as results:
                scores = self.collect(results)
                _lightning.set_current_hook(self.module, EPOCH_END)
                self.module.on_validation_epoch_end()
                scores.update(results.metrics(on_step=False)["callback"])
                if len(run.modes) > 1 and state.has_moved():
                    raise NotTogether("the end of the epoch draws random numbers")
        finally:
            for key in [key for key in run.results if key.startswith(f"{EPOCH_END}.")]:
                del run.results[key]
            state.restore()
            run.state, run.metrics, run.hook = kept, kept_metrics, hook
        parts = {
            name: value.parts if isinstance(value, PerMode) else [value] * len(run.modes)
            for name, value in scores.items()
            if value.numel() == 1
        }
        return {
            mode: {name: float(values[place]) for name, values in parts.items()} for place, mode in enumerate(run.modes)
        }

    def collect(self, results: Any) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        for metrics in self.per_dataloader(results):
            scores.update(metrics["callback"])
        return scores

    def per_dataloader(self, results: Any) -> list[Any]:
        """The metrics of each dataloader, in order; one entry if dataloaders share them."""
        count = self.loop.num_dataloaders
        indices: list[int | None] = [None]
        if count > 1 and _lightning.is_sequential(self.loop):
            indices = list(range(count))
        found = []
        for index in indices:
            results.dataloader_idx = index
            found.append(results.metrics(on_step=False))
        results.dataloader_idx = None
        return found

    def install(self, mode: StatisticsMode) -> None:
        """Make ``mode`` the one that was validated, in everything the Trainer shows from now on."""
        assign_modes(self.layers, [mode] * len(self.layers))
        if mode == self.incumbent:
            return
        run, results = self.run_of(mode, self.joint), self.base_results
        foreign = {key: value for key, value in results.items() if self.is_foreign(key, value)}
        lost = self.names(results)
        self.user.put(run.state)
        dict.clear(results)
        dict.update(results, {**foreign, **{key: _lightning.plain_row(row) for key, row in run.results.items()}})
        lost -= self.names(results)
        for name in _lightning.CONNECTOR_METRICS:
            values = getattr(self.connector, name)
            for one in lost:
                values.pop(one, None)
        outputs = _lightning.logged_outputs(self.loop)
        for index, metrics in enumerate(self.per_dataloader(results)):
            outputs[index] = metrics["log"]
            self.publish(metrics)

    def names(self, results: Any) -> set[str]:
        return {name for metrics in self.per_dataloader(results) for kind in metrics.values() for name in kind}
