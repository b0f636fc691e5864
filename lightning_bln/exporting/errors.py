"""The error of models and files that are not exported, and what exporters say otherwise."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from lightning_bln._files import FileError

LOGGERS = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir")
"""Loggers of exporters."""


class ExportError(FileError):
    """A model does not export, or its file computes something else; no file was written or replaced."""


def first_line(error: object) -> str:
    """The first line of an error's text; its type where it has no text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the warnings, logs and graphs of exporters, beside which their errors say what matters."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        rest = io.StringIO()  # torch prints the graph of a model that it cannot export
        with warnings.catch_warnings(), redirect_stdout(rest), redirect_stderr(rest):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
