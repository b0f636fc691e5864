"""A cell's step recorded as a graph of elementwise operations and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

from lightning_bln.cells.cell import Cell
from lightning_bln.recurrence.reference import identity


class NotRecordable(Exception):
    """A step does something that has no instruction in a recorded program."""


class Value:
    """Node of the graph: an operation on other nodes, or a leaf, with one number for every unit.

    Leaves are a ``gate`` of the input, a ``state`` before the step, a ``constant`` (a vector of the cell's own), the
    ``bias`` of one gate of a product, the ``mask`` that is applied before products, and for zoneout what is ``kept`` of
    a state. A ``product`` computes all the gates that it serves side by side, and a ``norm`` takes them so; each
    ``part`` of either is one gate.

    Torch functions and operators on nodes record an operation. ``numbers`` are its scalars ``s`` and ``u``; ``key``
    tells leaves, products and parts of a kind apart.
    """

    __slots__ = ("inputs", "key", "numbers", "op")
    dtype = None
    shape = ("samples", "units")  # names, so that a slice up to ``shape[-1]`` is known to be the whole

    def __init__(
        self, op: str, inputs: Iterable[Value] = (), numbers: tuple[float, float] = (0.0, 0.0), key: Any = None
    ) -> None:
        self.op, self.inputs, self.numbers, self.key = op, tuple(inputs), numbers, key

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:
        return operation(func.__name__)(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Value]:
        return partial(operation(name), self)

    def __eq__(self, other: object) -> Any:
        if isinstance(other, int | float):
            return Value("equals", (self,), (float(other), 0.0))
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise NotRecordable("what a step does depends on the values of a tensor")

    def __getitem__(self, index: Any) -> Value:
        if index == (Ellipsis, slice(self.shape[-1])):
            return self
        raise NotRecordable("an index into the units")

    def __add__(self, other: Any) -> Value:
        return add(self, other)

    def __sub__(self, other: Any) -> Value:
        return sub(self, other)

    def __rsub__(self, other: Any) -> Value:
        return sub(other, self)

    def __mul__(self, other: Any) -> Value:
        return mul(self, other)

    def __truediv__(self, other: Any) -> Value:
        return Value("divide", (self, other)) if is_value(other) else mul(self, 1.0 / other)

    def __neg__(self) -> Value:
        return mul(self, -1.0)

    __radd__, __rmul__ = __add__, __mul__


class Line(NamedTuple):
    """A state of several times as many numbers as there are units, such as a delay line: its parts side by side."""

    parts: tuple[Value, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(func.__name__)(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Any:
        first = Value.shape[-1]
        if index == (Ellipsis, slice(first)):
            return self.parts[0]
        if index == (Ellipsis, slice(first, None)):
            return joined(self.parts[1:])
        raise NotRecordable("an index into the units")


def joined(parts: Sequence[Value]) -> Value | Line:
    """Parts side by side; one is that part."""
    return parts[0] if len(parts) == 1 else Line(tuple(parts))


def cat(values: Sequence[Any], dim: int = 0) -> Value | Line:
    """States side by side."""
    if dim != -1:
        raise NotRecordable("cat along another axis than the last")
    return joined([part for value in values for part in (value.parts if isinstance(value, Line) else [value])])


def is_value(x: Any) -> bool:
    """Whether ``x`` is a node; raises unless it is that or a number."""
    if not isinstance(x, Value | int | float):
        raise NotRecordable(f"an operand of type {type(x).__name__}")
    return isinstance(x, Value)


def add(x: Any, y: Any, *, alpha: float = 1.0) -> Value:
    """``x + alpha y``."""
    if not is_value(y):
        return Value("affine", (x,), (1.0, alpha * y))
    if not is_value(x):
        return Value("affine", (y,), (alpha, x))
    return Value("sum", (x, y)) if alpha == 1 else Value("blend", (x, y), (1.0, alpha))


def sub(x: Any, y: Any, *, alpha: float = 1.0) -> Value:
    """``x - alpha y``."""
    return add(x, y, alpha=-alpha)


def mul(x: Any, y: Any) -> Value:
    """``x y``."""
    if is_value(x) and is_value(y):
        return Value("multiply", (x, y))
    return Value("affine", (x,), (y, 0.0)) if isinstance(x, Value) else Value("affine", (y,), (x, 0.0))


def addcmul(x: Value, y: Any, z: Any, *, value: float = 1.0) -> Value:
    """``x + value y z``."""
    if is_value(x) and is_value(y) and is_value(z):
        return Value("addcmul", (x, y, z), (value, 0.0))
    return add(x, mul(y, z), alpha=value)


def lerp(x: Any, y: Any, weight: Any) -> Value:
    """``x + weight (y - x)``."""
    if is_value(weight):
        return Value("lerp", (x, y, weight))
    return Value("blend", (x, y), (1.0 - weight, weight))


def softplus(x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    """``log(1 + exp(x))``; above ``threshold``, where torch returns ``x``, it differs by rounding only."""
    if beta != 1:
        raise NotRecordable("softplus with beta other than 1")
    return Value("softplus", (x,))


def log_sigmoid(x: Value) -> Value:
    """``-log(1 + exp(-x))``."""
    return -softplus(-x)


def maximum(x: Any, y: Any) -> Value:
    """The larger one."""
    if is_value(x) and is_value(y):
        return Value("maximum", (x, y))
    raise NotRecordable("a maximum with a number")


def where(condition: Any, x: Any, y: Any) -> Value:
    """``x`` where a comparison holds, else ``y``."""
    if is_value(condition) and is_value(x) and is_value(y):
        return Value("where", (condition, x, y))
    raise NotRecordable("a choice of numbers")


def clamp(x: Value, min: float | None = None, max: float | None = None) -> Value:
    """``x``, at most ``max``."""
    if min is not None or max is None or is_value(max):
        raise NotRecordable("clamp with another bound than max")
    return Value("clamp_max", (x,), (float(max), 0.0))


def linear(x: Value, weight: Any, bias: Any = None) -> Value:
    """A product with one of the cell's own matrices."""
    if not isinstance(weight, Value) or weight.op != "matrix" or bias is not None:
        raise NotRecordable("a product with something else than a matrix of the cell")
    return Value("part", (Value("product", (x,), key=weight.key),), key=0)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda x: Value("sigmoid", (x,)),
    "tanh": lambda x: Value("tanh", (x,)),
    "relu": lambda x, inplace=False: Value("relu", (x,)),
    "hardsigmoid": lambda x, inplace=False: Value("hardsigmoid", (x,)),
    "exp": lambda x: Value("exp", (x,)),
    "to": lambda x, dtype: x,
    "div": Value.__truediv__,
    **{
        f.__name__: f for f in (add, sub, mul, addcmul, lerp, softplus, log_sigmoid, maximum, where, clamp, linear, cat)
    },
}


def operation(name: str) -> Callable[..., Any]:
    """The recording of a torch function or tensor method by its name."""
    if name not in OPERATIONS:
        raise NotRecordable(f"{name} has no instruction")
    return OPERATIONS[name]


class NamedGates:
    """Recorded stand-in for :class:`~lightning_bln.cells.Gates`."""

    def __init__(self, parts: dict[str, Value]) -> None:
        self._parts = parts

    def __getattr__(self, name: str) -> Value:
        return self._parts[name]

    def __add__(self, other: NamedGates) -> NamedGates:
        if tuple(self._parts)[: len(other._parts)] != tuple(other._parts):
            raise NotRecordable("a sum of gates that are not the first")
        return NamedGates({name: self._parts[name] + part for name, part in other._parts.items()})

    def split(self) -> dict[str, Value]:
        """Each gate on its own."""
        return self._parts

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
        parts = {name: Value("part", (found,), key=k) for k, name in enumerate(names)}
        if self._options.biased and not self._options.normalized:  # a norm adds the bias itself
            parts = {name: part + Value("bias", key=(index, k)) for k, (name, part) in enumerate(parts.items())}
        return NamedGates(parts)


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


def norm_of_state(c: Value) -> Value:
    """A cell state normalised."""
    return Value("part", (Value("norm", (c,), key=(NORM_CELL, 1)),), key=0)


PROJECTION = "weight_hr"
"""The key of the output's product."""

NORM_INPUT, NORM_CELL = "input", "cell"
"""Keys of the norms of the input's product and of the cell state; those of hidden products have the product's index."""


class Step(NamedTuple):
    """A recorded step: nodes of the states before and after it."""

    before: dict[str, Value]
    after: dict[str, Value]


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
    norm_cell: Any = norm_of_state if around.norm_cell else identity
    cell.norm_cell = norm_cell
    names = {name: parts_of(name, cell.state_size(name, 1)) for name in cell.states}
    before = {name: Value("state", key=name) for parts in names.values() for name in parts}
    state = {name: joined([before[part] for part in parts]) for name, parts in names.items()}
    parts = {name: Value("gate", key=name) for name in gates}
    if around.norm_input:
        whole = Value("norm", parts.values(), key=(NORM_INPUT, len(parts)))
        parts = {name: Value("part", (whole,), key=k) for k, name in enumerate(parts)}
    x: Any = NamedGates(parts)
    if around.norm_input:
        x = cell.prepare(x, NoState())
    after = cell.step(x, cell.State(**state), Products(cell, around))._asdict()
    after = flat_states(after, names)
    norms = [value.key for value in ordered(after.values()) if value.op == "norm"]
    if len(set(norms)) < len(norms):
        raise NotRecordable("a norm that a step takes more than once")
    if around.projected:
        after["h"] = Value("part", (Value("product", (after["h"],), key=PROJECTION),), key=0)
    for name in around.zoned:
        after[name] = zone(name, before[name], after[name], around.zoneout)
    return Step(before, after)


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


def ordered(roots: Iterable[Value], known: Container[Value] = ()) -> list[Value]:
    """All nodes that ``roots`` depend on, inputs first; ``known`` nodes and what is behind them are left out."""
    found: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value not in found and value not in known:
            for operand in value.inputs:
                visit(operand)
            found[value] = None

    for root in roots:
        visit(root)
    return list(found)


SUMS = ("sum", "sigmoid", "tanh", "relu", "softplus", "hardsigmoid")
"""Operations that are applied to the sum of up to three operands."""


def merge_sums(roots: Iterable[Value], known: Container[Value] = ()) -> None:
    """Replace a sum by its terms where its only user sums its operands anyway: one instruction less."""
    roots = list(roots)
    values = ordered(roots, known)
    uses: dict[Value, int] = dict.fromkeys(roots, 1)
    for value in values:
        for operand in value.inputs:
            uses[operand] = uses.get(operand, 0) + 1
    for value in values:
        if value.op not in SUMS:
            continue
        terms = list(value.inputs)
        for operand in value.inputs:
            is_free = operand.op == "sum" and operand not in known and uses[operand] == 1
            if is_free and len(terms) - 1 + len(operand.inputs) <= 3:
                index = terms.index(operand)
                terms[index : index + 1] = operand.inputs
        value.inputs = tuple(terms)
