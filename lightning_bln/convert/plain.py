"""Conversion of normalised layers back to torch's own, where torch has one that computes the same."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln.convert.carried import carry
from lightning_bln.convert.layers import BATCH_NORMS
from lightning_bln.convert.model import SWITCHED, SWITCHES, norms_of_layers
from lightning_bln.convert.places import Counterpart, Place, places, refuse_wrapped, replace
from lightning_bln.convert.plain_norms import known_of_norm, norm_reason, plain_norm
from lightning_bln.convert.plain_recurrent import finish, known_of_recurrent, plain_recurrent, recurrent_reason
from lightning_bln.convert.report import Conversion, ConversionReport, log, of
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrent import Recurrent

OURS = (Normalization, Recurrent, RecurrentCell)
FORWARDS = {kind.forward for kind in OURS}

PACKAGE = __name__.partition(".")[0]
CALLERS = (f"{PACKAGE}.conv", f"{PACKAGE}.models")
"""Modules whose classes call the layers inside them as torch's cannot be called."""


@overload
def to_torch(
    model: nn.Module, *, batch_norm: type[nn.Module] | None = ..., report: Literal[False] = ...
) -> nn.Module: ...


@overload
def to_torch(
    model: nn.Module, *, batch_norm: type[nn.Module] | None = ..., report: Literal[True]
) -> tuple[nn.Module, ConversionReport]: ...


def to_torch(
    model: nn.Module, *, batch_norm: type[nn.Module] | None = None, report: bool = False
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    """Replace every layer of this package in ``model`` by torch's own that computes the same, where there is one.

    ``norm="batch"`` becomes the BatchNorm that it was, its population the running statistics; ``norm="layer"`` over the
    last axis becomes LayerNorm, a recurrent layer or cell with ``norm=None`` that of torch. The new layers hold the
    very parameters of the old ones and keep what :func:`to_bln` keeps. Layers that torch does not have, all of
    ``norm="bln"`` among them, stay as they are and are named with the reason.

    Args:
        model: Module to change in place.
        batch_norm: Class for layers of ``norm="batch"`` that :func:`to_bln` did not make, which do not know how many
            axes they take: :class:`torch.nn.BatchNorm1d`, ``BatchNorm2d`` or ``BatchNorm3d``. Without it those stay as
            they are, but with ``sync_batch_stats=True``, which are SyncBatchNorms.
        report: Whether to return a report as well. In any case the logger ``lightning_bln.convert`` gets it at level
            INFO, and what was left alone or lost at level WARNING.

    Returns:
        ``model``, or its counterpart if it is itself such a layer; with ``report`` also a
        :class:`~lightning_bln.convert.ConversionReport`.

    Raises:
        ValueError: ``batch_norm`` is none of these, or a part is wrapped for DDP; then nothing is replaced.

    Example:
        >>> plain = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.LSTM(8, 8))
        >>> keys = plain.state_dict().keys()
        >>> from lightning_bln import to_bln
        >>> model, found = to_torch(to_bln(plain, norm="keep"), report=True)
        >>> print(found)
        1: Normalization -> BatchNorm1d
        2: BLNLSTM -> LSTM
        >>> model.state_dict().keys() == keys
        True
    """
    classes = [kind for kind in BATCH_NORMS if kind is not nn.SyncBatchNorm]
    if batch_norm is not None and batch_norm not in classes:
        allowed = ", ".join(["None", *(f"nn.{kind.__name__}" for kind in classes)])
        raise ValueError(f"batch_norm={batch_norm!r}, but it must be one of {allowed}")
    every = [*places(model, lambda module: isinstance(module, OURS))]
    for place in every:
        refuse_wrapped(place)
    reasons = {module: reason for module in ours(every) if (reason := reason_of(module, every, batch_norm))}
    with torch.inference_mode(False):  # whose tensors could not be trained
        made = {module: plain_counterpart(module, batch_norm) for module in ours(every) if module not in reasons}
    # only now is the model changed, since any of the above may raise
    converted = replace(every, {module: found.layer for module, found in made.items()})
    result = ConversionReport(
        (*(told(module, made.get(module), reasons.get(module), every) for module in ours(every)), *fused_again(every))
    )
    log("to_torch", result)
    return (converted, result) if report else converted


def ours(every: list[Place]) -> list[nn.Module]:
    """The layers of this package, each once."""
    return [*dict.fromkeys(place.module for place in every if isinstance(place.module, OURS))]


def reason_of(module: Any, every: list[Place], batch_norm: type[nn.Module] | None) -> str | None:
    """The reason why torch has no layer for ``module``, if so."""
    if "forward" in vars(module) or type(module).forward not in FORWARDS:
        return "it has a forward of its own"
    parents = [type(place.parent) for place in every if place.module is module]
    callers = [kind.__name__ for kind in parents if any(one.__module__.startswith(CALLERS) for one in kind.__mro__)]
    if callers:
        return f"{callers[0]} calls it as no layer of torch can be called"
    return norm_reason(module, batch_norm) if isinstance(module, Normalization) else recurrent_reason(module)


def plain_counterpart(module: Any, batch_norm: type[nn.Module] | None) -> Counterpart:
    """The layer of torch, which takes over the very parameters and hooks."""
    is_norm = isinstance(module, Normalization)
    found = plain_norm(module, batch_norm) if is_norm else plain_recurrent(module)
    known = known_of_norm() if is_norm else known_of_recurrent(module)
    lost = carry(module, found.layer, known, shared=True)
    finish(found.layer)
    was = type_before_parametrizations(module)
    if not was.__module__.startswith(f"{PACKAGE}."):
        lost.append(f"methods that {was.__name__} adds")
    return found._replace(lost=found.lost + lost)


def told(module: nn.Module, found: Counterpart | None, reason: str | None, every: list[Place]) -> Conversion:
    """The report on a layer."""
    names, kind = [place.path for place in every if place.module is module], type_before_parametrizations(module)
    if found is None:
        return of(names, kind, None, [reason or ""], [])
    return of(names, kind, type_before_parametrizations(found.layer), found.notes, found.lost)


def fused_again(every: list[Place]) -> list[Conversion]:
    """Let parts of a Transformer evaluate by torch's fused operators again that only converted norms kept from them."""
    entries = []
    for place in every:
        module = place.module
        name = next((name for kind, (name, _) in SWITCHES.items() if isinstance(module, kind)), None)
        if name is None or SWITCHED not in vars(module):
            continue
        if all(isinstance(norm, nn.LayerNorm) for norm in norms_of_layers(module)):
            setattr(module, name, vars(module)[SWITCHED])
            delattr(module, SWITCHED)
            note = "evaluates by torch's fused operator again"
            entries.append(of([place.path], type(module), type(module), [note], []))
    return entries
