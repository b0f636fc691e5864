"""A layer's tensors and options as they were, and whether they still are.

The kernels read tensors where they lie, so that places are compared and not numbers. No tensor is kept: one at the same
place, of the same shape and kind, is the same to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_bln._torch import is_plain, own_modules, own_parameters
from lightning_bln.kernels.gate import checked
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.parameters import HasCells, InnerNorm, Weights

KINDS = (GateNorm, FrozenNorm)
NORMS = ("norm_ih", "norm_hh", "norm_cell")
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
AFFINE = ("weight", "bias")

Table = Mapping[str, Tensor | None]
"""A module's parameters or buffers by their names."""


class Watched(NamedTuple):
    """Tensors by their names, some of which may not be there, and where their numbers lie."""

    names: list[tuple[str, ...]]
    """In each of several tables."""
    layout: tuple[list[Any], ...]

    @classmethod
    def of(cls, tables: Sequence[Table], *names: tuple[str, ...]) -> Watched:
        """Those of these names, a tuple for each table, as they are."""
        found = cls([*names], ())
        return found._replace(layout=layout_of(found.values(tables)))

    def values(self, tables: Sequence[Table]) -> list[Tensor | None]:
        """Those of these names that there are now, in a row."""
        return [table.get(name) for table, names in zip(tables, self.names, strict=True) for name in names]

    def same(self, tables: Sequence[Table]) -> list[Tensor | None] | None:
        """:meth:`values`; ``None`` where one lies elsewhere than it did."""
        values = self.values(tables)
        return values if layout_of(values) == self.layout else None


KIND = attrgetter("shape", "dtype", "requires_grad")


def layout_of(values: Sequence[Tensor | None]) -> tuple[list[Any], ...]:
    """All that tells which tensors these are, where and how their numbers lie, and whether they have gradients."""
    present = [value for value in values if value is not None]
    # what is read is contiguous, so that its shape tells its strides
    places = map(id, values), map(Tensor.data_ptr, present), map(KIND, present), map(Tensor.is_contiguous, present)
    return tuple([*one] for one in places)


def admitted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype as the kernels read it, itself where it lies so."""
    return checked("a tensor of the layer", value, value.shape, dtype).contiguous()


def is_readable(value: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels read a tensor as it lies."""
    return value is None or (is_plain(value) and admitted(value, dtype) is value)


class WatchedLayer(NamedTuple):
    """One direction of a layer: its parameters, its norms and theirs, and its options; it keeps none alive."""

    options: tuple[Any, ...]
    tensors: Watched
    """Parameters, weight and bias of each norm, then buffers of each population."""
    names: tuple[str, ...]
    """Of the parameters."""

    @classmethod
    def of(
        cls, layer: HasCells, suffix: str, weights: Weights, buffers: Callable[[InnerNorm], Iterable[str]]
    ) -> WatchedLayer | None:
        """A direction whose parameters are ``weights``, and buffers of its populations.

        ``None`` where the kernels cannot read them as they lie, or where they come of others.
        """
        norms = norms_of(layer, suffix)
        found = [norm for norm in norms.values() if norm is not None]
        if any(type(norm) not in KINDS or norm.training is not layer.training for norm in found):
            return None
        names, tables = tuple(name + suffix for name in PARAMETERS), tables_of(layer, found)
        affine = [AFFINE] * len(found)
        tensors = Watched.of(tables, names, *affine, *(tuple(buffers(norm)) for norm in found))
        values = tensors.values(tables)
        if not reads_plainly(layer) or any(
            value is not getattr(weights, name) for name, value in zip(PARAMETERS, values, strict=False)
        ):
            return None  # parametrized, or made of others
        if any(getattr(norm, name) is not own_parameters(norm).get(name) for norm in found for name in AFFINE):
            return None
        if not all(is_readable(value, weights.weight_ih.dtype) for value in values):
            return None
        return cls(options_of(layer, norms), tensors, names)

    def same(self, layer: HasCells, suffix: str) -> list[Tensor | None] | None:
        """All tensors, for as long as they are needed; ``None`` where anything is not as it was."""
        norms = norms_of(layer, suffix)
        if options_of(layer, norms) != self.options:
            return None
        hidden = vars(layer)
        if any(name in hidden for name in self.names):
            return None
        return self.tensors.same(tables_of(layer, [norm for norm in norms.values() if norm is not None]))


def tables_of(layer: HasCells, norms: Sequence[InnerNorm]) -> list[Table]:
    """A layer's parameters, those of its norms, and the buffers of their populations."""
    return [own_parameters(layer), *map(own_parameters, norms), *(norm.given() for norm in norms)]


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


def options_of(layer: HasCells, norms: Mapping[str, InnerNorm | None]) -> tuple[Any, ...]:
    """All but tensors that a layer's result, what it gathers and what it warns of hang on."""
    found = [None if norm is None else (ref(norm), norm.options()) for norm in norms.values()]
    return OF_LAYER(layer), name_of(layer.cell), *found
