"""Tables and figures from finished training runs, beside the paper's own numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from lightning_bln.modes import ALL_MODES
from lightning_bln.reproduce.kept import STATISTICS
from lightning_bln.reproduce.training import canonical_mode

Result = dict[str, Any]
Rows = list[list[str]]
COLOURS = {"bln": "C0", "batch": "C1", "layer": "C2", "layer-scaled": "C3"}


@cache
def published() -> dict[str, Any]:
    """Return the authors' histories and test scores (github.com/A2Amir/Batch-Layer-Normalization, Apache-2.0).

    Keys are ``experiment-fraction-bsSIZE`` and then the norm. Test scores are pairs of loss and accuracy by mode; a
    NaN loss is ``None``.
    """
    return json.loads(files("lightning_bln.reproduce").joinpath("published.json").read_text())


def write_report(results: list[Result], folder: Path) -> str:
    """Write ``results.json``, ``table.md``, ``convergence.png`` and ``modes.png``; return the tables.

    Args:
        results: Results of :func:`~lightning_bln.reproduce.training.run` for one experiment.
        folder: The folder to write to.
    """
    text = tables(results)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "table.md").write_text(text)
    _draw_convergence(results, folder / "convergence.png")
    if bln := _by_norm(results).get("bln"):
        _draw_modes(bln, folder / "modes.png")
    return text


def tables(results: list[Result]) -> str:
    """Return the tables of one experiment in Markdown."""
    first = results[0]
    head = (
        f"{first['experiment']}, fraction {first['fraction']:g} of the training set, batch size {first['batch_size']}, "
        f"{first['epochs']} epochs. Ours: mean ± standard deviation over seeds; the paper: one run."
    )
    parts = [head, _markdown(*_validation_rows(results)), _markdown(*_test_rows(results))]
    if bln := _by_norm(results).get("bln"):
        unusable = max(len(unusable_modes(result)) for result in bln)
        theirs = _theirs(results, "bln").get("test")
        count = f"; the authors: {sum(pair[0] is None for pair in theirs.values())} of 16" if theirs else ""
        parts.append(f"BLN modes with a loss that is not finite, worst run: {unusable} of 16{count}.")
    return "\n\n".join(parts) + "\n"


def chosen_mode(result: Result, statistics: str, *, split: str = "validation", among: Iterable[str] = ALL_MODES) -> str:
    """Return the mode with the lowest loss on a split; ties go to a batch-independent mode.

    Args:
        result: Result of a training run.
        statistics: ``"paper"`` or ``"recomputed"``.
        split: ``"validation"``, or ``"test"`` to show the bias of choosing on test data.
        among: The modes to choose from.
    """
    scores = result[split][statistics]
    modes = dict.fromkeys(canonical_mode(result["norm"], mode) for mode in among)
    return min(modes, key=lambda mode: (_finite(scores[mode]["loss"]), not mode.startswith("pp")))


def unusable_modes(result: Result) -> list[str]:
    """Return the modes whose loss on test data is not finite with either statistics."""
    return [
        mode
        for mode in result["test"]["paper"]
        if not all(math.isfinite(_finite(result["test"][statistics][mode]["loss"])) for statistics in STATISTICS)
    ]


def _validation_rows(results: list[Result]) -> tuple[list[str], Rows]:
    binary = "val_acc_authors" in results[0]["history"][0]
    header = ["norm", "runs", "best epoch", "paper", "best-epoch val loss", "paper", "val acc"]
    header += ["val acc, logit > 0.5", "paper"] if binary else ["paper"]
    header += ["lowest val loss, recomputed statistics"]
    rows = []
    for norm, runs in _by_norm(results).items():
        best = [run["history"][run["best_epoch"] - 1] for run in runs]
        theirs = _theirs(results, norm)
        epoch = theirs.get("best_epoch")
        row = [norm, str(len(runs)), f"{median(run['best_epoch'] for run in runs):g}", _cell(epoch, "d")]
        row += [_spread(entry["val_loss"] for entry in best), _cell(theirs["val_loss"][epoch - 1] if epoch else None)]
        row += [_spread(entry["val_acc"] for entry in best)]
        row += [_spread(entry["val_acc_authors"] for entry in best)] if binary else []
        row += [_cell(theirs["val_acc"][epoch - 1] if epoch else None)]
        recomputed = [[score for entry in run["history"] for score in entry["recomputed"].values()] for run in runs]
        row += [_spread(min(_finite(score["loss"]) for score in scores) for scores in recomputed)]
        rows.append(row)
    return header, rows


def _test_rows(results: list[Result]) -> tuple[list[str], Rows]:
    binary = "val_acc_authors" in results[0]["history"][0]
    header = ["norm", "statistics", "mode", "test loss", "paper", "test acc"]
    header += ["test acc, logit > 0.5", "paper"] if binary else ["paper"]
    independent = [mode for mode in ALL_MODES if mode.is_batch_independent]
    rows = []
    for norm, runs in _by_norm(results).items():
        theirs = _theirs(results, norm).get("test", {})
        picks: dict[str, Callable[[Result, str], str]] = {
            "cccc": lambda run, _: canonical_mode(run["norm"], "cccc"),
            "pppp": lambda run, _: canonical_mode(run["norm"], "pppp"),
            "chosen on validation": chosen_mode,
        }
        pairs = {mode: theirs.get(canonical_mode(norm, mode)) for mode in ("cccc", "pppp")}
        if norm in ("bln", "batch"):
            picks["chosen on validation, pp** only"] = partial(chosen_mode, among=independent)
        if norm == "bln":
            label = "best on test (no fair choice)"
            picks[label] = partial(chosen_mode, split="test")
            pairs[label] = min(theirs.values(), key=lambda pair: _finite(pair[0]), default=None)
        for statistics in STATISTICS:
            for label, pick in picks.items():
                modes = [pick(run, statistics) for run in runs]
                scores = [run["test"][statistics][mode] for run, mode in zip(runs, modes, strict=True)]
                named = f"{label}: {_counted(modes)}" if "on" in label else label
                loss, accuracy = (pairs.get(label) if statistics == "paper" else None) or (None, None)
                row = [norm, statistics, named, _spread(score["loss"] for score in scores), _cell(loss)]
                row += [_spread(score["acc"] for score in scores)]
                row += [_spread(score["acc_authors"] for score in scores)] if binary else []
                rows.append([*row, _cell(accuracy)])
    return header, rows


def _draw_convergence(results: list[Result], path: Path) -> None:
    figure, axes = _figure()
    for axis, key, label in zip(axes, ("val_loss", "val_acc"), ("validation loss", "validation accuracy"), strict=True):
        for norm, runs in _by_norm(results).items():
            curves = list(zip(*([entry[key] for entry in run["history"]] for run in runs), strict=True))
            epochs = range(1, len(curves) + 1)
            axis.plot(epochs, [mean(values) for values in curves], COLOURS[norm], label=norm)
            axis.fill_between(epochs, list(map(min, curves)), list(map(max, curves)), color=COLOURS[norm], alpha=0.15)
            if theirs := _theirs(results, norm).get(key):
                axis.plot(range(1, len(theirs) + 1), theirs, COLOURS[norm] + "--", linewidth=0.8)
        axis.set(xlabel="epoch", ylabel=label)
        if key == "val_loss":
            # A norm that diverges, as BatchNorm does at batch size 1, must not flatten all other curves.
            own = [entry[key] for result in results for entry in result["history"]]
            axis.set_ylim(0.95 * min(own), min(max(own), 3 * median(own)) * 1.05)
    axes[0].legend(title="ours; dashed: paper", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=80)


def _draw_modes(results: list[Result], path: Path) -> None:
    figure, axes = _figure()
    modes = [str(mode) for mode in ALL_MODES]
    theirs = _theirs(results, "bln").get("test", {})
    for axis, key, entry in zip(axes, ("loss", "acc"), (0, 1), strict=True):
        for offset, statistics in zip((-0.15, 0.15), STATISTICS, strict=True):
            values = [[_finite(run["test"][statistics][mode][key]) for run in results] for mode in modes]
            centre = [mean(column) for column in values]
            spread = [
                [middle - min(column) for column, middle in zip(values, centre, strict=True)],
                [max(column) - middle for column, middle in zip(values, centre, strict=True)],
            ]
            places = [index + offset for index in range(len(modes))]
            if all(map(math.isfinite, centre)):
                axis.errorbar(places, centre, spread, fmt="o", markersize=3, label=f"ours, {statistics} statistics")
        if theirs:
            points = [(index, theirs[mode][entry]) for index, mode in enumerate(modes) if theirs[mode][0] is not None]
            axis.plot(*zip(*points, strict=True), "kx", markersize=4, label="paper")
        axis.set_xticks(range(len(modes)), modes, rotation=90, fontsize=7)
        axis.set_ylabel(f"test {'loss' if key == 'loss' else 'accuracy'}")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    return figure, figure.subplots(1, 2)


def _by_norm(results: list[Result]) -> dict[str, list[Result]]:
    norms = dict.fromkeys(result["norm"] for result in results)
    return {norm: [result for result in results if result["norm"] == norm] for norm in norms}


def _theirs(results: list[Result], norm: str) -> dict[str, Any]:
    first = results[0]
    return published().get(f"{first['experiment']}-{first['fraction']:g}-bs{first['batch_size']}", {}).get(norm, {})


def _counted(modes: list[str]) -> str:
    counts = {mode: modes.count(mode) for mode in dict.fromkeys(modes)}
    return ", ".join(f"{mode} ({count})" if len(counts) > 1 else mode for mode, count in counts.items())


def _finite(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _spread(values: Iterable[float]) -> str:
    numbers = list(values)
    if not all(map(math.isfinite, numbers)):
        return "nan"
    return f"{mean(numbers):.4f}" + (f" ± {stdev(numbers):.4f}" if len(numbers) > 1 else "")


def _cell(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _markdown(header: list[str], rows: Rows) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
