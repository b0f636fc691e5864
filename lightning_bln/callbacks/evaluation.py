"""One pass over the validation data for all modes: Lightning runs the incumbent, the others run beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bln._scoped import setting
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.run import Copies, RandomState, Run
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
        shared: The :func:`shared_forward` of all evaluations of a fit.
        on_step: Called after each step with the number of modes that it has run.

    Attributes:
        reason: Why modes were evaluated one after the other; None where all were evaluated jointly.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        modes: Iterable[StatisticsMode],
        shared: SharedForward,
        on_step: Callable[[int], None],
    ) -> None:
        self.trainer, self.module, self.shared, self.on_step = trainer, module, shared, on_step
        self.is_first = True
        self.loop = _lightning.evaluation_loop(trainer)
        self.layers = mode_layers(module)
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
        self.takes_batch_idx = _lightning.takes_batch_idx(module.validation_step)
        self.others = tuple(mode for mode in modes if mode != self.incumbent)
        self.reason = shared.reason if len(self.others) > 1 else None
        self.joint: Run | None = None
        self.runs: dict[StatisticsMode, Run] = {}
        if shared.is_verified and self.may_be_joint:
            self.joint = self.start.copy(self.loop, self.others)
        else:
            self.runs = {mode: self.start.copy(self.loop, (mode,)) for mode in self.others}

    @property
    def may_be_joint(self) -> bool:
        """Whether joint evaluation has not been ruled out."""
        return self.reason is None and len(self.others) > 1

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
        with setting([self.trainer], loggers=self.silent), self.user.holding(run):
            try:
                if len(run.modes) == 1:
                    assign_modes(self.layers, run.modes * len(self.layers))
                yield run.results
            finally:
                _, run.log = _lightning.swap_log(self.loop, *log)
                assign_modes(self.layers, modes)

    def step(self, batch: Any, batch_idx: int) -> None:
        """Run every mode but the incumbent on a batch; Lightning's own step of that follows."""
        dataloader_idx = self.base_results.dataloader_idx
        if dataloader_idx != self.dataloader_idx:
            self.each_run(self.close_dataloader)
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
        self.user.sharing.settle()

    def step_per_mode(self, step: Callable[[Run], None], state: RandomState) -> None:
        """Run one mode after the other, each from the same random state."""

        def step_and_restore(run: Run) -> None:
            step(run)
            state.restore()
            self.on_step(1)

        self.shared.step_per_mode(
            list(self.runs.values()),
            step_and_restore,
            verify=self.is_first,
            follows=self.incumbent,
            records=self.is_first,
        )

    def step_jointly(self, joint: Run, step: Callable[[Run], None], state: RandomState) -> bool:
        """Run all modes in one step; where that fails, undo it, part the modes and return False."""
        try:
            with joint.undoable():
                self.shared.step_jointly(joint.modes, lambda: step(joint), verify=self.is_first, follows=self.incumbent)
                if state.has_moved():
                    raise NotTogether("a step draws random numbers")
        except Exception as error:
            # fall back to per-mode steps; user errors resurface there
            self.shared.close()
            state.restore()
            self.part(joint, error)
            self.shared.reason = self.reason
            return False
        self.on_step(len(joint.modes))
        return True

    def verify_joint(self, step: Callable[[Run], None], state: RandomState) -> None:
        """After the per-mode steps on the verification batch, evaluate jointly from now on if that gives the same."""
        joint = self.start.copy(self.loop, tuple(self.runs))
        try:
            if self.shared.failure is not None:
                raise NotTogether(self.shared.failure)
            self.shared.step_jointly(joint.modes, lambda: step(joint))
            if state.has_moved():
                raise NotTogether("a step draws random numbers")
            if not all(joint.part(self.loop, mode).is_same_as(run) for mode, run in self.runs.items()):
                raise NotTogether("a joint step leaves other values than one step for each mode")
            self.shared.is_verified, self.joint, self.runs = True, joint, {}
        except Exception as error:
            # errors of the user's have been raised by the per-mode steps
            self.reason = self.shared.reason = reason_of(error)
        state.restore()

    def part(self, joint: Run, error: Exception) -> None:
        """Give every mode a run of its own from now on."""
        self.reason = reason_of(error)
        self.joint = None
        self.runs = {mode: joint.part(self.loop, mode) for mode in joint.modes}

    def each_run(self, act: Callable[[Run], Any]) -> list[Any]:
        """Results of ``act`` on every run; where the joint run does not allow it, the modes part."""
        if self.joint is not None:
            try:
                return [act(self.joint)]
            except Exception as error:
                self.part(self.joint, error)
        return [act(run) for run in self.runs.values()]

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

    def finish(self) -> dict[StatisticsMode, dict[str, float]]:
        """Metrics of every mode at the end of the pass, the incumbent included; changes nothing."""
        self.each_run(self.close_dataloader)
        scores = self.each_run(self.epoch_scores)
        if self.incumbent is not None:
            # without values that other callbacks logged
            own = {key: row for key, row in self.base_results.items() if not self.is_foreign(key, row)}
            self.runs[self.incumbent] = self.present_run((self.incumbent,), own)
            scores.append(self.epoch_scores(self.runs[self.incumbent]))
        return {mode: values for found in scores for mode, values in found.items()}

    def score(self, mode: StatisticsMode, batches: Iterable[tuple[Any, int | None]], monitor: str) -> float:
        """The score of ``mode`` in a pass over ``batches``, each with its dataloader's index; changes nothing."""
        run, state = self.start.copy(self.loop, (mode,)), RandomState(self.module.device)
        for batch_idx, (batch, dataloader_idx) in enumerate(batches):
            if batch_idx and dataloader_idx != run.results.dataloader_idx:
                self.close_dataloader(run)
            self.run_step(run, Copies(batch).next(), batch_idx, dataloader_idx)
            self.on_step(1)
        self.close_dataloader(run)
        scores = self.epoch_scores(run)[mode]
        state.restore()
        return self.agreed([scores.get(monitor, math.nan)])[0]

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
        others = [run for run in self.runs.values() if run.mode != self.incumbent]
        others += [self.joint] if self.joint is not None else []
        return hook == EPOCH_END or (bool(others) and not any(key in run.results for run in others))

    def epoch_scores(self, run: Run) -> dict[StatisticsMode, dict[str, float]]:
        """The values each mode of ``run`` would log at the end of the epoch; the run itself does not change."""
        ending = Run(run.modes, run.results, UserState.copy(run.state), run.copied_log())
        state = RandomState(self.module.device)
        try:
            with self.acting(ending) as results:
                scores: dict[str, Tensor] = {}
                for metrics in self.per_dataloader(results):
                    scores.update(metrics["callback"])
                _lightning.call_hook(self.module, EPOCH_END)
                scores.update(results.metrics(on_step=False)["callback"])
                if len(run.modes) > 1 and state.has_moved():
                    raise NotTogether("the end of the epoch draws random numbers")
        finally:
            for key in [key for key in run.results if key.startswith(f"{EPOCH_END}.")]:
                del run.results[key]
            state.restore()
        parts = {
            name: value.parts if isinstance(value, PerMode) else [value] * len(run.modes)
            for name, value in scores.items()
            if value.numel() == 1
        }
        return {
            mode: {name: float(values[place]) for name, values in parts.items()} for place, mode in enumerate(run.modes)
        }

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
        run = self.runs[mode] if self.joint is None else self.joint.part(self.loop, mode)
        results = self.base_results
        foreign = {key: value for key, value in results.items() if self.is_foreign(key, value)}
        lost = self.names(results)
        self.user.put(run.state)
        dict.clear(results)
        dict.update(results, {**foreign, **{key: _lightning.plain_row(row) for key, row in run.results.items()}})
        lost -= self.names(results)
        outputs = _lightning.logged_outputs(self.loop)
        for index, metrics in enumerate(self.per_dataloader(results)):
            outputs[index] = metrics["log"]
            _lightning.publish(self.loop, metrics, lost)

    def names(self, results: Any) -> set[str]:
        return {name for metrics in self.per_dataloader(results) for kind in metrics.values() for name in kind}


def shared_forward(trainer: Any, module: Any, shares: bool) -> SharedForward:
    """The shared forward of all evaluations of a fit, which shares nothing if not ``shares``."""
    shared, are_sharded = SharedForward(module), is_sharded(trainer.strategy.model)
    if are_sharded or not shares:
        # ranks that share different forwards would call different collectives of sharded weights
        shared.modules.clear()
        shared.reason = "weights are sharded" if are_sharded else "shares_forwards is False"
    elif trainer.world_size > 1:
        # they could stop joint evaluation at different batches, and then call different collectives
        shared.reason = "there are several ranks"
    return shared
