"""Checkpoints that do not fit the model of a configuration, said in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from lightning_bln._files import FileError, one_line
from lightning_bln._scoped import setting

MISSING = re.compile(r'Missing key\(s\) in state_dict: "([^"]+)"')
UNEXPECTED = re.compile(r'Unexpected key\(s\) in state_dict: "([^"]+)"')
SHAPE = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", re.DOTALL)
"""Patterns of torch's messages on a state dict that does not fit."""


@contextmanager
def fitting(model: L.LightningModule, ckpt: str | Path) -> Iterator[None]:
    """Context in which the Trainer that fills ``model`` from a checkpoint raises FileError if that is of another one.

    It loads the state dict before any step runs, after hooks that may add layers or change the file's content.
    """
    load = model.load_state_dict

    def load_or_say(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except RuntimeError as error:
            raise FileError(f"{ckpt} does not fit {type(model).__name__}: {misfit(str(error))}") from error

    with setting([model], load_state_dict=load_or_say):
        yield


def misfit(message: str) -> str:
    """The first entry of each kind that torch's error names.

    Example:
        >>> misfit('Missing key(s) in state_dict: "a.weight", "a.bias". Unexpected key(s) in state_dict: "b".')
        'the file lacks a.weight and has b, which the model does not; pass the --config that it was trained with'
    """
    missing, unexpected, shape = (one.search(message) for one in (MISSING, UNEXPECTED, SHAPE))
    found = [f"lacks {missing[1]}"] if missing else []
    found += [f"has {unexpected[1]}, which the model does not"] if unexpected else []
    if shape and not found:
        found.append(f"has {shape[1]} of shape {shape[2]}, where the model's is {shape[3]}")
    what = f"the file {' and '.join(found)}" if found else one_line(message)[:300]
    return f"{what}; pass the --config that it was trained with"
