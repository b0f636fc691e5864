"""Search on Ray Tune: ASHA on one machine or a cluster; failed trials go on from their checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from lightning_bln.tuning._private import ExtendedReport, check_ray
from lightning_bln.tuning.objective import MODE, SCORES, monitored, stats_callback
from lightning_bln.tuning.recipe import Recipe, prepare
from lightning_bln.tuning.report import complete_trials, write_report
from lightning_bln.tuning.space import Distribution

check_ray(TuneReportCheckpointCallback)

CHECKPOINT = "checkpoint.ckpt"
"""The name of the file in a checkpoint's folder."""

DOT = ":"
"""The replacement of dots in the paths of hyperparameters: parts of Ray read dots and slashes as nesting."""


class Report(ExtendedReport, TuneReportCheckpointCallback):
    """Ray's callback, which reports the best mode's metric at each validation, and with it every mode's score."""

    def __init__(self, monitor: str, statistics: Any, model: Any) -> None:
        super().__init__(metrics=[monitor], filename=CHECKPOINT, on="validation_end")
        self.statistics, self.model = statistics, model

    def extra_entries(self) -> dict[str, Any]:
        """The mode chosen and every mode's score, if the callback has chosen."""
        result = self.statistics.result
        return {} if result is None else {MODE: str(result.chosen), SCORES: monitored(result, self.model)}


def tune_on_ray(
    recipe: Recipe | str | Path | None = None,
    *,
    trials: int = 20,
    jobs: int = 1,
    address: str | None = None,
    name: str = "bln",
    output: str | Path = "runs/tune",
    retries: int = 3,
    progress: bool = True,
) -> optuna.Study:
    """Search with Ray Tune, and write the same report as :func:`lightning_bln.tuning.tune`.

    ASHA (asynchronous successive halving) stops bad trials. A trial that fails goes on from its last checkpoint; a
    search that was killed goes on when it is started again with the same ``name`` and ``output``.

    Args:
        recipe: The search, or its YAML file; None for the demo's. ``pruner: none`` switches ASHA off; ``sampler`` picks
            TPE (through Ray's Optuna search) or random search.
        trials: Number of trials.
        jobs: Number of trials run at once.
        address: A running cluster's, ``auto`` for the one this machine belongs to; None starts a local one.
        name: The search's name, a folder in ``output``.
        output: Folder for Ray's records and the report; for a cluster one that all machines share.
        retries: How many times a failed trial is tried again.
        progress: Whether Ray reports progress.

    Returns:
        The trials as an Optuna study in memory.

    Raises:
        ValueError: The recipe cannot be built, or asks for two objectives.
        RuntimeError: Every trial failed.
    """
    recipe, output = prepare(recipe, output, trials, jobs)
    if recipe.latency:
        raise ValueError("latency=true, but Ray's ASHA takes one objective; use --engine optuna, or take it away")
    started = not ray.is_initialized()
    if started:
        # otherwise Ray sends usage statistics off the machine
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local: dict[str, Any] = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
        ray.init(address=address, log_to_driver=False, **local)
    try:
        results = make_tuner(recipe, trials, jobs, name, output, retries, progress).fit()
    finally:
        if started:
            ray.shutdown()
    study = as_study(results, recipe)
    if not complete_trials(study):
        error = results.errors[0] if results.errors else None
        raise RuntimeError(f"no trial has finished; the first error was: {error}")
    write_report(study, recipe, output)
    return study


def make_tuner(
    recipe: Recipe, trials: int, jobs: int, name: str, output: Path, retries: int, progress: bool
) -> tune.Tuner:
    """Create Ray's tuner, or restore that of a search which has begun before."""
    per_trial: dict[str, float] = {"cpu": 1}
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus:
        per_trial["gpu"] = min(1.0, gpus / jobs)
    trainable = tune.with_resources(tune.with_parameters(run_trial, recipe=recipe), per_trial)
    if tune.Tuner.can_restore(str(output / name)):
        return tune.Tuner.restore(str(output / name), trainable, resume_unfinished=True, restart_errored=True)
    direction: dict[str, Any] = {"metric": recipe.monitor, "mode": recipe.mode}
    asha = ASHAScheduler(max_t=recipe.max_epochs or 100, grace_period=1, reduction_factor=3, **direction)
    space = {path.replace(".", DOT): as_domain(one) for path, one in recipe.search.items()}
    search: Any
    if recipe.sampler == "tpe":
        search = ConcurrencyLimiter(OptunaSearch(seed=recipe.seed, **direction), max_concurrent=jobs)
    else:
        search = BasicVariantGenerator(max_concurrent=jobs, random_state=recipe.seed)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=trials,
            search_alg=search,
            scheduler=None if recipe.pruner == "none" else asha,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(output),
            failure_config=tune.FailureConfig(max_failures=retries),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
            verbose=1 if progress else 0,
        ),
    )


def run_trial(config: dict[str, Any], recipe: Recipe) -> None:
    """Train one trial, from the start or from the checkpoint it had when it failed."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    values = {path.replace(DOT, "."): value for path, value in config.items()}
    trainer, model, data = recipe.build(values, Path(tune.get_context().get_trial_dir()))
    statistics = stats_callback(trainer, recipe.monitor, recipe.mode)
    trainer.callbacks.append(Report(recipe.monitor, statistics, model))
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        trainer.fit(model, datamodule=data)
        return
    with checkpoint.as_directory() as folder:
        trainer.fit(model, datamodule=data, ckpt_path=str(Path(folder) / CHECKPOINT))


def as_domain(distribution: Distribution) -> Any:
    """A distribution as Ray's."""
    low: Any = distribution.low
    high: Any = distribution.high
    step = distribution.step
    if distribution.choices is not None:
        return tune.choice(list(distribution.choices))
    if distribution.is_integer:
        if distribution.log:
            return tune.lograndint(low, high + 1)
        return tune.randint(low, high + 1) if step is None else tune.qrandint(low, high, int(step))
    if distribution.log:
        return tune.loguniform(low, high)
    return tune.uniform(low, high) if step is None else tune.quniform(low, high, step)


def as_optuna(distribution: Distribution) -> BaseDistribution:
    """A distribution as Optuna's, without ``step``: Ray draws its multiples, Optuna counts it from ``low``."""
    if distribution.choices is not None:
        return CategoricalDistribution(distribution.choices)
    kind: Any = IntDistribution if distribution.is_integer else FloatDistribution
    return kind(distribution.low, distribution.high, log=distribution.log)


def as_study(results: Any, recipe: Recipe) -> optuna.Study:
    """Ray's results as a study in memory; a trial that ASHA stopped counts as pruned."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if recipe.mode == "min" else "maximize")
    distributions = {path: as_optuna(one) for path, one in recipe.search.items()}
    for result in results:
        metrics = result.metrics or {}
        scores = metrics.get(SCORES, {})
        history = result.metrics_dataframe
        reports = [] if history is None or recipe.monitor not in history else history[recipe.monitor].tolist()
        state = TrialState.COMPLETE
        if result.error is not None or not reports:
            state = TrialState.FAIL
        elif recipe.pruner != "none" and len(reports) < (recipe.max_epochs or 0):
            state = TrialState.PRUNED
        study.add_trial(
            create_trial(
                state=state,
                value=metrics.get(recipe.monitor) if state != TrialState.FAIL else None,
                params={path.replace(DOT, "."): value for path, value in (result.config or {}).items()},
                distributions=distributions if result.config else {},
                user_attrs={SCORES: dict(scores), MODE: metrics.get(MODE)} if scores else {},
                intermediate_values=dict(enumerate(reports)),
            )
        )
    return study
