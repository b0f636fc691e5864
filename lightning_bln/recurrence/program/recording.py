"""Recorded programs of cells: each kind of cell, with its options, is recorded once and kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln.cells.cell import Cell
from lightning_bln.recurrence.program.codegen import Place, Program, generate_program
from lightning_bln.recurrence.program.step import NORM_CELL, NORM_INPUT, PROJECTION, Around, parts_of, record_step


class Tensors(NamedTuple):
    """Tensors that a recurrence reads, in the order of the operator's arguments."""

    x: tuple[Tensor, ...]
    """Input after ``cell.prepare``, ``(T, B, width * H)`` each, with one or more gates side by side."""
    state: tuple[Tensor, ...]
    """The parts of all states."""
    weight_hh: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    """Of the output's projection."""
    constants: tuple[Tensor, ...]
    """The cell's own vectors and matrices."""
    norm_weights: tuple[Tensor | None, ...]
    """In the order of :meth:`Signature.norms`."""
    norm_biases: tuple[Tensor | None, ...]
    """Likewise, but for those of hidden products, which are ``bias_hh``."""
    mask: Tensor | None
    kept: tuple[Tensor, ...]
    """Of each zoned state, 1 where a unit keeps its value at a step, ``(T, B, H)``."""

    def flat(self) -> list[Tensor | None]:
        """All of them in one list."""
        learned = self.weight_hh, self.bias_hh, self.weight_hr, *self.constants, *self.norm_weights, *self.norm_biases
        return [*self.x, *self.state, *learned, self.mask, *self.kept]


class Signature(NamedTuple):
    """Properties of a call, besides the cell, that its program depends on; sizes are none."""

    segments: tuple[tuple[str, ...], ...]
    """Gates of each input tensor."""
    constants: tuple[tuple[str, int], ...]
    """The cell's parameters, and the number of axes of each."""
    around: Around

    def norms(self, cell: Cell) -> list[Any]:
        """Keys of the norms that a call has: the input's, each hidden product's, then the cell state's."""
        products = range(len(cell.products)) if self.around.normalized else ()
        before = [NORM_INPUT] if self.around.norm_input else []
        return [*before, *products, *([NORM_CELL] if self.around.norm_cell else [])]


class RecordedCell(NamedTuple):
    """A cell's program, and what is needed to call it."""

    cell: Cell
    """Without parameters."""
    signature: Signature
    program: Program

    @property
    def states(self) -> list[str]:
        """Names of the parts of all states, each of as many numbers as there are units."""
        return [part for parts in self.parts().values() for part in parts]

    def parts(self) -> dict[str, list[str]]:
        """The parts of each state."""
        return {name: parts_of(name, self.cell.state_size(name, 1)) for name in self.cell.states}

    def whole(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Whole states from their parts."""
        rest = iter(parts)
        groups = [[next(rest) for _ in names] for names in self.parts().values()]
        return tuple(group[0] if len(group) == 1 else torch.cat(group, -1) for group in groups)

    def tensors(self, flat: Sequence[Any]) -> Tensors:
        """The inverse of :meth:`Tensors.flat`."""
        x = len(self.signature.segments)
        state = x + len(self.states)
        weight_hh, bias_hh, weight_hr, *rest = flat[state:]
        norms, ends = len(self.signature.norms(self.cell)), [0, len(self.signature.constants)]
        ends += [ends[-1] + norms, ends[-1] + 2 * norms]
        constants, weights, biases = (tuple(rest[a:b]) for a, b in itertools.pairwise(ends))
        mask, *kept = rest[ends[-1] :]
        first = tuple(flat[:x]), tuple(flat[x:state])
        return Tensors(*first, weight_hh, bias_hh, weight_hr, constants, weights, biases, mask, tuple(kept))

    def width(self, norm: Any) -> int:
        """Gates that a norm takes."""
        if norm == NORM_INPUT:
            return len(self.cell.gates)
        return 1 if norm == NORM_CELL else len(self.cell.products[norm])

    def rows(self, units: int) -> list[int]:
        """Rows of the hidden weights that belong to each product."""
        return [len(names) * units for names in self.cell.products]


Options = tuple[tuple[str, Any, str], ...]
"""Name and value of each, and how it is written, which tells 1 from 1.0."""


def options_of(cell: Cell) -> Options | None:
    """A cell's attributes besides parameters and norm; ``None`` if one is no number, string or tuple of these."""
    own = {name: value for name, value in cell.__dict__.items() if name not in cell.parameters and name != "norm_cell"}
    return tuple(sorted((n, v, repr(v)) for n, v in own.items())) if all(map(is_plain, own.values())) else None


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, or a tuple of these."""
    return all(map(is_plain, value)) if isinstance(value, tuple) else isinstance(value, int | float | str)


def without_parameters(kind: type[Cell], options: Options) -> Cell:
    """A cell of its options alone."""
    cell = object.__new__(kind)
    cell.__dict__.update({name: value for name, value, _ in options})
    return cell


@lru_cache(maxsize=256)
def record(kind: type[Cell], options: Options, signature: Signature) -> RecordedCell | str:
    """The recorded program of a kind of cell; if its step cannot be recorded, why."""
    cell = without_parameters(kind, options)
    layout = {
        name: Place(("x", index), offset)
        for index, names in enumerate(signature.segments)
        for offset, name in enumerate(names)
    }
    widths = {index: len(names) for index, names in enumerate(cell.products)} | {PROJECTION: 0}
    try:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            step = record_step(cell, layout, dict(signature.constants), signature.around)
            return RecordedCell(cell, signature, generate_program(step, layout, widths))
    except Exception as error:  # a user's step may raise anything on nodes; torch operations run it, or raise it again
        message = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {message}"
