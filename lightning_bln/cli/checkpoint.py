"""Reading a Trainer's checkpoint, and writing a statistics mode into it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_bln._files import replacing
from lightning_bln._torch import EXTRA_STATE
from lightning_bln.modes import HasMode


def load_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """Load the checkpoint at ``path`` to the CPU.

    Raises:
        ValueError: The file holds objects that could run code, and ``weights_only`` forbids those.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values; if you trust it, pass weights_only=False ({error})"
        ) from error


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
    checkpoint = load_checkpoint(path, weights_only=weights_only)
    state_dict = checkpoint["state_dict"]
    for name, layer in model.named_modules():
        if isinstance(layer, HasMode):
            key = f"{name}.{EXTRA_STATE}".lstrip(".")
            if key not in state_dict:
                raise ValueError(f"{path} has no entry {key!r}, so it is not of this {type(model).__name__}")
            state_dict[key] = layer.get_extra_state()
    saved = checkpoint.get("callbacks", {}).get(callback.state_key) if callback is not None else None
    if saved is not None:
        saved["result"] = callback.state_dict()["result"]
    with replacing(path if output is None else output, like=path) as file:
        torch.save(checkpoint, file)
