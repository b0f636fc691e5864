"""What a person sees: the progress bar's label, figures and hyperparameters in loggers, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_bln.sweep import SweepResult

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
