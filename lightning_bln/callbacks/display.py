"""Progress bars, metrics, hyperparameters and figures for loggers, the printed table, the files."""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_bln._files import one_line, replacing
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.comparison import AVERAGES, Comparison
from lightning_bln.callbacks.messages import above_bars, bar_classes
from lightning_bln.modes import ALL_MODES
from lightning_bln.sweep.result import SweepResult

FIGURE = "bln/modes"
"""The heat map's name in loggers."""


def label_bar(trainer: Any, text: str) -> None:
    """Replace the description of tqdm's validation bar; rich's lines share their columns, and would have to wrap."""
    if "TQDMProgressBar" in bar_classes(trainer):
        with suppress(TypeError):  # no validation bar has been made yet
            trainer.progress_bar_callback.val_progress_bar.set_description(text)


class SweepBar:
    """The sweep's own progress bar under the Trainer's, of tqdm or rich as theirs; without theirs it does nothing."""

    INTERVAL = 0.1
    """Seconds between two redraws: a mode may take less time than a redraw."""

    def __init__(self) -> None:
        self.line: TqdmLine | RichLine | None = None

    def start(self, trainer: Any, text: str, total: float) -> None:
        """Begin anew with a description and a number of steps, infinite where it is unknown."""
        self.close()
        bar, found = trainer.progress_bar_callback, bar_classes(trainer)
        known = total if math.isfinite(total) else None
        if "TQDMProgressBar" in found:
            self.line = TqdmLine(bar, found["TQDMProgressBar"], text, known)
        elif "RichProgressBar" in found and bar.progress is not None:
            self.line = RichLine(bar, text, known)
        self.done, self.next_redraw = 0, 0.0

    def advance(self, steps: int = 1) -> None:
        """Count steps, and redraw if the last redraw is long enough ago."""
        if self.line is None:
            return
        self.done += steps
        now = time.monotonic()
        if now >= self.next_redraw:
            self.line.show(self.done)
            self.next_redraw = now + self.INTERVAL

    def close(self) -> None:
        """Take the bar away."""
        if self.line is not None:
            self.line.show(self.done)
            self.line.close()
            self.line = None


class TqdmLine:
    """A tqdm bar of the Trainer's style, in the terminal's line under its bars."""

    def __init__(self, bar: Any, bar_class: type, text: str, total: float | None) -> None:
        below = 1 if bar.trainer.state.fn == "validate" else 2  # in fit there is a training bar too
        self.line = sys.modules[bar_class.__module__].Tqdm(
            desc=text,
            total=total,
            position=2 * bar.process_position + below,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar.BAR_FORMAT,
        )

    def show(self, done: int) -> None:
        self.line.update(done - self.line.n)

    def close(self) -> None:
        self.line.close()


class RichLine:
    """One rich task for all sweeps of a fit, hidden in between: the Trainer finds its tasks by position in the list."""

    def __init__(self, bar: Any, text: str, total: float | None) -> None:
        self.bar, self.progress = bar, bar.progress
        self.task = next((one.id for one in self.progress.tasks if one.fields.get("is_sweep")), None)
        if self.task is None:
            self.task = self.progress.add_task(text, total=math.inf if total is None else total, is_sweep=True)
        else:
            self.progress.reset(self.task, total=total, description=text, visible=True)

    def show(self, done: int) -> None:
        self.progress.update(self.task, completed=done)
        self.bar.refresh()

    def close(self) -> None:
        self.progress.update(self.task, visible=False)
        if self.progress.live.is_started:
            # at once: a line that is still on the screen would stay there if something else is printed
            self.progress.refresh()


def check_log(value: Any) -> bool | Literal["all"]:
    """``value`` itself; raises ValueError if it says nothing about logging."""
    if value not in (True, False, "all"):
        raise ValueError(f"log={value!r}, but it must be True, False or 'all', which logs every mode's scores")
    return value


def log_scores(callback: Any, trainer: Any, result: SweepResult, *, every_mode: bool) -> None:
    """Log the mode chosen, in fit its spread and with ``every_mode`` all scores, from a hook of ``callback``."""
    assert result.chosen is not None
    # ranks have the same value, and Lightning would advise to say so
    callback.log("bln/mode", float(ALL_MODES.index(result.chosen)), sync_dist=trainer.world_size > 1)
    if trainer.state.fn != "fit":
        return
    spreads = {mode: pair.spread for mode, pair in result.regrouped.items() if math.isfinite(pair.spread)}
    named = {f"bln/{result.monitor}/spread": spreads[result.chosen]} if result.chosen in spreads else {}
    if every_mode:
        shown = result.shown()
        for mode, values in result.scores.items():
            named |= {f"bln/{name}/{mode}": values[name] for name in shown if name in values}
        named |= {f"bln/spread/{mode}": spread for mode, spread in spreads.items()}
    # a name may end in a dataloader's index, and self.log would refuse it or append another one
    _lightning.log_as_named(trainer, trainer.lightning_module, named)


def log_running_averages(trainer: Any, monitor: str, comparison: Comparison) -> None:
    """Log the monitored value by running averages in a fit, so that its curve stands beside that of the validation."""
    value = comparison.rows[AVERAGES].get(monitor)
    if trainer.state.fn == "fit" and value is not None:
        _lightning.log_as_named(trainer, trainer.lightning_module, {f"bln/{monitor}/running_averages": value})


def report(
    result: SweepResult | None,
    comparison: Comparison | None,
    trainer: Any,
    *,
    folder: Path | None,
    loggers: Iterable[Any],
    plot: bool,
    table: bool,
) -> None:
    """Give loggers the mode, print tables and write files at the end of fit; what fails costs a warning each."""
    loggers = list(loggers)
    for logger in loggers if result is not None else []:
        with sparing(f"log the mode to {type(logger).__name__}"):
            log_choice(logger, str(result.chosen), trainer.global_step)  # type: ignore[union-attr]
    for found in (result, comparison):
        if table and found is not None:
            with sparing("print the table of scores"):
                print_table(found, trainer)
    figure = drawn(result) if result is not None and ((plot and loggers) or folder is not None) else None
    for logger in loggers if plot and figure is not None else []:
        with sparing(f"give the heat map to {type(logger).__name__}"):
            log_figure(logger, figure, trainer.global_step)
    if folder is not None:
        with sparing(f"write its result to save_dir={str(folder)!r}"):
            save(result, comparison, folder, figure)


def log_choice(logger: Any, mode: str, step: int) -> None:
    """Log the mode as a hyperparameter, and as a text where the logger takes one."""
    add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
    if callable(add_text):
        add_text("bln/mode", mode, step)
    # without metrics lightning's logger for TensorBoard would log hp_metric=-1, over the user's own
    takes_metrics = "metrics" in inspect.signature(logger.log_hyperparams).parameters
    logger.log_hyperparams({"bln_mode": mode}, **({"metrics": {}} if takes_metrics else {}))


def log_figure(logger: Any, figure: Any, step: int) -> None:
    """Give the heat map to a logger that has the interface of TensorBoard's or of Weights & Biases'."""
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if callable(add_figure):
        add_figure(FIGURE, figure, global_step=step)
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=FIGURE, images=[np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()], step=step)
    logger.save()


def drawn(result: SweepResult) -> Any:
    """The heat map as a figure that has been drawn once; None, after a warning, where that fails."""
    with sparing("draw the heat map"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = result.plot()
        FigureCanvasAgg(figure).draw()
        return figure
    return None


def print_table(result: SweepResult | Comparison, trainer: Any) -> None:
    """Print a result with rich's colours, above a bar that is still there."""
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    console = getattr(progress, "console", None) or Console()
    with above_bars(trainer):
        console.print(result)


def save(result: SweepResult | None, comparison: Comparison | None, folder: Path, figure: Any) -> None:
    """Write what there is as JSON, and the heat map, into ``folder``, each file whole or not at all."""
    for name, found in (("bln_sweep.json", result), ("bln_comparison.json", comparison)):
        if found is not None:
            with replacing(folder / name) as file:
                file.write(f"{found.to_json()}\n".encode())
    if figure is not None:
        with replacing(folder / "bln_sweep.png") as file:
            figure.savefig(file, dpi=150, format="png")


@contextmanager
def sparing(what: str) -> Iterator[None]:
    """Context in which an error becomes a warning, since none may cost a model that has been trained."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"BLNStatsCallback could not {what}: {one_line(error)}")
