"""Errors that are documented: where a way of use is refused, by which error, and what the page says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightning_bln._torch import CAN_EXPORT_LOOPS
from tests.as_torch.layers import TRAIN, Case


class Documented(NamedTuple):
    """A documented error."""

    ways: tuple[str, ...]
    applies: Callable[[Case], bool]
    error: type[Exception]
    pattern: str
    sentence: str


UNROLLED = ("mgu", "coupledlstm", "lem", "slstm")
"""Cells whose steps torch.compile sees one by one."""

EXPECTED = (
    Documented(
        ("torch.func.vmap", "per-sample gradients"),
        lambda case: case.situation == TRAIN and case.norm is not None,
        RuntimeError,
        r"torch\.vmap runs over its statistics",
        "A layer in training mode gathers one population, so `torch.vmap` over it raises RuntimeError; call "
        "`eval()`, and in mode `cccc` it computes the same at the training batch size.",
    ),
    Documented(
        ("torch.export, dynamic time",),
        lambda case: case.has_time and not CAN_EXPORT_LOOPS,
        RuntimeError,
        "specialized",
        "Before torch 2.13 an exported recurrent layer holds its steps one by one, so `torch.export` refuses a dynamic "
        'number of them; `backend="cpu"` takes it.',
    ),
    Documented(
        ("torch.compile, nine lengths",),
        lambda case: case.kind in UNROLLED,
        Exception,  # of a private class
        "fullgraph=True",
        "`torch.compile` unrolls the cell, one graph for each number of steps, and with `fullgraph=True` raises at the "
        "ninth, its limit of recompilations; `torch._dynamo.config.recompile_limit` raises the limit.",
    ),
    Documented(
        ("AveragedModel",),
        lambda case: case.situation == TRAIN and case.norm is not None and case.positions != "shared",
        RuntimeError,
        "must match the size|broadcast shape",
        "A population is empty until the first training batch and grows with the longest, and torch copies no buffer "
        "into one of another size: use `lightning_bln.AveragedModel`, which leaves populations out.",
    ),
)
"""The page numbers them in this order."""
