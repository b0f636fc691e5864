"""A cell's step run on nodes of a graph, with the norms, dropout and zoneout around its equations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

from lightning_bln.cells.cell import Cell
from lightning_bln.recurrence.program.graph import Line, NotRecordable, Step, Value, joined
from lightning_bln.recurrence.reference import identity


class NamedGates:
    """Recorded stand-in for :class:`~lightning_bln.cells.Gates`."""

    def __init__(self, parts: dict[str, Value]) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Value:
        if name not in self._parts:
            raise AttributeError(f"no gate {name!r}; there are {', '.join(self._parts)}")
        return self._parts[name]

    def __add__(self, other: NamedGates) -> NamedGates:
        if tuple(self._parts)[: len(other._parts)] != tuple(other._parts):
            raise NotRecordable("a sum of gates that are not the first")
        return NamedGates({name: self._parts[name] + part for name, part in other._parts.items()})

    def split(self) -> dict[str, Value]:
        """Each gate on its own."""
        return dict(self._parts)

    def replace(self, **gates: Value) -> NamedGates:
        """Gates with some of them exchanged or added."""
        return NamedGates({**self._parts, **gates})


class NoState:
    """Stand-in for the first state in :meth:`~lightning_bln.cells.Cell.prepare`, which a single step does not know."""

    def __getattr__(self, name: str) -> Any:
        raise NotRecordable("the first state, in what is prepared for all steps")


class Products:
    """Recorded stand-in for :class:`~lightning_bln.recurrence.projection.Projection`."""

    def __init__(self, cell: Cell, options: Around) -> None:
        self.norms: list[Value] = []
        self._cell, self._options, self._mask = cell, options, Value("mask") if options.masked else None
        self._where = {name: index for index, names in enumerate(cell.products) for name in names}

    def __call__(self, h: Value) -> NamedGates:
        """The first product."""
        return self._of(0, h)

    def __getattr__(self, gate: str) -> Callable[[Value], Any]:
        index = self._where[gate]

        def of_gate(h: Value) -> Any:
            gates = self._of(index, h)
            return gates if len(self._cell.products[index]) > 1 else gates.split()[gate]

        return of_gate

    def _of(self, index: int, h: Value) -> NamedGates:
        names = self._cell.products[index]
        found = Value("product", (h if self._mask is None else h * self._mask,), key=index)
        if self._options.normalized:
            found = Value("norm", (found,), key=(index, len(names)))
            self.norms.append(found)
        parts = {name: Value("part", (found,), key=k) for k, name in enumerate(names)}
        if self._options.biased and not self._options.normalized:  # a norm adds the bias itself
            parts = {name: part + Value("bias", key=(index, k)) for k, (name, part) in enumerate(parts.items())}
        return NamedGates(parts)

    def norm_cell(self, c: Value) -> Value:
        """A cell state normalised."""
        found = Value("norm", (c,), key=(NORM_CELL, 1))
        self.norms.append(found)
        return Value("part", (found,), key=0)


class Around(NamedTuple):
    """Norms, bias, dropout and zoneout around a cell's equations."""

    biased: bool
    """Whether hidden products have a bias."""
    masked: bool
    """Whether a dropout mask is applied before hidden products."""
    norm_input: bool
    """Whether the input is a product that is still to be normalised, and then prepared."""
    normalized: bool
    """Whether hidden products are normalised."""
    norm_cell: bool
    """Whether the cell state is normalised where it enters the output."""
    projected: bool
    """Whether the output is projected."""
    zoned: tuple[str, ...]
    """States that zoneout acts on."""
    zoneout: float | None
    """Share of its value that a unit keeps; ``None`` where a mask tells which units keep theirs."""


PROJECTION = "weight_hr"
"""The key of the output's product."""

NORM_INPUT, NORM_CELL = "input", "cell"
"""Keys of the norms of the input's product and of the cell state; those of hidden products have the product's index."""


def record_step(cell: Cell, gates: Iterable[str], axes: Mapping[str, int], around: Around) -> Step:
    """Run ``cell.step`` on nodes in place of tensors.

    Args:
        cell: The cell, without its parameters.
        gates: Names of the gates after ``cell.prepare``.
        axes: Number of axes of each of the cell's parameters: 1 for a vector, 2 for a matrix.
        around: Norms, bias, dropout and zoneout.

    Raises:
        NotRecordable: The step does something that has no instruction.
    """
    cell = copy(cell)
    cell.__dict__.update(
        {name: Value("matrix" if number == 2 else "constant", key=name) for name, number in axes.items()}
    )
    names = {name: parts_of(name, cell.state_size(name, 1)) for name in cell.states}
    before = {name: Value("state", key=name) for parts in names.values() for name in parts}
    state = {name: joined([before[part] for part in parts]) for name, parts in names.items()}
    if len(names[cell.states[0]]) > 1:
        raise NotRecordable("an output of several parts")
    project = Products(cell, around)
    parts = {name: Value("gate", key=name) for name in gates}
    if around.norm_input:
        whole = Value("norm", parts.values(), key=(NORM_INPUT, len(parts)))
        project.norms.append(whole)
        parts = {name: Value("part", (whole,), key=k) for k, name in enumerate(parts)}
    x: Any = NamedGates(parts)
    if around.norm_input:
        x = cell.prepare(x, NoState())
    norm_cell: Any = project.norm_cell if around.norm_cell else identity
    cell.norm_cell = norm_cell
    after = flat_states(cell.step(x, cell.State(**state), project)._asdict(), names)
    if len({norm.key for norm in project.norms}) < len(project.norms):
        raise NotRecordable("a norm that a step takes more than once")
    if around.projected:
        after["h"] = Value("part", (Value("product", (after["h"],), key=PROJECTION),), key=0)
    for name in around.zoned:
        if len(names[name]) > 1:
            raise NotRecordable("zoneout of a state of several parts")
        after[name] = zone(name, before[name], after[name], around.zoneout)
    return Step(before, after, project.norms)


def parts_of(state: str, number: int) -> list[str]:
    """Names of the parts of a state, each of as many numbers as there are units."""
    return [state] if number == 1 else [f"{state} {index}" for index in range(number)]


def flat_states(states: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Value]:
    """The parts of all states by their names."""
    found: dict[str, Value] = {}
    for state, value in states.items():
        parts = value.parts if isinstance(value, Line) else (value,)
        if len(parts) != len(names[state]) or not all(isinstance(part, Value) for part in parts):
            raise NotRecordable("a state that is no tensor of its size")
        found |= zip(names[state], parts, strict=True)
    return found


def zone(name: str, old: Value, new: Value, share: float | None) -> Value:
    """Zoneout of a state, see :func:`~lightning_bln.recurrence.reference.zone`."""
    if share is None:
        return Value("lerp", (new, old, Value("kept", key=name)))
    return Value("blend", (old, new), (share, 1.0 - share))
