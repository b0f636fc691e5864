"""Files that a training run leaves behind: its state after each epoch, and its result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lightning_bln._files import FileError, one_line, replacing
from lightning_bln.cli.checkpoint import load_checkpoint

STATISTICS = ("paper", "recomputed")
"""Origins of the statistics by which a result has scores."""


def read_result(path: Path, modes: Iterable[str]) -> dict[str, Any]:
    """Read a result with the scores of ``modes``.

    Raises:
        FileError: The file is damaged, or lacks something that a report needs.
    """
    with whole(path):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result["experiment"], str):
            raise ValueError("experiment is no name")
        check_history(result["history"])
        if type(result["best_epoch"]) is not int or not 1 <= result["best_epoch"] <= len(result["history"]):
            raise ValueError(f"best_epoch={result['best_epoch']}")
        scores = {key.removeprefix("val_") for key in result["history"][0] if key.startswith("val_")}
        for split in ("validation", "test"):
            for statistics in STATISTICS:
                for mode in modes:
                    check_numbers(result[split][statistics][mode], scores)
        return result


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` has written.

    Raises:
        FileError: The file is damaged, or of something else.
    """
    state = load_checkpoint(path, is_checked=True)
    with whole(path):
        for name in ("model", "optimizer", "settings"):
            if name in state and not isinstance(state[name], dict):
                raise ValueError(f"{name} is a {type(state[name]).__name__}")
        if "history" in state:
            check_history(state["history"])
        return state


def save_state(path: Path, **state: Any) -> None:
    """Write named objects, so that a reader finds the old or the new ones whole."""
    with replacing(path) as file:
        torch.save(state, file)


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Within the context, an error of a damaged file becomes one line that names it."""
    try:
        yield
    except FileError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise FileError(
            f"{path}: truncated or corrupt ({reason[:160]}); delete it, and what it held is computed again"
        ) from error


def check_history(history: Any) -> None:
    """Raise unless ``history`` has the numbers of each epoch, and the same of all."""
    if not isinstance(history, list) or not history:
        raise ValueError("history is empty")
    names = set(history[0])
    for place, entry in enumerate(history):
        if set(entry) != names or entry["epoch"] != place + 1:
            raise ValueError(f"epoch {place + 1} does not have the numbers of the first")
        check_numbers(entry, names - {"recomputed"} | {"val_loss", "val_acc", "train_loss"})
        for scores in entry["recomputed"].values():
            check_numbers(scores, {"loss", "acc"})


def check_numbers(scores: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise unless ``scores`` has a number under each name."""
    for name in names:
        if type(scores[name]) not in (int, float):
            raise ValueError(f"{name} is no number")
