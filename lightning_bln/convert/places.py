"""Slots of a model in which a module stands, and what goes into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bln._torch import own_modules


class Place(NamedTuple):
    """A slot for a module in its parent; the model itself has no parent."""

    path: str
    parent: nn.Module | None
    name: str
    module: nn.Module
    like: Tensor | None
    """A parameter of the parent or what is above it."""


class Counterpart(NamedTuple):
    """A layer's replacement, and what there is to say about it."""

    layer: nn.Module
    notes: list[str]
    lost: list[str]


def places(model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> Iterator[Place]:
    """Every slot for a module outside layers, each parent visited once; a module in two slots comes twice."""
    seen: set[nn.Module] = set()

    def within(place: Place) -> Iterator[Place]:
        yield place
        if place.module in seen or is_layer(place.module):
            return
        seen.add(place.module)
        like = next(place.module.parameters(), place.like)
        for name, child in own_modules(place.module).items():
            if child is not None:
                yield from within(Place(f"{place.path}.{name}".lstrip("."), place.module, name, child, like))

    return within(Place("", None, "", model, None))


def refuse_wrapped(place: Place) -> None:
    """Raise where a part is wrapped for DDP, which holds on to the parameters that it has found."""
    if isinstance(place.module, DistributedDataParallel):
        name = place.path or "model"
        raise ValueError(f"{name} is wrapped by DistributedDataParallel; convert the module inside before you wrap it")


def replace(every: list[Place], made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put the replacement of each module into all of its slots; return the model, or what it has become."""
    for place in every:
        if place.parent is not None and place.module in made:
            setattr(place.parent, place.name, made[place.module])
    return made.get(every[0].module, every[0].module)
