"""A layer's tensors and options as they were, and whether they still are.

The kernels read tensors where they lie, so that places are compared and not numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_bln._torch import is_plain, own_buffers, own_modules, own_parameters
from lightning_bln.kernels.gate import checked
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.parameters import HasCells, Weights

NORMS = ("norm_ih", "norm_hh", "norm_cell")
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

Read = Callable[[Any], Mapping[str, Tensor | None]]
"""A module's parameters or buffers by their names."""


class Watched(NamedTuple):
    """A module's tensor, or the lack of one, and where its numbers lie; it keeps neither alive."""

    read: Read
    module: ref[nn.Module]
    name: str
    value: ref[Tensor] | None
    layout: tuple[Any, ...] | None

    @classmethod
    def of(cls, read: Read, module: nn.Module, name: str) -> Watched:
        """The tensor of this name as it is."""
        value = read(module).get(name)
        return cls(read, ref(module), name, None if value is None else ref(value), layout_of(value))

    def now(self) -> Tensor | None:
        """The tensor of this name that there is now."""
        return self.read(self.module()).get(self.name)

    def stays(self) -> bool:
        """Whether it is the same, at the same place."""
        value = self.now()
        return value is (self.value and self.value()) and layout_of(value) == self.layout

    def is_readable(self, dtype: torch.dtype) -> bool:
        """Whether the kernels read it as it lies."""
        value = self.now()
        return value is None or (is_plain(value) and admitted(value, dtype) is value)


def layout_of(value: Tensor | None) -> tuple[Any, ...] | None:
    """All that tells where a tensor's numbers lie, and whether it has a gradient."""
    if value is None:
        return None
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad


def admitted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype as the kernels read it, itself where it lies so."""
    return checked("a tensor of the layer", value, value.shape, dtype).contiguous()


class WatchedLayer(NamedTuple):
    """One direction of a layer: its parameters, its norms and theirs, and its options; it keeps none alive."""

    options: tuple[Any, ...]
    tensors: list[Watched]
    """Parameters, then those of its norms, then buffers of populations."""

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, buffers: Iterable[str]) -> WatchedLayer | None:
        """A direction whose parameters are ``weights``, and buffers of its populations.

        ``None`` where the kernels cannot read them as they lie, or where they come of others.
        """
        norms = norms_of(layer, suffix)
        found = [norm for norm in norms.values() if norm is not None]
        if any(type(norm) is not GateNorm or norm.training is not layer.training for norm in found):
            return None
        tensors = [Watched.of(own_parameters, layer, name + suffix) for name in PARAMETERS]
        if any(one.now() is not getattr(weights, name) for name, one in zip(PARAMETERS, tensors, strict=True)):
            return None  # parametrized, or assigned from elsewhere
        tensors += [Watched.of(own_parameters, norm, name) for norm in found for name in ("weight", "bias")]
        tensors += [Watched.of(own_buffers, norm.population, name) for norm in found for name in buffers]
        if not all(one.is_readable(weights.weight_ih.dtype) for one in tensors):
            return None
        return cls(options_of(layer, norms), tensors)

    def stays(self, layer: HasCells, suffix: str) -> bool:
        """Whether all is as it was."""
        is_alike = options_of(layer, norms_of(layer, suffix)) == self.options
        return is_alike and all(one.stays() for one in self.tensors)


def norms_of(layer: HasCells, suffix: str) -> dict[str, Any]:
    """The norms of one direction, or ``None``, by their names."""
    children = own_modules(layer)
    return {name: children.get(name + suffix) for name in NORMS}


def options_of(layer: HasCells, norms: Mapping[str, GateNorm | None]) -> tuple[Any, ...]:
    """All but tensors that a layer's result, what it gathers and what it warns of hang on."""
    found: list[Any] = [layer.cell, name_of(layer.cell), layer.proj_size, layer.backend, layer.recompute]
    found += [layer.input_dropout, layer.recurrent_dropout, layer.zoneout]
    for norm in norms.values():
        if norm is None:
            found.append(None)
            continue
        found += [
            ref(norm),
            norm.norm,
            norm.eps,
            norm.delta,
            norm.scale,
            norm.groups,
            norm.mode,
            norm.fan,
            norm.training,
        ]
        one = norm.population
        found += [ref(one), one.is_stale, one.estimator, one.momentum, one.merge_positions, one.stands_for]
        found += [one.training_sizes is None, one.ignores_batch]
    return tuple(found)
