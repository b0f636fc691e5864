"""Choice of a statistics mode in a validation: set up on its first batch, made at its end."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_bln._torch import sync_buffers
from lightning_bln.callbacks.comparison import AVERAGES, compared, run_by_averages
from lightning_bln.callbacks.display import log_running_averages, log_scores
from lightning_bln.callbacks.evaluation import Evaluation, shared_forward
from lightning_bln.callbacks.freezing import sleepers
from lightning_bln.callbacks.guard import Guard
from lightning_bln.callbacks.monitor import agree, unscored_of
from lightning_bln.equal_modes import depends_on_batch, foldable_modes, settle
from lightning_bln.modes import StatisticsMode
from lightning_bln.recomputation import populations
from lightning_bln.sweep.result import SweepResult


def set_up(callback: Any, trainer: Any, module: Any) -> None:
    """Give ``callback`` what evaluates the validation that begins, if there is anything to evaluate."""
    sync_buffers(trainer.strategy.model)
    # made each time anew: hooks have run by now, and layers may come and go
    fixed = sleepers(trainer, module).values() if callback._is_validating else ()
    shared = shared_forward(trainer, module, callback.shares_forwards, callback._shared, list(fixed))
    callback._shared = shared
    has_choice = bool(shared.layers) and any(one.is_frozen for one in populations(module))
    # the only one is set: nothing runs beside it
    candidates = settle(shared.layers, callback.candidates) if has_choice else ()
    compares = callback.compare and callback._is_validating and bool(callback.averages.kept)
    if not candidates and not compares:
        return
    evaluation = Evaluation(trainer, module, candidates, shared, callback._bar.advance, verify=callback.verify)
    if compares:
        evaluation.beside = run_by_averages(evaluation, callback.averages)
    callback._evaluation = evaluation
    if candidates:
        batches = sum(evaluation.loop.max_batches)
        callback._bar.start(trainer, f"{len(candidates)} modes", batches * len(evaluation.others))
    if callback.guard != "off" and any(depends_on_batch(shared.layers, one) for one in candidates):
        tell = partial(callback._messages.info, trainer, about="no regrouping")
        callback._guard = Guard(callback.tolerance, callback.guard == "strict", tell)


def conclude(callback: Any, trainer: Any, evaluation: Evaluation, guard: Guard | None) -> None:
    """Set the mode that validated best, and let ``callback`` say what the validation came to."""
    callback._bar.close()
    scores = evaluation.finish(callback.monitor)
    if evaluation.modes:
        scores = agree(evaluation, scores, callback.monitor)
    comparison = compared(evaluation, callback.monitor)
    chosen = choose(callback, trainer, evaluation, scores, guard) if evaluation.modes else None
    if comparison is not None and callback.monitor not in comparison.rows[AVERAGES]:
        named = ", ".join(comparison.rows[AVERAGES])
        sentence = f"BLNStatsCallback compares {named}, since monitor={callback.monitor!r} was not logged."
        callback._messages.info(trainer, sentence, about="no monitor")
    if comparison is not None:
        callback.comparison = comparison.with_mode(chosen, scores)
        if callback.should_log:
            log_running_averages(trainer, callback.monitor, comparison)


def choose(
    callback: Any, trainer: Any, evaluation: Evaluation, scores: Any, guard: Guard | None
) -> StatisticsMode | None:
    """Set the best mode that the guard lets pass; None, and nothing set, where no score is a number."""
    result = SweepResult(
        scores,
        callback.monitor,
        callback.direction,
        evaluation.incumbent,
        reason=evaluation.reason,
        unscored=unscored_of(evaluation),
        foldable=foldable_modes(evaluation.layers, scores),
    )
    if result.reason is not None:
        sentence = f"BLNStatsCallback evaluates modes one after the other: {result.reason}."
        callback._messages.info(trainer, sentence, about="one after the other")
    try:
        best = result.chosen = result.best(among=callback.candidates)
    except ValueError:  # all scores are NaN and the layers' modes differ: keep them
        return None
    if guard is not None and depends_on_batch(evaluation.layers, result.chosen):
        callback._bar.start(trainer, "Regrouped batches", math.inf)
        guard.judge(evaluation, result, callback.candidates)
    result.chosen = StatisticsMode(trainer.strategy.broadcast(str(result.chosen)))
    callback._bar.close()
    present = [one.mode for one in evaluation.layers]
    callback._before_choice = evaluation.layers, present, callback.result, callback.history
    evaluation.install(result.chosen)
    callback.result = result
    score = result.scores.get(result.chosen, {}).get(callback.monitor, math.nan)
    callback.history = [
        *callback.history,
        (trainer.current_epoch, trainer.global_step, str(result.chosen), score),
    ]
    if result.note is not None:
        callback._messages.warn(trainer, result.note, about=("guard", best, result.chosen))
    if callback.should_log:
        log_scores(callback, trainer, result, every_mode=callback.should_log == "all")
    return result.chosen
