"""Affine maps before or behind linear layers and convolutions, taken into their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lightning_bln._torch import own_modules
from lightning_bln.folding.maps import Map

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

SPATIAL: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
"""Layers that take maps in, and their spatial axes."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spatial_axes(layer: Any) -> int | None:
    """Spatial axes of a layer that maps can go into; ``None`` for others, subclasses among them."""
    is_own = "forward" in vars(layer)
    return None if is_own else SPATIAL.get(type_before_parametrizations(layer))


def is_same_axis(layer: Any, channel_dim: int, axes: Collection[int]) -> bool | None:
    """Whether a norm's feature axis is the layer's, for values of any of the numbers of ``axes``.

    ``None`` if it depends on their number, and ``axes`` is empty.
    """
    own = -1 - SPATIAL[type_before_parametrizations(layer)]
    if channel_dim <= 0:
        return channel_dim == own
    return all(channel_dim == own + number for number in axes) if axes else None


def outputs_of(layer: Any) -> int:
    """Features of a layer's output."""
    return layer.out_features if spatial_axes(layer) == 0 else layer.out_channels


def inputs_of(layer: Any) -> int:
    """Features of a layer's input."""
    return layer.in_features if spatial_axes(layer) == 0 else layer.in_channels


def pads_zeros(layer: Any) -> bool:
    """Whether a layer reads zeros beside its input, which no bias stands for where a map would move them."""
    if spatial_axes(layer) == 0:
        return False
    if isinstance(layer, TRANSPOSED):
        return True
    if layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def pads_nothing(layer: Any) -> bool:
    """``False``, since what a layer reads beside its input does not matter to a map of its output."""
    return False


def take_in_behind(layer: Any, behind: Map) -> None:
    """Let ``layer`` compute what it did with the map applied to its output."""
    weight, bias = exact(layer)
    factor = behind.factor.to(weight.device)
    summand = behind.summand.to(weight.device)
    if isinstance(layer, TRANSPOSED):  # (inputs, outputs of a group, ...)
        parts = weight.unflatten(0, (layer.groups, -1))
        factors = factor.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (parts * factors).flatten(0, 1)
    else:
        weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
    assign(layer, weight, summand if bias is None else bias * factor + summand)


def take_in_before(layer: Any, before: Map) -> None:
    """Let ``layer`` compute what it did with the map applied to its input."""
    weight, bias = exact(layer)
    groups = 1 if spatial_axes(layer) == 0 else layer.groups
    shape = (groups, 1, -1, *[1] * (weight.ndim - 2))
    parts = weight.unflatten(0, (groups, -1))  # (groups, outputs of a group, inputs of a group, ...)
    moved = parts * before.summand.to(weight.device).view(shape)
    moved = moved.flatten(2).sum(-1).flatten()
    weight = (parts * before.factor.to(weight.device).view(shape)).flatten(0, 1)
    assign(layer, weight, moved if bias is None else bias + moved)


class Side(NamedTuple):
    """A way for a map to go into a layer beside it.

    Attributes:
        word: The layer's place beside the norm.
        features: Number of features on the norm's side of a layer.
        is_inexact: Whether a layer cannot take a map in exactly.
        take_in: Function that lets a layer compute the map, too.
    """

    word: str
    features: Callable[[Any], int]
    is_inexact: Callable[[Any], bool]
    take_in: Callable[[Any, Map], None]


SIDES = (
    Side("before", outputs_of, pads_nothing, take_in_behind),
    Side("behind", inputs_of, pads_zeros, take_in_before),
)


def exact(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64."""
    # not every device has float64
    weight, bias = (None if one is None else one.detach().cpu().double() for one in (layer.weight, layer.bias))
    assert weight is not None
    return weight, bias


def assign(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Give a layer new parameters of the dtype and on the device of those it has."""
    like = layer.weight
    for name, value in (("weight", weight), ("bias", bias)):
        setattr(layer, name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad))


def bake(module: nn.Module) -> None:
    """Put the values of parametrized tensors in place of the parametrizations.

    torch's own function for it takes the tensor away from the class, which copies of a module share.
    """
    if not is_parametrized(module):
        return
    plain, chains = type_before_parametrizations(module), own_modules(module).pop("parametrizations")
    assert isinstance(chains, nn.ModuleDict)
    with torch.no_grad():
        values = {name: chain().detach().clone() for name, chain in chains.items()}
    module.__class__ = plain
    for name, value in values.items():
        originals = [*chains[name].parameters(recurse=False)]
        if originals:
            module.register_parameter(name, nn.Parameter(value, any(one.requires_grad for one in originals)))
        else:
            module.register_buffer(name, value)
