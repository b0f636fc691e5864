"""Reading a Trainer's checkpoint, and writing a statistics mode or a population into it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bln._files import FileError, one_line, replacing
from lightning_bln._torch import EXTRA_STATE
from lightning_bln.calibration import Calibration
from lightning_bln.modes import HasMode


def load_checkpoint(path: str | Path, *, weights_only: bool = True, is_checked: bool = False) -> dict[str, Any]:
    """Load the checkpoint at ``path`` to the CPU.

    Args:
        path: A file that ``torch.save`` has written.
        weights_only: Refuse files that could run code when they are loaded.
        is_checked: Whether to compare checksums as well, without which changed numbers are taken as they are.

    Raises:
        FileError: The file is missing, damaged or of another format, or holds objects that could run code, and
            ``weights_only`` forbids those.
    """
    try:
        if is_checked and zipfile.is_zipfile(path):
            check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a damaged file raises all there is
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError) and FORBIDDEN.search(reason):
            raise FileError(
                f"{path} holds more than tensors and plain values; if you trust it, pass weights_only=False "
                f"({FORBIDDEN.findall(reason)[0].strip()})"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise FileError(f"{path}: no such file") from error
        raise FileError(f"{path}: truncated, corrupt or no checkpoint ({reason[:160]})") from error
    if not isinstance(checkpoint, dict):
        raise FileError(f"{path}: no checkpoint, but a {type(checkpoint).__name__}")
    return checkpoint


FORBIDDEN = re.compile(r"(?:Unsupported (?:global|class|operand)|Trying to (?:call|instantiate|load))[^.]*[.\w]*")
"""Pattern of torch's messages on pickles that would run code, as opposed to damaged ones."""


def check_sums(path: str | Path) -> None:
    """Raise where an entry of a file by ``torch.save`` does not have its checksum, which torch does not look at."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def write_mode(
    path: str | Path,
    model: nn.Module,
    *,
    output: str | Path | None = None,
    weights_only: bool = True,
    callback: Any = None,
) -> None:
    """Write the statistics modes of ``model`` into the checkpoint at ``path``, and change nothing else in it.

    The file is replaced in one step: a reader finds the old or the new one whole, also after a crash.

    Args:
        path: A checkpoint whose ``state_dict`` is that of ``model``.
        model: The model whose layers' modes are written.
        output: Write to this file and leave ``path`` alone.
        weights_only: Refuse files that could run code when they are loaded.
        callback: A :class:`~lightning_bln.callbacks.BLNStatsCallback`, whose result goes into its state in the file,
            if the file has one.

    Raises:
        ValueError: The file has no mode for a layer of ``model``; nothing is written then.
    """
    with rewriting(path, output, weights_only) as checkpoint:
        checkpoint["state_dict"].update(modes_of(model, checkpoint["state_dict"], path))
        saved = checkpoint.get("callbacks", {}).get(callback.state_key) if callback is not None else None
        if saved is not None:
            saved["result"] = callback.state_dict()["result"]


def write_population(
    path: str | Path,
    calibration: Calibration,
    *,
    output: str | Path | None = None,
    weights_only: bool = True,
) -> None:
    """Write the statistics that a model has after a calibration into the checkpoint at ``path``.

    Those that the file had stay in it under a key of their own, for :func:`undo_population`; where it already keeps
    some, which an earlier calibration replaced, these stay. Nothing else in the file changes.

    Args:
        path: A checkpoint whose ``state_dict`` is that of the calibrated model.
        calibration: What :func:`~lightning_bln.calibrate` returned.
        output: Write to this file and leave ``path`` alone.
        weights_only: Refuse files that could run code when they are loaded.

    Raises:
        ValueError: The file lacks one of the statistics; nothing is written then.
    """
    with rewriting(path, output, weights_only) as checkpoint:
        state_dict = checkpoint["state_dict"]
        new = {key: value.cpu() for key, value in calibration.after.items()}
        for key in new:
            check_entry(key, state_dict, path, calibration.model)
        new |= modes_of(calibration.model, state_dict, path)  # which say whether a population is older than the weights
        checkpoint.setdefault(BEFORE, {key: state_dict[key] for key in new})
        state_dict.update(new)


def undo_population(path: str | Path, *, output: str | Path | None = None, weights_only: bool = True) -> None:
    """Put the statistics, and the mode, back that a checkpoint had before it was calibrated.

    Args:
        path: A checkpoint that :func:`write_population` has written.
        output: Write to this file and leave ``path`` alone.
        weights_only: Refuse files that could run code when they are loaded.

    Raises:
        FileError: The file keeps no earlier statistics.
    """
    with rewriting(path, output, weights_only) as checkpoint:
        before = checkpoint.pop(BEFORE, None)
        if not isinstance(before, dict):
            raise FileError(f"{path}: keeps no earlier population, since `bln calibrate` has not written it")
        checkpoint["state_dict"].update(before)


BEFORE = "bln_population_before"
"""The key in a checkpoint of the entries of its state dict that a calibration has replaced."""


@contextmanager
def rewriting(path: str | Path, output: str | Path | None, weights_only: bool) -> Iterator[dict[str, Any]]:
    """A Trainer's checkpoint to change, which is written in one step unless the body raises."""
    checkpoint = load_checkpoint(path, weights_only=weights_only)
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise FileError(f"{path}: no checkpoint of a Trainer, since it has no state_dict")
    yield checkpoint
    with replacing(path if output is None else output, like=path) as file:
        torch.save(checkpoint, file)


def modes_of(model: nn.Module, state_dict: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Entries of the statistics modes of ``model``; raise where ``state_dict`` lacks one."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HasMode)}
    found = {f"{name}.{EXTRA_STATE}".lstrip("."): layer.get_extra_state() for name, layer in layers.items()}
    for key in found:
        check_entry(key, state_dict, path, model)
    return found


def check_entry(key: str, state_dict: dict[str, Any], path: str | Path, model: nn.Module) -> None:
    """Raise where the state dict of the file at ``path`` lacks an entry of ``model``."""
    if key not in state_dict:
        raise ValueError(f"{path} has no entry {key!r}, so it is not of this {type(model).__name__}")
