"""One pass over the validation data for all modes: Lightning runs the incumbent, the others run beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bln._scoped import setting
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.copies import Copies
from lightning_bln.callbacks.epoch_end import undone
from lightning_bln.callbacks.ranks import Ranks
from lightning_bln.callbacks.run import Run, first_difference
from lightning_bln.callbacks.surroundings import Surroundings
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.distributed import is_sharded
from lightning_bln.modes import StatisticsMode, assign_modes
from lightning_bln.per_mode import NotTogether, PerMode, reason_of
from lightning_bln.sweep.random_state import RandomState
from lightning_bln.sweep.shared_forward import SharedForward

EPOCH_END = "on_validation_epoch_end"


class Evaluation:
    """The runs of several modes through one validation loop, set up on its first batch.

    A run has its own result collection (what ``self.log`` fills) and user state, and starts every step from the same
    random state. The Trainer is left as it was found, whatever a run does.

    In joint evaluation one run has several modes, and a step runs once for all of them. Where that cannot be, each of
    them takes the step by itself, from the state before it, and on a later batch they are merged again.

    Args:
        trainer: A Trainer within its validation loop.
        module: The module it validates.
        modes: The modes to evaluate, no two of which are equal for the module, nor one and the present mode.
        shared: The :func:`shared_forward` of the validation.
        on_step: Called after each step with the number of modes that it has run.
        verify: Whether to compare joint evaluation with per-mode evaluation on the first batch.

    Attributes:
        reason: Why modes were evaluated one after the other; None where all were evaluated jointly.
        beside: A run with state of its own, without a mode, that takes each step too.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        modes: Iterable[StatisticsMode],
        shared: SharedForward,
        on_step: Callable[[int], None],
        verify: bool = False,
    ) -> None:
        self.trainer, self.module, self.shared, self.on_step, self.verifies = trainer, module, shared, on_step, verify
        self.loop = _lightning.evaluation_loop(trainer)
        self.layers = shared.layers
        modes_set = {layer.mode for layer in self.layers}
        self.incumbent = modes_set.pop() if len(modes_set) == 1 else None
        self.user = UserState(module)
        self.base_results = _lightning.results(self.loop)
        self.dataloader_idx = self.base_results.dataloader_idx
        early = {
            key: row
            for key, row in self.base_results.items()
            if not row.has_reset and not row.meta.fx.startswith("validation_step")
        }
        self.start = self.present_run((), early).copy(self.loop, ())
        self.silent = _lightning.silent_loggers(trainer)
        plain = getattr(_lightning.bases(module)["LightningModule"], EPOCH_END)
        self.has_hook = getattr(type(module), EPOCH_END) is not plain
        self.takes_batch_idx = _lightning.takes_batch_idx(module.validation_step)
        self.candidates = tuple(modes)
        self.others = tuple(mode for mode in self.candidates if mode != self.incumbent)
        self.modes = self.others if self.incumbent is None else (*self.others, self.incumbent)
        self.runs: list[Run] = [self.start.copy(self.loop, (mode,)) for mode in self.others]
        self.beside: Run | None = None
        self.ranks, self.around, self.runs_hook = Ranks(trainer), Surroundings(module), False

    @property
    def reason(self) -> str | None:
        """The reason why modes were evaluated one after the other the last time."""
        return self.shared.reason if len(self.others) > 1 else None

    def present_run(self, modes: tuple[StatisticsMode, ...], rows: dict[str, Any]) -> Run:
        """A run of Lightning's own state, by reference, with ``rows`` of its logged values."""
        results = _lightning.new_results(self.loop)
        results.update(rows)
        return Run(modes, results, self.user.take(), _lightning.log_state(self.loop))

    @contextmanager
    def acting(self, run: Run) -> Iterator[Any]:
        """Within the context mode, log and user state are those of ``run``, and loggers take no note."""
        modes = [layer.mode for layer in self.layers]
        log = _lightning.swap_log(self.loop, run.results, run.log)
        with setting([self.trainer], loggers=self.silent), self.around.of(run), self.user.holding(run):
            try:
                if len(run.modes) == 1:
                    assign_modes(self.layers, run.modes * len(self.layers))
                yield run.results
            finally:
                _, run.log = _lightning.swap_log(self.loop, *log)
                assign_modes(self.layers, modes)

    def step(self, batch: Any, batch_idx: int) -> None:
        """Run every mode but the incumbent on a batch; Lightning's own step of that follows."""
        self.around.begin_batch()
        dataloader_idx = self.base_results.dataloader_idx
        if dataloader_idx != self.dataloader_idx:
            self.close_dataloaders()
            self.dataloader_idx = dataloader_idx
        copies, state = Copies(batch), RandomState(self.module.device)
        self.shared.begin(len(self.modes))

        def step(run: Run) -> None:
            self.run_step(run, copies.next(), batch_idx, dataloader_idx)
            if state.has_moved():
                state.restore()
                if len(run.modes) > 1:
                    self.shared.recordings.clear()  # something of the model's may have drawn

        with self.ranks.in_step():
            if self.may_be_joint(copies):
                self.step_jointly(step, state)
            else:
                self.step_alone(self.parted(), step)
            if self.beside is not None:
                step(self.beside)
        self.user.sharing.settle()
        self.around.end_batch()
        self.shared.follow(self.incumbent)

    def may_be_joint(self, copies: Copies) -> bool:
        """Whether to try a joint step on this batch."""
        if copies.shared is not None:
            self.shared.reason = f"a batch holds a {copies.shared}"
            return False
        return self.shared.is_active and len(self.modes) > 1 and not self.shared.patience.is_over()

    def step_jointly(self, step: Callable[[Run], None], state: RandomState) -> None:
        """Run all modes in as few steps as memory allows; those that cannot be together take the step alone."""
        left, done, is_joint = self.modes, list[Run](), True
        singles: dict[StatisticsMode, Run] = {}
        while left:
            modes, left = left[: self.shared.chunk], left[self.shared.chunk :]
            joint = next((run for run in self.runs if run.modes == modes), None)
            if joint is None and not singles:
                singles = {run.mode: run for run in self.singles()}
            if is_joint and len(modes) > 1:
                joint = self.stepped(joint or [singles[mode] for mode in modes], step, state)
                is_joint = joint is not None
                if joint is not None:
                    done.append(joint)
                    continue
            singles = singles or {run.mode: run for run in self.singles()}
            alone = [singles[mode] for mode in modes if mode != self.incumbent]
            self.step_alone(alone, step, left)
            done += alone
        self.runs = done
        if is_joint:
            self.shared.patience.succeeded()
        else:
            self.shared.patience.failed()

    def stepped(self, runs: Run | list[Run], step: Callable[[Run], None], state: RandomState) -> Run | None:
        """The joint run of ``runs`` after a step; None, and all as it was, where that cannot be."""
        try:
            joint = runs if isinstance(runs, Run) else Run.merged(self.loop, runs)
            before = [joint.part(self.loop, mode) for mode in joint.modes] if self.verifies else []
            with joint.undoable(), self.shared.together(joint.modes), self.ranks.refusing():
                step(joint)
        except Exception as error:
            # the user's own come again where each mode takes the step by itself
            state.restore()
            self.shared.note(error, len(runs.modes if isinstance(runs, Run) else runs))
            return None
        if self.verifies:
            self.verify(joint, before, step)
        self.on_step(sum(mode != self.incumbent for mode in joint.modes))
        return joint

    def step_alone(
        self, runs: Sequence[Run], step: Callable[[Run], None], others: Sequence[StatisticsMode] = ()
    ) -> None:
        """Run one mode after the other, each from the same random state."""
        modes = [*(run.mode for run in runs), *others]
        if self.incumbent is not None:
            modes.append(self.incumbent)
        for place, run in enumerate(runs):
            with self.shared.alone(run.mode, modes[place + 1 :]):
                step(run)
            self.on_step(1)

    def verify(self, joint: Run, runs: list[Run], step: Callable[[Run], None]) -> None:
        """Raise unless each mode by itself comes to the values of the joint run."""
        self.verifies = False
        for run in runs:
            step(run)
            if not joint.part(self.loop, run.mode).is_same_as(run):
                raise RuntimeError(
                    f"verify=True: together modes come to other values than {run.mode} by itself: "
                    f"{first_difference(joint.part(self.loop, run.mode), run)}"
                )

    def parted(self) -> list[Run]:
        """A run for each mode but the incumbent, which are the runs of this evaluation from now on."""
        every = [run.part(self.loop, mode) if len(run.modes) > 1 else run for run in self.runs for mode in run.modes]
        self.runs = [run for run in every if run.mode != self.incumbent]
        return self.runs

    def singles(self) -> list[Run]:
        """A run for each mode, the incumbent's a copy of what Lightning has."""
        runs = self.parted()
        if self.incumbent is None:
            return runs
        # without rows of earlier validations, which Lightning keeps
        own = {key: self.base_results[key] for key in runs[0].results if key in self.base_results}
        return [*runs, self.present_run((self.incumbent,), own).copy(self.loop, (self.incumbent,))]

    def own_run(self) -> Run:
        """Lightning's own run, by reference, without values that other callbacks logged."""
        own = {key: row for key, row in self.base_results.items() if not self.is_foreign(key, row)}
        return self.present_run(() if self.incumbent is None else (self.incumbent,), own)

    def close_dataloaders(self) -> None:
        """Compute the metrics of the dataloader that has ended, in every run."""
        if self.trainer.world_size > 1:
            self.parted()  # ranks may have merged other modes, and metrics are reduced over ranks
        self.of_each(self.close_dataloader)
        if self.beside is not None:
            self.close_dataloader(self.beside)

    def of_each(self, act: Callable[[Run], Any]) -> list[Any]:
        """Results of ``act`` on every run; modes whose joint run does not allow it part, and each acts by itself."""
        results, runs = [], list[Run]()
        for run in self.runs:
            try:
                with nullcontext() if len(run.modes) == 1 else run.undoable():
                    results.append(act(run))
                runs.append(run)
            except Exception as error:  # the user's own come again from each mode by itself
                if len(run.modes) == 1:
                    raise
                self.shared.reason = reason_of(error)
                parts = [run.part(self.loop, mode) for mode in run.modes if mode != self.incumbent]
                results += [act(one) for one in parts]
                runs += parts
        self.runs = runs
        return results

    def run_step(self, run: Run, batch: Any, batch_idx: int, dataloader_idx: int | None) -> None:
        """One validation step of a run, between the module's own hooks."""
        where = [] if dataloader_idx is None else [dataloader_idx]
        index = [batch_idx] if self.takes_batch_idx else []
        call = partial(_lightning.call_hook, self.module)
        with self.acting(run) as results:
            results.batch, results.batch_size, results.dataloader_idx = batch, None, dataloader_idx
            call("on_validation_batch_start", batch, batch_idx, *where)
            output = call("validation_step", batch, *index, *where, owner=self.trainer.strategy)
            call("on_validation_batch_end", output, batch, batch_idx, *where)
            results.batch = results.batch_size = None

    def close_dataloader(self, run: Run) -> None:
        """Compute a dataloader's metrics when it ends, as Lightning does: the next one may use the same objects."""
        with self.acting(run) as results:
            _lightning.publish(self.loop, results.metrics(on_step=False))

    def finish(self, monitor: str) -> dict[StatisticsMode, dict[str, float]]:
        """Metrics of every mode at the end of the pass, the incumbent included; changes nothing.

        The module's hook for the end of the epoch runs only where ``monitor`` is not known before, once for each mode.
        """
        self.around.begin_batch()
        self.close_dataloaders()
        scores = self.all_scores()
        is_missing = any(monitor not in values for values in scores.values())
        if self.beside is not None and not self.modes:
            is_missing = self.has_hook and monitor not in self.values(self.own_run())
        self.runs_hook = self.trainer.strategy.reduce_boolean_decision(is_missing, all=False)
        return self.all_scores() if self.runs_hook else scores

    def all_scores(self) -> dict[StatisticsMode, dict[str, float]]:
        """The metrics of every mode."""
        scores = {mode: values for found in self.of_each(self.epoch_scores) for mode, values in found.items()}
        if self.incumbent is not None:
            scores.update(self.epoch_scores(self.own_run()))
        return {mode: scores[mode] for mode in self.modes}

    def agreed(self, values: list[float]) -> list[float]:
        """``values`` averaged over ranks, so that all choose the same mode."""
        if self.trainer.world_size == 1:
            return values
        strategy = self.trainer.strategy
        return strategy.reduce(torch.tensor(values, device=strategy.root_device), reduce_op="mean").tolist()

    def is_foreign(self, key: str, value: Any) -> bool:
        """Whether a callback logged ``value``, so that no run of the module has it."""
        hook = value.meta.fx.partition(".")[0]
        if hook == "validation_step":
            return False
        return hook == EPOCH_END or (bool(self.runs) and not any(key in run.results for run in self.runs))

    def epoch_scores(self, run: Run) -> dict[StatisticsMode, dict[str, float]]:
        """The values each mode of ``run`` has logged, or with the module's hook would log; the run does not change."""
        parts = {
            name: value.parts if isinstance(value, PerMode) else [value] * len(run.modes)
            for name, value in self.values(run).items()
        }
        return {
            mode: {name: float(values[place]) for name, values in parts.items()} for place, mode in enumerate(run.modes)
        }

    def values(self, run: Run) -> dict[str, Tensor]:
        """Each number that ``run`` has logged, or with the module's hook would log; the run does not change."""
        ending = Run(run.modes, run.results, UserState.copy(run.state, deep=True), run.copied_log(), run.structure)
        state = RandomState(self.module.device)
        try:
            with undone(self.trainer, self.module), self.around.watching(), self.acting(ending) as results:
                scores: dict[str, Tensor] = {}
                for metrics in self.per_dataloader(results):
                    scores.update(metrics["callback"])
                if self.runs_hook:
                    _lightning.call_hook(self.module, EPOCH_END)
                scores.update(results.metrics(on_step=False)["callback"])
                if len(run.modes) > 1 and state.has_moved():
                    raise NotTogether("the end of the epoch draws random numbers")
        finally:
            for key in [key for key in run.results if key.startswith(f"{EPOCH_END}.")]:
                del run.results[key]
            state.restore()
        return {name: value for name, value in scores.items() if value.numel() == 1}

    def per_dataloader(self, results: Any) -> list[Any]:
        """The metrics of each dataloader, in order; one entry if dataloaders share them."""
        found = []
        for index in _lightning.dataloader_indices(self.loop):
            results.dataloader_idx = index
            found.append(results.metrics(on_step=False))
        results.dataloader_idx = None
        return found

    def install(self, mode: StatisticsMode) -> None:
        """Make ``mode`` the one that was validated, in everything the Trainer shows from now on."""
        assign_modes(self.layers, [mode] * len(self.layers))
        if mode == self.incumbent:
            return
        run = next(run.part(self.loop, mode) for run in self.runs if mode in run.modes)
        results = self.base_results
        foreign = {key: value for key, value in results.items() if self.is_foreign(key, value)}
        lost = self.names(results)
        self.user.write(run.state)
        dict.clear(results)
        dict.update(results, {**foreign, **{key: _lightning.plain_row(row) for key, row in run.results.items()}})
        lost -= self.names(results)
        outputs = _lightning.logged_outputs(self.loop)
        for index, metrics in enumerate(self.per_dataloader(results)):
            outputs[index] = metrics["log"]
            _lightning.publish(self.loop, metrics, lost)

    def names(self, results: Any) -> set[str]:
        return {name for metrics in self.per_dataloader(results) for kind in metrics.values() for name in kind}


def shared_forward(
    trainer: Any, module: Any, shares: bool, before: SharedForward | None, fixed: Collection[Any] = ()
) -> SharedForward:
    """The shared forward of a validation, which shares nothing if not ``shares``, and goes on from ``before``."""
    shared, are_sharded = SharedForward(module, fixed=fixed), is_sharded(trainer.strategy.model)
    if are_sharded or not shares:
        # ranks that share different forwards would call different collectives of sharded weights
        shared.modules.clear()
        shared.is_active = False
        shared.reason = "weights are sharded" if are_sharded else "shares_forwards is False"
    elif before is not None:
        shared.largest, shared.patience = before.largest, before.patience
        shared.recording_patience = before.recording_patience
    return shared
