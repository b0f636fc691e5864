"""Conversion of all layers of a model."""

from __future__ import annotations

import re
from typing import Any, Literal, overload

import torch
from torch import distributed, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln._checks import check_choice
from lightning_bln.convert.layers import BATCH_NORMS, CONVERTIBLE, base_of, counterpart
from lightning_bln.convert.places import Counterpart, Place, places, refuse_wrapped, replace
from lightning_bln.convert.report import Conversion, ConversionReport, log, of
from lightning_bln.functional import NORMS

LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
"""Layers without a size; the first input makes BatchNorms of them."""

SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
"""Attributes of a Transformer's parts that choose an operator which knows LayerNorm alone, and values that do not."""

SWITCHED = "switched_before"
"""Attribute that keeps, for the way back, the value that such a switch had."""

OTHER_NORMS = re.compile("Norm|LSTM|GRU|RNN")
"""Pattern of the names of classes that a report mentions though they do not convert."""


@overload
def to_bln(model: nn.Module, *, norm: str = ..., report: Literal[False] = ..., **options: Any) -> nn.Module: ...


@overload
def to_bln(
    model: nn.Module, *, norm: str = ..., report: Literal[True], **options: Any
) -> tuple[nn.Module, ConversionReport]: ...


def to_bln(
    model: nn.Module, *, norm: str = "bln", report: bool = False, **options: Any
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    """Replace every BatchNorm, LayerNorm and torch recurrent layer in ``model`` by its normalised counterpart.

    BatchNorm becomes BLN over its channels with shared positions, LayerNorm over its last axis, both with scale 1 so
    that activations keep their size; SyncBatchNorm takes batch statistics over all ranks; LSTM, GRU, RNN and their
    single-step cells become those of this package. The new layers hold the very parameters of the old ones, so an
    optimizer stays valid, though the norms inside recurrent layers are new parameters; they keep hooks,
    parametrizations, ``requires_grad``, device, dtype and training flag, and a layer that stands in several places is
    shared as before.

    With ``norm="keep"`` the model computes what it did, and :func:`to_torch` is the way back: BatchNorm becomes
    ``norm="batch"`` with its running statistics, also those it starts with, as the population, LayerNorm
    ``norm="layer"``, recurrent layers ``norm=None``. With ``norm="batch"`` running statistics become the population,
    too. BLN also needs statistics of features, which a BatchNorm does not have: train, or call
    :func:`~lightning_bln.recompute_population`.

    Args:
        model: Module to change in place.
        norm: ``"bln"``, ``"layer"``, ``"batch"``, or ``"keep"`` for the norm that each layer has.
        report: Whether to return a report as well. In any case the logger ``lightning_bln.convert`` gets it at level
            INFO, and what was left alone or lost at level WARNING.
        **options: For the recurrent layers, as in :class:`~lightning_bln.Recurrent`.

    Returns:
        ``model``, or its counterpart if it is itself such a layer; with ``report`` also a
        :class:`~lightning_bln.convert.ConversionReport`.

    Raises:
        ValueError: ``norm`` is none of these, a LayerNorm is over several axes, a lazy layer has no size yet, a
            SyncBatchNorm has a process group of its own, a momentum is outside [0, 1], or a part is wrapped
            for DDP; then nothing is replaced.

    Example:
        >>> model, found = to_bln(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), report=True)
        >>> print(found)
        1: BatchNorm1d -> Normalization
    """
    check_choice("norm", norm, ("keep", *NORMS))
    every = [*places(model, lambda module: base_of(module) is not None)]
    for place in every:
        refuse(place)
    made: dict[nn.Module, Counterpart] = {}
    with torch.inference_mode(False):  # whose tensors could not be trained
        for place in every:
            base = base_of(place.module)
            if base is not None and place.module not in made:
                made[place.module] = counterpart(place.module, base, norm, options, place.like)
    # only now is the model changed, since any of the above may raise
    converted = replace(every, {module: found.layer for module, found in made.items()})
    modules = dict.fromkeys(place.module for place in every)
    entries = [entry for module in modules if (entry := described(module, made.get(module), every)) is not None]
    result = ConversionReport((*entries, *(plain_path(place) for place in every if is_switched(place, made))))
    log("to_bln", result)
    return (converted, result) if report else converted


def refuse(place: Place) -> None:
    """Raise where a layer cannot be converted and to leave it alone would not be what was asked for."""
    module, name = place.module, place.path or "model"
    if base_of(module) is nn.LayerNorm and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise ValueError(
            f"{name} is a LayerNorm over {tuple(module.normalized_shape)}, but BLN takes one feature axis; flatten "
            "those axes first"
        )
    momentum = module.momentum if base_of(module) in BATCH_NORMS else None
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
        raise ValueError(
            f"{name} is a {type(module).__name__} with momentum={momentum}, but a population follows batches by a "
            "share in [0, 1]; set another"
        )
    if isinstance(module, LAZY):
        raise ValueError(
            f"{name} is a {type(module).__name__} that has seen no input yet, so that its size is unknown; run a batch "
            "through the model first"
        )
    refuse_wrapped(place)
    group = getattr(module, "process_group", None) if isinstance(module, nn.SyncBatchNorm) else None
    if group is not None and group is not distributed.group.WORLD:
        raise ValueError(
            f"{name} is a SyncBatchNorm with a process group of its own, but joint statistics are those of all ranks; "
            "make it without process_group"
        )


def described(module: nn.Module, found: Counterpart | None, every: list[Place]) -> Conversion | None:
    """The report on a module, ``None`` on one that neither normalises nor recurs."""
    names = [place.path for place in every if place.module is module]
    kind = type_before_parametrizations(module)
    if found is not None:
        became = type_before_parametrizations(found.layer)
        return of(names, kind, became, found.notes, found.lost)
    # a class of this name that holds layers which do convert is no layer itself
    named = getattr(module, "original_name", kind.__name__)
    is_ours = kind.__module__.split(".")[0] == __package__.split(".")[0]
    inner = [place for place in every if place.parent is module]
    base = next((base for base in CONVERTIBLE if isinstance(module, base)), None)
    if is_ours or inner or (base is None and not OTHER_NORMS.search(named)):
        return None
    reason = "it has no counterpart" if base is None else f"{base.__name__} with a forward of its own"
    return Conversion(tuple(names), named, None, (reason,))


def switch_of(module: nn.Module) -> tuple[str, Any] | None:
    """The switch of a part of a Transformer, if it is on."""
    found = next((switch for kind, switch in SWITCHES.items() if isinstance(module, kind)), None)
    return found if found is not None and getattr(module, found[0], None) else None


def norms_of_layers(module: nn.Module) -> list[nn.Module]:
    """Norms of a Transformer's layers, of which ``module`` is one or has some."""
    layers = [one for one in module.modules() if isinstance(one, nn.TransformerEncoderLayer)]
    return [norm for one in layers for norm in (one.norm1, one.norm2)]


def is_switched(place: Place, made: dict[nn.Module, Counterpart]) -> bool:
    """Whether a part of a Transformer would evaluate by operators that skip its norms, or give them nested tensors."""
    if switch_of(place.module) is None:
        return False
    converted = {id(one.layer) for one in made.values()}
    return any(id(norm) in converted for norm in norms_of_layers(place.module))


def plain_path(place: Place) -> Conversion:
    """Switch a part of a Transformer to operators that know any norm."""
    module, switch = place.module, switch_of(place.module)
    assert switch is not None
    name, off = switch
    setattr(module, SWITCHED, getattr(module, name))
    setattr(module, name, off)
    note = "evaluates without torch's fused operator and nested tensors, which know LayerNorm alone"
    return of([place.path], type(module), type(module), [note], [])
