"""The callback: at which of the Trainer's hooks the population is frozen and a statistics mode chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning_bln._checks import check_bool
from lightning_bln._torch import ignore_in_ddp
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.averaging import (
    exclude_populations,
    population_buffers,
    saving_average,
    saving_statistics,
    write_statistics,
)
from lightning_bln.callbacks.checks import check_arguments, check_model, check_validation_data
from lightning_bln.callbacks.choice import conclude, set_up
from lightning_bln.callbacks.comparison import Comparison
from lightning_bln.callbacks.display import SweepBar, check_log, label_bar, report, sparing
from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.callbacks.freezing import Freezing
from lightning_bln.callbacks.guard import Guard
from lightning_bln.callbacks.kept_batches import KeptBatches
from lightning_bln.callbacks.mailbox import Arrived, Mailbox
from lightning_bln.callbacks.messages import Messages
from lightning_bln.callbacks.namespaces import of_both, revive
from lightning_bln.callbacks.readings import check_readable
from lightning_bln.callbacks.recompute import check_recompute
from lightning_bln.callbacks.running_averages import RunningAverages
from lightning_bln.modes import assign_modes, mode_layers, parse_modes, setting_modes
from lightning_bln.recomputation import populations
from lightning_bln.sweep.result import Direction, SweepResult, one_direction
from lightning_bln.sweep.shared_forward import SharedForward

__all__ = ["BLNStatsCallback", "revive"]

for _namespace in _lightning.namespaces():
    _lightning.check(_namespace)


class BLNStatsCallback(*_lightning.callback_bases()):  # type: ignore[misc]
    r"""Freeze the population before each validation, and set the statistics mode that validates best.

    One pass over the validation data evaluates every candidate mode, with the module's own ``validation_step`` and
    whatever it logs. The best mode is set and its metrics are those logged under their plain names, so that
    checkpoints, early stopping, schedulers and loggers act on the model as it will be used. Checkpoints hold mode and
    population.

    Args:
        monitor: Name of the logged validation metric by which to choose.
        direction: Whether small values of the metric are good (``"min"``, the default) or large ones (``"max"``).
        candidates: The modes to choose from: ``"all"``, ``"batch_independent"``, ``"foldable"`` for the one that
            :func:`lightning_bln.fold` takes into weights, or modes by name or by pattern, in which a star stands for
            either letter: ``"pp**"``, ``["cccc", "pp*c"]``. Of equal ones, one is evaluated.
        population: ``"recompute"`` computes it over training batches at the weights to be validated; ``"epoch"``
            averages over the epoch's training batches while the weights move, as the paper does.
        samples: Recompute it over the first training batches that hold as many samples, over all ranks, which go
            through the model together; None for each batch by itself.
        recompute_batches: Number of training batches to recompute it over at most, on each rank; None for no limit.
        every_n_epochs: Choose at every n-th epoch; the population is frozen at every validation.
        guard: Response where the best mode uses the current batch and its score depends on how samples are grouped
            into batches: ``"strict"`` sets the best batch-independent mode instead, ``"warn"`` warns by how much the
            score moves, ``"off"`` skips the check.
        tolerance: The relative change of the score that the guard accepts.
        stats_dataloader: Batches to recompute the population over, in place of the training data.
        log: What loggers get: True for ``bln/mode`` (0 to 15, the letters as bits: p is 0, c is 1), where the guard has
            looked ``bln/<monitor>/spread`` and where it compares ``bln/<monitor>/running_averages``; ``"all"`` for
            ``bln/<metric>/<mode>`` too; False for nothing.
        plot: Whether to give the heat map to loggers that take figures, at the end of fit.
        save_dir: Folder for ``bln_sweep.json``, ``bln_sweep.png`` and ``bln_comparison.json`` at the end of fit; None
            writes nothing.
        verbose: Whether to say what goes on and to print the table of scores at the end of fit; warnings come anyway.
        mode: Earlier name of ``direction``.
        refresh_on_save: Whether to compute the population anew before a checkpoint is saved whose weights have been
            trained since the last validation. Without, loading such a checkpoint warns.
        batchnorm: Running statistics of torch's batch norms: True computes them, too, in place of the averages that
            training keeps; ``"validate"`` gives those averages back when training goes on; False leaves them alone.
            Weights train alike, unless training reads running statistics: then only with the last two.
        compare: Whether to validate by those running averages, too, for the table of what their replacement brought.
        verify: Whether to compare, on the first batch of each validation, what modes come to together with what each
            comes to alone, and raise where they differ: for finding faults.

    Attributes:
        result: The last :class:`~lightning_bln.sweep.SweepResult`, or None before the first choice.
        history: ``(epoch, step, mode, score)`` of every choice.
        comparison: What running statistics of batch norms brought in the last validation, or None.

    Raises:
        ValueError: An argument is none of those above.
        MisconfigurationException: Model, data or Trainer do not suit the callback (at the start of fit or validate),
            or nothing logs ``monitor`` (at the first validation).

    Example:
        >>> callback = BLNStatsCallback("val_acc", direction="max", candidates="batch_independent")
        >>> callback.candidates
        ('pppp', 'pppc', 'ppcp', 'ppcc')
    """

    result = Arrived[SweepResult | None]()
    history = Arrived[list[tuple[int, int, str, float]]]()

    shares_forwards = True
    """Whether modes share forwards where the model allows it; without, the results are the same and take longer."""

    def __init__(
        self,
        monitor: str = "val_loss",
        direction: Direction | None = None,
        *,
        candidates: str | Iterable[str] = "all",
        population: str = "recompute",
        samples: int | None = 1024,
        recompute_batches: int | None = None,
        every_n_epochs: int = 1,
        guard: str = "strict",
        tolerance: float = 0.01,
        stats_dataloader: Iterable[Any] | None = None,
        log: bool | Literal["all"] = True,
        plot: bool = False,
        save_dir: str | Path | None = None,
        verbose: bool = True,
        mode: Direction | None = None,
        refresh_on_save: bool = False,
        batchnorm: bool | Literal["validate"] = True,
        compare: bool = True,
        verify: bool = False,
    ) -> None:
        super().__init__()
        # a Trainer takes only callbacks of its own namespace, which may have been imported after this module
        later = tuple(base for base in _lightning.callback_bases() if not isinstance(self, base))
        if later:
            self.__class__ = of_both(type(self), later)  # type: ignore[arg-type]
        check_arguments(
            population=population,
            guard=guard,
            samples=samples,
            recompute_batches=recompute_batches,
            every_n_epochs=every_n_epochs,
            tolerance=tolerance,
            batchnorm=batchnorm,
        )
        self.monitor, self.direction = monitor, one_direction(direction, mode)
        self.candidates = parse_modes("candidates", candidates)
        self.population, self.samples, self.recompute_batches = population, samples, recompute_batches
        self.every_n_epochs, self.guard, self.tolerance = every_n_epochs, guard, tolerance
        self.stats_dataloader = stats_dataloader
        self.should_log, self.plot, self.verbose = check_log(log), plot, verbose
        self.refresh_on_save = check_bool("refresh_on_save", refresh_on_save)
        self.batchnorm = batchnorm if population == "recompute" else False
        self.compare, self.verify = check_bool("compare", compare), check_bool("verify", verify)
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.mailbox = Mailbox()
        self.result = None
        self.history = []
        self.comparison: Comparison | None = None
        self.averages = RunningAverages()
        self._evaluation: Evaluation | None = None
        self._guard: Guard | None = None
        self._shared: SharedForward | None = None
        self._is_sweeping = self._is_validating = False
        self._freezing = Freezing()
        self._before_choice: tuple[Any, ...] | None = None
        self._messages = Messages(verbose)
        self._while_quiet = ExitStack()
        self._during_fit = ExitStack()
        self._bar = SweepBar()

    @property
    def mode(self) -> Direction:
        """Earlier name of ``direction``."""
        return self.direction

    @property
    def state_key(self) -> str:
        # as lightning's own private helper formats it, and by the earlier name, since checkpoints hold it
        arguments = {"monitor": self.monitor, "mode": self.direction}
        return f"{type(self).__qualname__}{arguments}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        ours = [callback for callback in trainer.callbacks if isinstance(callback, BLNStatsCallback)]
        if len(ours) > 1:
            raise _lightning.misconfiguration(
                trainer,
                f"callbacks has {len(ours)} BLNStatsCallback, but a model has one statistics mode at a time; keep one",
            )
        # after callbacks that log or average weights, before those that save; in a new list, since the Trainer is
        # iterating over this one
        others = [callback for callback in trainer.callbacks if callback is not self]
        last = next((place for place, one in enumerate(others) if "Checkpoint" in _lightning.bases(one)), len(others))
        trainer.callbacks = [*others[:last], self, *others[last:]]
        ignore_in_ddp(pl_module, population_buffers)
        self._messages.begin()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        check_model(trainer, pl_module, self.batchnorm)
        self._freezing, self._is_validating = Freezing(), False  # another fit may bring other data, or another module
        if self.population == "recompute":
            check_recompute(trainer, pl_module)
            self._check_readable(trainer, _lightning.given_train_loaders(trainer))
        if trainer.global_step == 0 and trainer.ckpt_path is None:
            self.result, self.history, self.comparison = None, [], None  # those of an earlier fit
            self.averages = RunningAverages()
        for callback in trainer.callbacks:
            exclude_populations(callback, pl_module)
        self._during_fit.enter_context(saving_average(trainer.callbacks, pl_module))
        if self.refresh_on_save:
            refresh = partial(self._freezing.refresh, self, trainer, pl_module)
            self._during_fit.enter_context(saving_statistics(pl_module, refresh))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # not in on_fit_start: sharded weights are loaded after it
        if any(one.is_frozen for one in populations(pl_module)):
            self._announce(trainer, pl_module, "resumes" if trainer.global_step or trainer.ckpt_path else "starts")
        check_validation_data(trainer)
        if self.population == "recompute":
            self._check_readable(trainer, _lightning.train_loader(trainer).flattened)

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._quiet_layers()  # before training there is no population, and a warning of it would be noise

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self._while_quiet.close()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._put_back(pl_module)  # before the module's own hooks

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        # not in on_train_epoch_start, which the Trainer skips when it resumes, within an epoch and right after one
        if batch_idx == 0:
            for population in populations(pl_module):
                population.reset()
        self._put_back(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation = self._guard = None
        fitting = trainer.state.fn == "fit"
        self._is_validating, self._freezing.is_due = fitting and not trainer.sanity_checking, False
        if self._is_validating:
            self._freezing.begin(self, pl_module)
            _lightning.begin_again(trainer)
        self._is_sweeping = (
            not trainer.sanity_checking
            and not trainer.barebones
            and (not fitting or (trainer.current_epoch + 1) % self.every_n_epochs == 0)
        )
        if not fitting:
            check_model(trainer, pl_module, self.batchnorm)
            self._announce(trainer, pl_module, "starts to validate")
            if mode_layers(pl_module) and not any(one.is_frozen for one in populations(pl_module)):
                self._is_sweeping = False
                self._messages.warn(
                    trainer,
                    "BLNStatsCallback chooses no mode: the model has no population yet, so each batch's own statistics "
                    "are used; call fit first",
                )
                self._quiet_layers()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._freezing.is_due:
            # not earlier: only now has all that validates an average swapped it in
            self._freezing.is_due = False
            self._freezing.freeze(self, trainer, pl_module)
        if not self._is_sweeping:
            return
        if self._evaluation is None:
            set_up(self, trainer, pl_module)
            if self._evaluation is None:
                return
        if batch_idx == 0 and self._evaluation.candidates:
            label_bar(trainer, f"Validation in {len(self._evaluation.candidates)} modes")
        if self._guard is not None:
            self._guard.keep(batch, self._evaluation.base_results.dataloader_idx)
        self._evaluation.step(batch, batch_idx)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._close_shared()
        self._freezing.note_accumulators(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        evaluation, guard = self._evaluation, self._guard
        self._evaluation = self._guard = None
        if evaluation is not None:
            conclude(self, trainer, evaluation, guard)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._while_quiet.close()
        self._before_choice, self._is_validating = None, False
        if self.batchnorm != "validate":
            self.averages.kept = {}  # the statistics computed stay

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._freezing.freeze(self, trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._freezing.freeze_again(self, trainer, pl_module)  # the module's own on_train_end comes after ours
        self.averages.kept = {}
        if not trainer.is_global_zero:
            return
        report(
            self.result,
            self.comparison,
            trainer,
            folder=self.save_dir,
            loggers=trainer.loggers if self.should_log else [],
            plot=self.plot,
            table=self.verbose,
        )

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._announce(trainer, pl_module, "tests")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._announce(trainer, pl_module, "predicts")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close_shared()
        self._shared, self._freezing.kept = None, KeptBatches()
        self._during_fit.close()
        self.averages.kept = {}
        with sparing("hand its result to the process that started this one"):
            self.mailbox.send(trainer, self.state_dict())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._evaluation = self._guard = None
        if self._before_choice is not None:  # a validation that did not come to its end chooses nothing
            layers, modes, self.result, self.history = self._before_choice
            self._before_choice = None
            assign_modes(layers, modes)
        self._bar.close()
        self._close_shared()
        self._while_quiet.close()
        self._during_fit.close()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        layers, modes = (self._before_choice or ([], []))[:2]
        with setting_modes(layers, modes):
            write_statistics(pl_module, checkpoint["state_dict"])
        if self._is_validating:
            _lightning.mark_cut(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        result, history = (self._before_choice or (None, None, self.result, self.history))[2:]
        state: dict[str, Any] = {
            "result": None if result is None else result.to_dict(),
            "history": [list(choice) for choice in history],
        }
        if self.comparison is not None:
            state["comparison"] = asdict(self.comparison)
        if self.averages.kept and self.batchnorm == "validate":
            state["running_averages"] = self.averages.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["result"]
        self.result = None if saved is None else SweepResult.from_dict(saved)
        self.history = [(epoch, step, mode, score) for epoch, step, mode, score in state_dict["history"]]
        self.comparison = Comparison(**state_dict["comparison"]) if "comparison" in state_dict else None
        self.averages.load_state_dict(state_dict.get("running_averages", {}))

    def _quiet_layers(self) -> None:
        """Keep layers from warning, each, that they have no population."""
        self._while_quiet.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*needs a population.*")

    def _put_back(self, module: Any) -> None:
        if self.averages.kept and self.batchnorm == "validate":
            self.averages.put_back(module)

    def _close_shared(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _announce(self, trainer: Any, module: Any, doing: str) -> None:
        modes = sorted({str(layer.mode) for layer in mode_layers(module)})
        if modes:
            self._messages.info(trainer, f"{type(module).__name__} {doing} in statistics mode {', '.join(modes)}.")

    def _check_readable(self, trainer: Any, loaders: Iterable[Any]) -> None:
        if self.stats_dataloader is None:
            check_readable(trainer, loaders)
