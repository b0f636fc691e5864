"""Report of a search: best configuration, variance explained by each hyperparameter and by the mode, plots."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from matplotlib.figure import Figure
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console

from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning.objective import MODE, SCORES
from lightning_bln.tuning.recipe import Recipe

MODE_PARAMETER = "statistics mode"
"""The mode's name among the hyperparameters."""


def write_report(study: optuna.Study, recipe: Recipe, output: Path) -> dict[str, Path]:
    """Write the report of a study to a folder, and print a summary.

    Args:
        study: A study with at least one complete trial.
        recipe: The search.
        output: The folder, for ``best.yaml`` for ``bln fit``, ``trials.csv`` with every trial, ``importance.json`` with
            the share of the metric's variance that each hyperparameter and the mode explain, and plots.

    Returns:
        Each file's path by what it holds.
    """
    output.mkdir(parents=True, exist_ok=True)
    best = best_trial(study, recipe)
    paths = {"best configuration": output / "best.yaml", "all trials": output / "trials.csv"}
    paths["best configuration"].write_text(best_configuration(best, recipe))
    write_table(study, recipe, paths["all trials"])
    shares = explained_variance(study, seed=recipe.seed)
    console = Console(soft_wrap=True)
    console.print(
        f"best {recipe.monitor}: {best.values[0]:.4f} in mode {best.user_attrs.get(MODE)}, trial {best.number}"
    )
    for name, value in best.params.items():
        console.print(f"  {name}: {value}")
    if shares:
        paths["variance explained"] = output / "importance.json"
        paths["variance explained"].write_text(json.dumps(shares, indent=2) + "\n")
        shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
        console.print(f"variance of {recipe.monitor} explained (fANOVA over trials and modes): {shown}")
    paths |= draw(study, recipe, shares, output)
    for what, path in paths.items():
        console.print(f"{what}: {path}")
    return paths


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended with a value."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trial(study: optuna.Study, recipe: Recipe) -> FrozenTrial:
    """The complete trial with the best metric."""
    return min(complete_trials(study), key=lambda one: recipe.sign * one.values[0])


def best_configuration(best: FrozenTrial, recipe: Recipe) -> str:
    """The content of a YAML file by which ``bln fit`` trains the best trial again."""
    header = (
        f"# bln fit --config best.yaml\n"
        f"# trial {best.number}: {recipe.monitor} {best.values[0]:.6g} in statistics mode {best.user_attrs.get(MODE)}\n"
    )
    return header + yaml.safe_dump(recipe.configuration(best.params), sort_keys=False)


def write_table(study: optuna.Study, recipe: Recipe, path: Path) -> None:
    """Write every trial with its hyperparameters and every mode's score as CSV."""
    names = sorted({name for trial in study.trials for name in trial.params})
    values = [recipe.monitor, *(["latency_ms"] if recipe.latency else [])]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["number", "state", *values, "mode", *names, *ALL_MODES])
        for trial in study.get_trials(deepcopy=False):
            scores = trial.user_attrs.get(SCORES, {})
            table.writerow(
                [trial.number, trial.state.name, *(trial.values or [None] * len(values)), trial.user_attrs.get(MODE)]
                + [trial.params.get(name) for name in names]
                + [scores.get(mode) for mode in ALL_MODES]
            )


def explained_variance(study: optuna.Study, seed: int = 0) -> dict[str, float]:
    """Share of the metric's variance that each hyperparameter explains on its own, and that the mode does (fANOVA).

    Every mode of every complete trial is a data point, with the mode as a further hyperparameter, since a trial scores
    its model in all of them.

    Args:
        study: Trials run by :class:`~lightning_bln.tuning.Objective`.
        seed: Seed of the random forest.

    Returns:
        The shares, the largest first; what they lack to 1 is due to interactions. Empty where there are fewer than two
        complete trials, or all scores are equal.

    Source:
        Hutter, Hoos and Leyton-Brown, "An efficient approach for assessing hyperparameter importance", ICML 2014.
    """
    finished = [one for one in complete_trials(study) if SCORES in one.user_attrs]
    points = [
        ({**trial.params, MODE_PARAMETER: mode}, score)
        for trial in finished
        for mode, score in trial.user_attrs[SCORES].items()
    ]
    if len(finished) < 2 or len({score for _, score in points}) < 2:
        return {}
    modes = CategoricalDistribution([str(mode) for mode in ALL_MODES])
    columns = {
        name: by_rank(name, distribution, points)
        for name, distribution in {**finished[0].distributions, MODE_PARAMETER: modes}.items()
    }
    swept = optuna.create_study()
    for values, score in points:
        coded = {name: values[name] if ranks is None else ranks[values[name]] for name, (_, ranks) in columns.items()}
        swept.add_trial(
            create_trial(params=coded, distributions={name: one for name, (one, _) in columns.items()}, value=score)
        )
    return optuna.importance.get_param_importances(
        swept, evaluator=FanovaImportanceEvaluator(seed=seed), normalize=False
    )


def by_rank(
    name: str, distribution: BaseDistribution, points: list[tuple[dict[str, Any], float]]
) -> tuple[BaseDistribution, dict[Any, int] | None]:
    """Replace a categorical hyperparameter by the ranks of its choices, ordered by mean score, and keep any other.

    The share explained stays the same, but fANOVA's time grows exponentially with the number of choices: 16 modes
    would take an hour. Returns the distribution and each choice's rank, None for a hyperparameter that is kept.
    """
    if not isinstance(distribution, CategoricalDistribution):
        return distribution, None
    sums: dict[Any, list[float]] = {choice: [] for choice in distribution.choices}
    for values, score in points:
        sums[values[name]].append(score)
    order = sorted(sums, key=lambda choice: sum(sums[choice]) / len(sums[choice]) if sums[choice] else 0.0)
    return IntDistribution(0, max(1, len(order) - 1)), {choice: rank for rank, choice in enumerate(order)}


def draw(study: optuna.Study, recipe: Recipe, shares: dict[str, float], output: Path) -> dict[str, Path]:
    """Draw the study's plots into files, without those that Optuna cannot draw from so few trials."""
    import optuna.visualization.matplotlib as plots

    named: dict[str, Any] = {"target_name": recipe.monitor}
    if recipe.latency:
        named["target"] = lambda trial: trial.values[0]
    makers: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, **named),
        "slice": lambda: plots.plot_slice(study, **named),
        "parallel": lambda: plots.plot_parallel_coordinate(study, **named),
        "importance": lambda: plot_shares(shares, recipe.monitor),
        "modes": lambda: plot_modes(study, recipe),
    }
    if recipe.latency:
        makers["pareto"] = lambda: plots.plot_pareto_front(study, target_names=[recipe.monitor, "latency (ms)"])
    else:
        makers["curves"] = lambda: plots.plot_intermediate_values(study)
    paths = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings(), matplotlib.rc_context():  # Optuna sets a global style
                warnings.simplefilter("ignore")
                paths[f"plot of {name}"] = save(make(), output / f"{name}.png")
        except Exception as error:  # a failing plot must not cost the search's result
            logging.getLogger(__name__).warning("no plot %s.png: %s", name, error)
    return paths


def save(axes: Any, path: Path) -> Path:
    """Write the figure of a plot's axes, or array of axes, to a file."""
    figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
    figure.savefig(path, dpi=120, bbox_inches="tight")
    if hasattr(figure, "number"):  # a figure of pyplot's, which would keep it in memory
        from matplotlib import pyplot

        pyplot.close(figure)
    return path


def plot_shares(shares: dict[str, float], monitor: str) -> Any:
    """Draw a bar for each hyperparameter's share of the variance."""
    axes = Figure(figsize=(6, 0.5 * len(shares) + 1.2), layout="constrained").add_subplot()
    names = list(shares)[::-1]
    bars = axes.barh(names, [100 * shares[name] for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.12)
    axes.set_xlabel(f"share of the variance of {monitor} over trials and modes, %")
    return axes


def plot_modes(study: optuna.Study, recipe: Recipe) -> Any:
    """Draw for each mode how much worse it is than the best one of the same trained model."""
    swept = [trial.user_attrs[SCORES] for trial in complete_trials(study) if trial.user_attrs.get(SCORES)]
    best = [min(recipe.sign * value for value in scores.values()) for scores in swept]
    losses = [
        [recipe.sign * scores[mode] - top for scores, top in zip(swept, best, strict=True) if mode in scores]
        for mode in ALL_MODES
    ]
    axes = Figure(figsize=(8, 4), layout="constrained").add_subplot()
    axes.boxplot(losses, tick_labels=[str(mode) for mode in ALL_MODES])
    axes.tick_params(axis="x", rotation=60)
    axes.set_ylabel(f"{recipe.monitor} behind the best mode")
    axes.set_title(f"{len(swept)} trained models, every mode of each")
    return axes
