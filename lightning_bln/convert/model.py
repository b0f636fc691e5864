"""Conversion of all layers of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln._torch import own_modules
from lightning_bln.convert.layers import CONVERTIBLE, Counterpart, base_of, counterpart
from lightning_bln.convert.report import Conversion, ConversionReport, of

LOGGER = logging.getLogger("lightning_bln.convert")

LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
"""Layers without a size; the first input makes BatchNorms of them."""

OTHER_NORMS = re.compile("Norm|LSTM|GRU|RNN")
"""Pattern of the names of classes that a report mentions though they do not convert."""


class Place(NamedTuple):
    """A slot for a module in its parent; the model itself has no parent."""

    path: str
    parent: nn.Module | None
    name: str
    module: nn.Module
    like: Tensor | None
    """A parameter of the parent or what is above it."""


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

    With ``norm="batch"`` running statistics become the population. BLN also needs statistics of features, which a
    BatchNorm does not have: train, or call :func:`~lightning_bln.recompute_population`.

    Args:
        model: Module to change in place.
        norm: ``"bln"``, ``"layer"`` or ``"batch"``.
        report: Whether to return a report as well. In any case the logger ``lightning_bln.convert`` gets it at level
            INFO, and what was left alone or lost at level WARNING.
        **options: For the recurrent layers, as in :class:`~lightning_bln.Recurrent`.

    Returns:
        ``model``, or its counterpart if it is itself such a layer; with ``report`` also a
        :class:`~lightning_bln.convert.ConversionReport`.

    Raises:
        ValueError: A LayerNorm is over several axes, a lazy layer has no size yet, a SyncBatchNorm has a process group
            of its own, or a part is wrapped for DDP; then nothing is replaced.

    Example:
        >>> model, found = to_bln(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), report=True)
        >>> print(found)
        1: BatchNorm1d -> Normalization
    """
    every = [*places(model)]
    for place in every:
        refuse(place)
    made: dict[nn.Module, Counterpart | None] = {}
    for place in every:
        base = base_of(place.module)
        if place.module not in made:
            made[place.module] = None if base is None else counterpart(place.module, base, norm, options, place.like)
    # only now is the model changed, since any of the above may raise
    for place in every:
        found = made[place.module]
        if place.parent is not None and found is not None:
            setattr(place.parent, place.name, found.layer)
    entries = [entry for module, found in made.items() if (entry := described(module, found, every)) is not None]
    result = ConversionReport((*entries, *(plain_path(place) for place in every if is_fused_encoder(place, made))))
    log(result)
    own = made[model]
    converted = model if own is None else own.layer
    return (converted, result) if report else converted


def places(model: nn.Module) -> Iterator[Place]:
    """Every slot for a module, each parent visited once; a module in two slots comes twice."""
    seen: set[nn.Module] = set()

    def within(place: Place) -> Iterator[Place]:
        yield place
        if place.module in seen or base_of(place.module) is not None:
            return
        seen.add(place.module)
        like = next(place.module.parameters(), place.like)
        for name, child in own_modules(place.module).items():
            if child is not None:
                yield from within(Place(f"{place.path}.{name}".lstrip("."), place.module, name, child, like))

    return within(Place("", None, "", model, None))


def refuse(place: Place) -> None:
    """Raise where a layer cannot be converted and to leave it alone would not be what was asked for."""
    module, name = place.module, place.path or "model"
    if base_of(module) is nn.LayerNorm and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise ValueError(
            f"{name} is a LayerNorm over {tuple(module.normalized_shape)}, but BLN takes one feature axis; flatten "
            "those axes first"
        )
    if isinstance(module, LAZY):
        raise ValueError(
            f"{name} is a {type(module).__name__} that has seen no input yet, so that its size is unknown; run a batch "
            "through the model first"
        )
    if isinstance(module, DistributedDataParallel):
        raise ValueError(f"{name} is wrapped by DistributedDataParallel; convert the module inside before you wrap it")
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


def is_fused_encoder(place: Place, made: dict[nn.Module, Counterpart | None]) -> bool:
    """Whether a layer of a Transformer would evaluate by a fused operator that reads weights and skips its norms."""
    module = place.module
    if not isinstance(module, nn.TransformerEncoderLayer) or not module.activation_relu_or_gelu:
        return False
    return any(one is not None and one.layer in (module.norm1, module.norm2) for one in made.values())


def plain_path(place: Place) -> Conversion:
    """Keep a Transformer's layer from its fused operator, by the attribute that says it has none for an activation."""
    assert isinstance(place.module, nn.TransformerEncoderLayer)
    place.module.activation_relu_or_gelu = 0
    kind = type(place.module)
    return of([place.path], kind, kind, ["evaluates without torch's fused operator, which knows LayerNorm alone"], [])


def log(result: ConversionReport) -> None:
    """Log a report, and as a warning that part of it which a user has to know."""
    LOGGER.info("%s", result)
    if result.incomplete.entries:
        LOGGER.warning("to_bln left alone or lost:\n%s", result.incomplete)
