"""One pass over the validation data for all modes: Lightning runs one of them, the others run beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.run import Copies, RandomState, Run, Silent, copied_row, nothing
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.modes import StatisticsMode, assign_modes, mode_layers
from lightning_bln.sweep.per_mode_tensor import NotTogether, PerMode
from lightning_bln.sweep.shared_forward import SharedForward

EPOCH_END = "on_validation_epoch_end"


class Evaluation:
    """The runs of several modes through one validation loop, made on its first batch.

    A run has its own result collection (what ``self.log`` fills), its own user state, and starts every step from the
    same random state. Whatever a run does, the Trainer is left as it was found.

    Where a module's step allows, all modes go through it together: in the first batch of the first evaluation they do
    so besides each taking its own turn, and go on together if that comes to the same. Once a step does not allow it,
    they part with what they have gathered.
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
        self.silent = [Silent() for _ in trainer.loggers]
        self.takes_batch_idx = _lightning.takes_batch_idx(module.validation_step)
        self.dataloader_idx = self.base_results.dataloader_idx
        self.others = tuple(mode for mode in modes if mode != self.incumbent)
        # several ranks could part at different batches, and then call different collectives
        self.may_go_together = shared is not None and bool(self.others) and trainer.world_size == 1
        self.joint: Run | None = None
        self.runs: dict[StatisticsMode, Run] = {}
        if shared is not None and shared.goes_together and self.may_go_together:
            self.joint = self.new_run(self.others)
        else:
            self.runs = {mode: self.new_run((mode,)) for mode in self.others}

    def new_run(self, modes: tuple[StatisticsMode, ...]) -> Run:
        """A run that has seen no batch yet; values logged before the first batch belong to every run."""
        results = _lightning.new_results(self.loop, has_bar=len(modes) == 1)
        for key, row in self.early.items():
            results[key] = copied_row(row)
        return Run(modes, results, UserState.copy(self.base), [dict(values) for values in self.early_metrics])

    @contextmanager
    def acting(self, run: Run) -> Iterator[Any]:
        """Within the context everything belongs to ``run``: mode, log, user state, loggers."""
        connector, module, trainer = self.connector, self.module, self.trainer
        results = _lightning.swap_results(self.loop, run.results)
        state = self.user.take()
        hook, fx = connector._current_fx, _lightning.current_hook(module)
        metrics = [getattr(connector, name) for name in _lightning.CONNECTOR_METRICS]
        loggers, modes = trainer.loggers, [layer.mode for layer in self.layers]
        try:
            self.user.put(run.state)
            connector._current_fx = run.hook
            for name, values in zip(_lightning.CONNECTOR_METRICS, run.metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = self.silent
            if len(run.modes) == 1:
                assign_modes(self.layers, run.modes * len(self.layers))
            yield run.results
        finally:
            run.state = self.user.take()
            run.hook = connector._current_fx
            run.metrics = [getattr(connector, name) for name in _lightning.CONNECTOR_METRICS]
            self.user.put(state)
            _lightning.swap_results(self.loop, results)
            connector._current_fx = hook
            _lightning.set_current_hook(module, fx)
            for name, values in zip(_lightning.CONNECTOR_METRICS, metrics, strict=True):
                setattr(connector, name, values)
            if loggers:
                trainer.loggers = loggers
            assign_modes(self.layers, modes)

    def step(self, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """Every run's turn at a batch that Lightning is about to give to the incumbent."""
        if dataloader_idx != self.dataloader_idx:
            self.close_dataloaders()
            self.dataloader_idx = dataloader_idx
        copies = Copies(batch)
        state = RandomState(self.module.device)

        def turn(run: Run) -> None:
            self.run_step(run, copies.next(), batch_idx, dataloader_idx)

        if self.joint is None or not self.step_together(self.joint, turn, state):
            self.step_in_turns(turn, state)
            if self.is_first and self.may_go_together:
                self.try_together(turn, state)
        self.is_first = False

    def step_in_turns(self, turn: Callable[[Run], None], state: RandomState) -> None:
        """Let one run after the other have its turn, from the same random state."""

        def turn_and_restore(run: Run) -> None:
            turn(run)
            state.restore()
            self.on_step(1)

        runs = list(self.runs.values())
        if self.shared is None:
            for run in runs:
                turn_and_restore(run)
        else:
            # the incumbent's turn is Lightning's own step, which comes next
            self.shared.each(
                runs, turn_and_restore, recheck=self.is_first, follows=self.incumbent, records=self.is_first
            )

    def step_together(self, joint: Run, turn: Callable[[Run], None], state: RandomState) -> bool:
        """Let all runs have one turn; where that cannot be, they part as they were before it."""
        assert self.shared is not None
        try:
            with joint.undoable():
                self.shared.together(joint.modes, lambda: turn(joint), recheck=self.is_first, follows=self.incumbent)
                if state.has_moved():
                    raise NotTogether("a step draws random numbers")
        except Exception:
            # whatever it is, the turns one by one come next, and raise what is the user's
            self.shared.close()
            self.shared.goes_together = False
            state.restore()
            self.part(joint)
            return False
        self.on_step(len(joint.modes))
        return True

    def try_together(self, turn: Callable[[Run], None], state: RandomState) -> None:
        """Find out, after the first batch in turns, whether all modes can go together from now on."""
        assert self.shared is not None
        if self.shared.goes_together is not None or not self.shared.is_active:
            return
        joint = self.new_run(tuple(self.runs))
        try:
            self.shared.together(joint.modes, lambda: turn(joint))
            parts = [joint.part(_lightning.new_results(self.loop), place) for place in range(len(joint.modes))]
            is_same = all(part.is_same_as(run) for part, run in zip(parts, self.runs.values(), strict=True))
            self.shared.goes_together = is_same and not state.has_moved()
        except Exception:
            self.shared.goes_together = False
        state.restore()
        if self.shared.goes_together:
            self.joint, self.runs = joint, {}

    def part(self, joint: Run) -> None:
        """From here on every mode has a run of its own."""
        self.joint = None
        self.runs = {mode: self.run_of(mode, joint) for mode in joint.modes}

    def run_of(self, mode: StatisticsMode, joint: Run | None) -> Run:
        """The run of one mode."""
        if joint is None or mode not in joint.modes:
            return self.runs[mode]
        return joint.part(_lightning.new_results(self.loop), joint.modes.index(mode))

    def run_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int | None) -> Any:
        """One validation step of a run, with the module's own hooks around it."""
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
            except Exception:
                self.part(self.joint)
        self.close_dataloader(self.runs.values(), self.dataloader_idx)

    def close_dataloader(self, runs: Iterable[Run], dataloader_idx: int | None) -> None:
        """Compute what belongs to a dataloader when it ends, as Lightning does: its metrics may serve the next one."""
        for run in runs:
            with self.acting(run) as results:
                results.dataloader_idx = dataloader_idx
                self.publish(results.metrics(on_step=False))

    def publish(self, metrics: Any) -> None:
        for name, kind in zip(_lightning.CONNECTOR_METRICS, ("callback", "log", "pbar"), strict=True):
            getattr(self.connector, name).update(metrics[kind])

    def finish(self) -> dict[StatisticsMode, dict[str, float]]:
        """Every mode's metrics at the end of the pass, the incumbent's among them; changes nothing."""
        self.close_dataloaders()
        scores: dict[StatisticsMode, dict[str, float]] = {}
        if self.joint is not None:
            try:
                scores = self.epoch_scores(self.joint)
            except Exception:
                self.part(self.joint)
        if self.incumbent is not None:
            self.runs[self.incumbent] = self.incumbent_run(self.incumbent)
        for run in self.runs.values():
            scores |= self.epoch_scores(run)
        return scores

    def score(self, mode: StatisticsMode, batches: Iterable[tuple[Any, int | None]], monitor: str) -> float:
        """What ``mode`` scores in a pass over ``batches``, each with its dataloader's index; changes nothing."""
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
        """``values`` averaged over ranks, so that all of them choose alike."""
        if self.trainer.world_size == 1:
            return values
        strategy = self.trainer.strategy
        return strategy.reduce(torch.tensor(values, device=strategy.root_device), reduce_op="mean").tolist()

    def incumbent_run(self, mode: StatisticsMode) -> Run:
        """The run Lightning itself did, without what other callbacks logged in it."""
        results = _lightning.new_results(self.loop)
        results.update({key: value for key, value in self.base_results.items() if not self.is_foreign(key, value)})
        metrics = [dict(getattr(self.connector, name)) for name in _lightning.CONNECTOR_METRICS]
        run = Run((mode,), results, self.user.take(), metrics)
        run.hook = self.connector._current_fx
        return run

    def is_foreign(self, key: str, value: Any) -> bool:
        """Whether a callback logged ``value``: no run of the module alone has it."""
        if value.meta.fx.partition(".")[0] == "validation_step":
            return False
        others = [run for run in self.runs.values() if run.mode != self.incumbent]
        others += [self.joint] if self.joint is not None else []
        is_early = value.meta.fx.partition(".")[0] != EPOCH_END
        return not (is_early and (not others or any(key in run.results for run in others)))

    def epoch_scores(self, run: Run) -> dict[StatisticsMode, dict[str, float]]:
        """What each mode of ``run`` would log at the end of the epoch; its state stays as before the module's hook."""
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
        """What each dataloader logged, in order; one entry where they are not kept apart."""
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
        """Make ``mode`` the one that was validated, for everything that looks at the Trainer from now on."""
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
