"""Search on Optuna: one study, worked off by one process or several, on one machine or many."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_bln.tuning.objective import MODE, Objective
from lightning_bln.tuning.queue import ERROR, Queue, Store
from lightning_bln.tuning.recipe import Recipe, prepare
from lightning_bln.tuning.report import best_trial, complete_trials, write_report
from lightning_bln.tuning.space import suggest
from lightning_bln.tuning.storage import masked, opening, scrubbed

POLL = 1.0
"""Seconds between two looks at a study in which other processes run the last trials."""

ERRORS = 3
"""Number of exceptions in a row after which a worker gives up if no trial has finished: the fault is not a trial's."""


@dataclass(frozen=True)
class Plan:
    """Settings of a search that its worker processes need; see :func:`tune`."""

    storage: str = field(repr=False)  # may hold a password
    name: str
    trials: int
    output: Path
    heartbeat: int
    retries: int


def tune(
    recipe: Recipe | str | Path | None = None,
    *,
    trials: int = 20,
    jobs: int = 1,
    storage: str | None = None,
    name: str = "bln",
    output: str | Path = "runs/tune",
    heartbeat: int = 30,
    retries: int = 3,
    progress: bool = True,
) -> optuna.Study:
    """Search until the study has ``trials`` trials, and write a report.

    An existing study goes on: finished trials are kept, and one whose process died is run again with the same
    hyperparameters. Machines that start the same search with the same ``storage`` and ``name`` share its trials.

    Args:
        recipe: The search, or its YAML file; None for the demo's.
        trials: Number of trials of the study in the end, those of earlier runs included.
        jobs: Number of processes.
        storage: ``sqlite:///path`` (by default ``study.db`` in ``output``), ``journal:path``, or for many machines
            ``postgresql://user@host/database``.
        name: The study's name.
        output: Folder for the report.
        heartbeat: Seconds between two heartbeats of a trial in a database; after four without one it is run again.
        retries: How many times a trial whose process died is run again.
        progress: Whether to show a progress bar.

    Returns:
        The study.

    Raises:
        ValueError: The recipe cannot be built; nothing is stored then.
        RuntimeError: Every trial failed, or all workers died.
    """
    recipe, output = prepare(recipe, output, trials, jobs)
    plan = Plan(storage or f"sqlite:///{output / 'study.db'}", name, trials, output, heartbeat, retries)
    queue = open_queue(recipe, plan, 0)
    study = queue.study
    bar = Progress(
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
        disable=not progress,
    )
    with closing(queue), bar:
        task = bar.add_task("trials", total=trials, best="")

        def update() -> None:
            bar.update(task, completed=len(queue.finished()), best=describe_best(study, recipe))

        if jobs == 1:
            work(recipe, queue, plan, update)
        else:
            supervise(recipe, plan, jobs, queue, update)
        update()
    if not complete_trials(study):
        errors = [one.user_attrs[ERROR] for one in study.get_trials(deepcopy=False) if ERROR in one.user_attrs]
        last = scrubbed(errors[-1], plan.storage) if errors else "none"
        raise RuntimeError(f"no trial has finished; the last error was:\n{last}")
    write_report(study, recipe, output)
    return study


def open_queue(recipe: Recipe, plan: Plan, worker_number: int) -> Queue:
    """Create or load the study of a plan as a worker's queue; each worker's sampler has its own seed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    directions: list[Any] = ["minimize" if recipe.mode == "min" else "maximize"]
    if recipe.latency:
        directions.append("minimize")
    with opening(plan.storage):
        store = Store(plan.storage, plan.heartbeat)
        study = optuna.create_study(
            storage=store.storage,
            study_name=plan.name,
            directions=directions,
            sampler=make_sampler(recipe, recipe.seed + worker_number),
            pruner=make_pruner(recipe),
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)  # a damaged one shows here
    found = [one.name.lower() for one in study.directions]
    if found != directions:
        raise ValueError(
            f"name={plan.name!r} is a study in {masked(plan.storage)} whose directions are {found}, not {directions}; "
            "take another name"
        )
    return Queue(store, study, plan.trials, plan.retries)


def make_sampler(recipe: Recipe, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that a recipe names; for two objectives NSGA-II in place of TPE."""
    if recipe.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if recipe.latency:
        return optuna.samplers.NSGAIISampler(seed=seed)
    # constant_liar: trials still running count as bad, so that workers do not all draw the same values
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def make_pruner(recipe: Recipe) -> optuna.pruners.BasePruner:
    """The pruner that a recipe names; none for two objectives."""
    if recipe.latency or recipe.pruner == "none":
        return optuna.pruners.NopPruner()
    if recipe.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5)
    return optuna.pruners.HyperbandPruner(max_resource=recipe.max_epochs or "auto")


def work(recipe: Recipe, queue: Queue, plan: Plan, update: Callable[[], None]) -> None:
    """Run trials until all of the study have ended, and call ``update`` after each."""
    study, failed = queue.study, 0
    while True:
        trial = queue.claim()
        if trial is None:
            if queue.is_finished():
                return
            time.sleep(POLL)
            continue
        error = run(trial, recipe, queue, plan)
        update()
        failed = 0 if error is None else failed + 1
        if error is not None:
            logging.getLogger(__name__).warning("trial %d failed: %r", trial.number, error)
            if failed == ERRORS and not any(one.state == TrialState.COMPLETE for one in queue.finished()):
                raise RuntimeError(
                    f"{ERRORS} trials of study {study.study_name!r} failed, the last by {error!r}"
                ) from error


def run(trial: optuna.Trial, recipe: Recipe, queue: Queue, plan: Plan) -> Exception | None:
    """Run one trial and store its outcome in the study; returns the exception that ended it, if one did."""

    def build(trial: optuna.Trial) -> tuple[Any, Any, Any]:
        return recipe.build(suggest(trial, recipe.search), plan.output / "trials" / f"{trial.number:04d}")

    objective = Objective(build, recipe.monitor, recipe.mode, latency=recipe.latency, prune=recipe.pruner != "none")
    outcome: dict[str, Any] = {"state": TrialState.FAIL}  # also of one that is interrupted, which is run again
    with queue.store.alive(trial):
        try:
            outcome = {"values": objective(trial)}
        except optuna.TrialPruned:
            outcome = {"state": TrialState.PRUNED}
        except Exception as error:
            trial.set_user_attr(ERROR, "".join(traceback.format_exception(error))[-1500:])
            return error
        finally:
            queue.study.tell(trial, skip_if_finished=True, **outcome)
    return None


def supervise(recipe: Recipe, plan: Plan, jobs: int, queue: Queue, update: Callable[[], None]) -> None:
    """Run workers in processes of their own, and replace one that dies while trials are left."""
    context = multiprocessing.get_context("spawn")
    workers: list[Any] = []
    started, missing = 0, min(jobs, plan.trials)
    try:
        while workers or missing:
            for _ in range(missing):
                started += 1
                process = context.Process(target=worker, args=(recipe, plan, started, os.getpid()), daemon=True)
                process.start()
                workers.append(process)
            time.sleep(POLL / 2)
            update()
            ended = [process for process in workers if not process.is_alive()]
            workers = [process for process in workers if process not in ended]
            died = sum(process.exitcode != 0 for process in ended)
            missing = min(died, jobs * (1 + plan.retries) - started) if died and not queue.is_finished() else 0
    finally:
        for process in workers:
            process.terminate()
    if not queue.is_finished():
        raise RuntimeError(
            f"all {started} workers of study {plan.name!r} died with trials left; what is finished is kept in "
            f"{masked(plan.storage)}, and the same command goes on from there"
        )


def worker(recipe: Recipe, plan: Plan, number: int, parent: int) -> None:
    """Work off a study in a process of its own, until all trials have ended or the parent process has."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)

    def stop_with_parent() -> None:
        if os.getppid() != parent:
            raise SystemExit("the process that started this worker is gone")

    with closing(open_queue(recipe, plan, number)) as queue:
        work(recipe, queue, plan, stop_with_parent)


def describe_best(study: optuna.Study, recipe: Recipe) -> str:
    """The best trial so far, in a few words for the progress bar."""
    if not complete_trials(study):
        return ""
    best = best_trial(study, recipe)
    return f"best {recipe.monitor} {best.values[0]:.4f} in {best.user_attrs.get(MODE)}"
