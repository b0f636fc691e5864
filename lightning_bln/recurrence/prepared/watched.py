"""A layer's tensors and options as they were, and whether they still are.

The kernels read tensors where they lie, so that places are compared and not numbers. No tensor is kept: one at the same
place, of the same shape and kind, is the same to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
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
    """Tensors of a module by their names, some of which may not be there, and where their numbers lie."""

    read: Read
    module: ref[nn.Module]
    names: tuple[str, ...]
    layouts: list[tuple[Any, ...] | None]

    @classmethod
    def of(cls, read: Read, module: nn.Module, *names: str) -> Watched:
        """Those of these names as they are."""
        values = read(module)
        return cls(read, ref(module), names, [layout_of(values.get(name)) for name in names])

    def values(self) -> list[Tensor | None]:
        """Those of these names that there are now."""
        values = self.read(self.module())
        return [values.get(name) for name in self.names]

    def same(self) -> list[Tensor | None] | None:
        """:meth:`values`; ``None`` where one lies elsewhere than it did."""
        values = self.values()
        return values if [layout_of(value) for value in values] == self.layouts else None


def layout_of(value: Tensor | None) -> tuple[Any, ...] | None:
    """All that tells where and how a tensor's numbers lie, and whether it has a gradient."""
    if value is None:
        return None
    kind = type(value), value.dtype, value.requires_grad, value.is_neg()
    # what is read is contiguous, so that its shape tells its strides
    return value.data_ptr(), value.shape, value.is_contiguous(), *kind


def admitted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype as the kernels read it, itself where it lies so."""
    return checked("a tensor of the layer", value, value.shape, dtype).contiguous()


def is_readable(value: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels read a tensor as it lies."""
    return value is None or (is_plain(value) and admitted(value, dtype) is value)


class WatchedLayer(NamedTuple):
    """One direction of a layer: its parameters, its norms and theirs, and its options; it keeps none alive."""

    options: tuple[Any, ...]
    tensors: list[Watched]
    """Parameters, those of each norm, then buffers of each population."""

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, buffers: Iterable[str]) -> WatchedLayer | None:
        """A direction whose parameters are ``weights``, and buffers of its populations.

        ``None`` where the kernels cannot read them as they lie, or where they come of others.
        """
        norms = norms_of(layer, suffix)
        found = [norm for norm in norms.values() if norm is not None]
        if any(type(norm) is not GateNorm or norm.training is not layer.training for norm in found):
            return None
        parameters = Watched.of(own_parameters, layer, *(name + suffix for name in PARAMETERS))
        if not reads_plainly(layer) or any(
            value is not getattr(weights, name) for name, value in zip(PARAMETERS, parameters.values(), strict=True)
        ):
            return None  # parametrized, or made of others
        tensors = [parameters, *(Watched.of(own_parameters, norm, "weight", "bias") for norm in found)]
        tensors += [Watched.of(own_buffers, norm.population, *buffers) for norm in found]
        dtype = weights.weight_ih.dtype
        if not all(is_readable(value, dtype) for one in tensors for value in one.values()):
            return None
        return cls(options_of(layer, norms), tensors)

    def same(self, layer: HasCells, suffix: str) -> list[list[Tensor | None]] | None:
        """All tensors, for as long as they are needed; ``None`` where anything is not as it was."""
        if options_of(layer, norms_of(layer, suffix)) != self.options:
            return None
        found = [one.same() for one in self.tensors]
        hidden = vars(layer)
        if None in found or any(name in hidden for name in self.tensors[0].names):
            return None
        return found  # type: ignore[return-value]


def reads_plainly(layer: HasCells) -> bool:
    """Whether a layer's parameters are what it finds under their names."""
    kind = type(layer)
    own = kind.__getattr__, kind.__getattribute__, kind._weights
    return own == (nn.Module.__getattr__, object.__getattribute__, HasCells._weights)


def norms_of(layer: HasCells, suffix: str) -> dict[str, Any]:
    """The norms of one direction, or ``None``, by their names."""
    children = own_modules(layer)
    return {name: children.get(name + suffix) for name in NORMS}


OF_LAYER = attrgetter("cell", "proj_size", "backend", "recompute", "input_dropout", "recurrent_dropout", "zoneout")
OF_NORM = attrgetter("norm", "eps", "delta", "scale", "groups", "mode", "fan", "training")
OF_POPULATION = attrgetter("is_stale", "estimator", "momentum", "merge_positions", "stands_for", "ignores_batch")


def options_of(layer: HasCells, norms: Mapping[str, GateNorm | None]) -> tuple[Any, ...]:
    """All but tensors that a layer's result, what it gathers and what it warns of hang on."""
    found: list[Any] = [OF_LAYER(layer), name_of(layer.cell)]
    for norm in norms.values():
        if norm is not None:
            one = norm.population
            found += [ref(norm), OF_NORM(norm), ref(one), OF_POPULATION(one), one.training_sizes is None]
        else:
            found.append(None)
    return tuple(found)
