"""Display of a sweep: progress bars, the table, figures and hyperparameters in loggers."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_bln.sweep.result import SweepResult

FIGURE = "bln/modes"


def label_bar(trainer: Any, text: str) -> None:
    """Say beside the validation bar, of tqdm or of rich, what is going on."""
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True):
        return
    progress, task = getattr(bar, "progress", None), getattr(bar, "val_progress_bar_id", None)
    if progress is not None and task is not None:
        progress.update(task, description=text)
    elif "_val_progress_bar" in bar.__dict__ and bar.__dict__["_val_progress_bar"] is not None:
        bar.val_progress_bar.set_description(text)


class SweepBar:
    """A line of the sweep's own under the Trainer's bars, as tqdm or rich draws them; without bars it does nothing."""

    INTERVAL = 0.1
    """Seconds between two drawings: a mode may take less than drawing does."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.done, self.next = 0, 0.0
        self.line: TqdmLine | RichLine | None = None

    def start(self, text: str, total: float | None) -> None:
        """Show ``text`` and how much of ``total`` is done, in place of what was shown before."""
        self.close()
        bar = self.trainer.progress_bar_callback
        if bar is None or not bar.is_enabled:
            return
        total = total if total is not None and math.isfinite(total) else None
        kinds = {base.__name__: base for base in type(bar).__mro__}
        if "TQDMProgressBar" in kinds:
            self.line = TqdmLine(bar, kinds["TQDMProgressBar"], text, total)
        elif "RichProgressBar" in kinds and bar.progress is not None:
            self.line = RichLine(bar, text, total)
        self.done, self.next = 0, 0.0

    def advance(self, steps: int = 1) -> None:
        if self.line is None:
            return
        self.done += steps
        now = time.monotonic()
        if now >= self.next:
            self.line.show(self.done)
            self.next = now + self.INTERVAL

    def close(self) -> None:
        if self.line is not None:
            self.line.show(self.done)
            self.line.close()
            self.line = None


class TqdmLine:
    def __init__(self, bar: Any, kind: type, text: str, total: float | None) -> None:
        below = 1 if self.is_validating(bar) else 2
        self.line = sys.modules[kind.__module__].Tqdm(
            desc=text,
            total=total,
            position=2 * bar.process_position + below,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar.BAR_FORMAT,
        )

    @staticmethod
    def is_validating(bar: Any) -> bool:
        """Whether there is no training bar above."""
        return bool(bar.trainer.state.fn == "validate")

    def show(self, done: int) -> None:
        self.line.update(done - self.line.n)

    def close(self) -> None:
        self.line.close()


class RichLine:
    """One task for all sweeps of a fit: the Trainer's bar finds its own by their place, so none may be taken away."""

    def __init__(self, bar: Any, text: str, total: float | None) -> None:
        self.bar, self.progress = bar, bar.progress
        self.task = next((one.id for one in self.progress.tasks if one.fields.get("is_sweep")), None)
        if self.task is None:
            self.task = self.progress.add_task(text, total=total, is_sweep=True)
        else:
            self.progress.reset(self.task, total=total, description=text, visible=True)

    def show(self, done: int) -> None:
        self.progress.update(self.task, completed=done)
        self.bar.refresh()

    def close(self) -> None:
        self.progress.update(self.task, visible=False)


def log_choice(trainer: Any, result: SweepResult, *, figure: bool) -> None:
    """The chosen mode among the hyperparameters and, for loggers that take figures, the heat map."""
    for logger in trainer.loggers:
        logger.log_hyperparams({"bln_mode": str(result.chosen)})
        if not figure:
            continue
        try:
            show_figure(logger, result, trainer.global_step)
        except Exception as error:
            # a logger that cannot take a picture is no reason to lose a trained model
            rank_zero_warn(f"{type(logger).__name__} did not take the heat map: {error}")
        logger.save()


def show_figure(logger: Any, result: SweepResult, step: int) -> None:
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    if callable(add_figure):
        add_figure(FIGURE, result.plot(), global_step=step)
    elif callable(getattr(logger, "log_image", None)):
        logger.log_image(key=FIGURE, images=[picture(result)], step=step)


def picture(result: SweepResult) -> np.ndarray:
    """The heat map as an array of RGB values, for loggers that know no figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(result.plot())
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def print_table(result: SweepResult) -> None:
    Console().print(result)


def save(result: SweepResult, folder: Path) -> None:
    """The result as JSON and as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    result.to_json(folder / "bln_sweep.json")
    result.plot().savefig(folder / "bln_sweep.png", dpi=150)
