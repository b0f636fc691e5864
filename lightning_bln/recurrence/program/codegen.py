"""Instructions of the C++ library for a recorded step and its gradient, and the buffers that they read and write."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_bln.kernels.library import Instruction
from lightning_bln.recurrence.program.autodiff import Adjoint, differentiate
from lightning_bln.recurrence.program.graph import SUMS, Step, Value, merge_sums, ordered
from lightning_bln.recurrence.program.step import PROJECTION

OPERATIONS = (
    "product", *SUMS, "sigmoid_gradient", "tanh_gradient", "relu_gradient", "softplus_gradient", "hardsigmoid_gradient",
    "affine", "blend", "multiply", "addcmul", "lerp", "difference", "divide",
    "exp", "maximum", "maximum_gradient", "equals", "differs", "greater", "at_least", "less",
    "at_most", "where", "clamp_max", "clamp_max_gradient", "norm", "norm_gradient",
)  # fmt: skip
"""Operations in the order of ``Operation`` in ``csrc/program.h``."""

Buffer = tuple[str, Any]
"""Kind of a buffer, and its name or number among those of its kind."""


class Place(NamedTuple):
    """Position of a value in a buffer."""

    buffer: Buffer
    offset: int = 0
    """Gates before it in the last axis."""
    shift: int = 0
    """Steps between the current one and the row it lies in."""


ZERO = Place(("zero", 0))
NARROW = (("state", "h"), ("carry", "h"), ("kept", "h"), ("output", None), ("mask", None))
"""Values with as many features as the output has, where that is projected."""
LEAVES = ("state", "constant", "mask", "kept", "carry", "output")
WIDE = ("product", "norm")
"""Operations that compute several gates side by side."""


class Transposed(NamedTuple):
    """Key of a product of the gradient: the step's matrix, transposed, and the place of the gradient it multiplies."""

    matrix: Any
    gradient: Place


class NormGradient(NamedTuple):
    """Key of the gradient of a norm's input: the norm's number, places of its output's gradient and of its input."""

    norm: int
    gradient: Place
    input: Place


class Code(NamedTuple):
    """A list of instructions, which name places and matrices by their index here."""

    instructions: Any
    """A ctypes array of ``Instruction``."""
    places: tuple[Place, ...]
    matrices: tuple[tuple[str, Any], ...]
    """``"plain"`` or ``"transposed"``, and the matrix as in :class:`Product`."""
    registers: int
    """Scratch buffers of one step."""


class Product(NamedTuple):
    """A matrix product of the step, and the places from which its weights' gradient is computed."""

    matrix: Any
    """Index in ``cell.products``, or the name of the cell's own matrix."""
    width: int
    """Gates that it computes; zero for as many features as the output has."""
    input: Place
    gradient: Place
    """First gate of the product's gradient; the others follow."""


class GradientBuffer(NamedTuple):
    """A buffer of gradients of every step."""

    buffer: Buffer
    width: int
    """Gates in its last axis."""
    is_complete: bool
    """Whether the instructions write every gate; otherwise it must start at zero."""
    has_steps: bool = True
    """Whether what is written at a step is read when all have run."""


class Program(NamedTuple):
    """Instructions of a step and of its gradient."""

    forward: Code
    backward: Code
    products: tuple[Product, ...]
    norms: tuple[tuple[Any, int], ...]
    """Each norm's product, or the cell state's, and how many gates it takes."""
    tapes: int
    """Intermediate values kept of every step for the gradient, besides states, products and norms."""
    kept: frozenset[Buffer]
    """Products and norms kept of every step for the gradient."""
    reads: frozenset[Buffer]
    """Buffers that the gradient is computed from."""
    gradients: tuple[GradientBuffer, ...]
    states: frozenset[str]
    """States that the step depends on."""
    constants: frozenset[str]
    """The cell's own vectors that the step depends on."""


def generate_program(step: Step, layout: Mapping[str, Place], widths: Mapping[Any, int]) -> Program:
    """Instructions for a step and its gradient.

    Args:
        step: The recorded step; its graph is simplified in place.
        layout: Place of each gate of the input.
        widths: Gates of each of the cell's products, by index.
    """
    roots = [*step.after.values(), *step.norms]  # a norm observes, whether its result is used or not
    merge_sums(roots)
    adjoint = differentiate(step)
    values = ordered(roots)
    known = frozenset(values)
    merge_sums(adjoint.roots(), known)
    products = [value for value in values if value.op == "product"]
    norms = [value for value in values if value.op == "norm"]
    where = places_of_leaves(values, layout)
    where |= {value: Place((value.op, index)) for wide in (products, norms) for index, value in enumerate(wide)}
    where |= {value: part_of(value, where) for value in values if value.op == "part"}
    ends = [assign(value, Place(("state", name), 0, 1), where) for name, value in step.after.items()]
    users = [*ordered(adjoint.roots(), known), *products, *(norm for norm in norms if norm in adjoint.norms)]
    kept = dict.fromkeys(operand for user in users for operand in user.inputs if operand in known and operand.inputs)
    tapes = [value for value in kept if value not in where]
    where |= {value: Place(("tape", index)) for index, value in enumerate(tapes)}
    narrow = Narrow(any(value.key == PROJECTION for value in products))
    backward, learned, gradients = lower_adjoint(
        adjoint, list(step.before), (products, norms), layout, where, known, widths, narrow
    )
    return Program(
        forward=lower(ordered([*ends, *norms]), dict(where), narrow),
        backward=backward,
        products=learned,
        norms=tuple(value.key for value in norms),
        tapes=len(tapes),
        kept=frozenset(where[value].buffer for value in kept if value.op in ("part", *WIDE)),
        reads=frozenset(place.buffer for place in (*backward.places, *(one.input for one in learned))),
        gradients=gradients,
        states=frozenset(adjoint.state),
        constants=frozenset(adjoint.constants),
    )


def places_of_leaves(values: Iterable[Value], layout: Mapping[str, Place]) -> dict[Value, Place]:
    """Places of the values that are given, not computed."""
    where = {}
    for value in values:
        if value.op == "gate":
            where[value] = layout[value.key]
        elif value.op == "bias":
            where[value] = Place(("bias", value.key[0]), value.key[1])
        elif value.op in LEAVES:
            where[value] = Place((value.op, value.key))
    return where


def assign(value: Value, place: Place, where: dict[Value, Place]) -> Value:
    """Have ``value`` computed into a place; returns a copy of it that is, if the value already has another place."""
    if value in where:
        value = Value("sum", (value,))
    where[value] = place
    return value


def lower_adjoint(
    adjoint: Adjoint,
    states: Sequence[str],
    wide: tuple[Sequence[Value], Sequence[Value]],
    layout: Mapping[str, Place],
    where: Mapping[Value, Place],
    known: frozenset[Value],
    widths: Mapping[Any, int],
    narrow: Narrow,
) -> tuple[Code, tuple[Product, ...], tuple[GradientBuffer, ...]]:
    """Code, products and buffers of the gradient of a step whose ``known`` values have their places in ``where``.

    Products and norms of the step are ``wide``.
    """
    values, (products, norms) = ordered(adjoint.roots(), known), wide
    where = {**where, **places_of_leaves(values, layout)}
    gates = {name: Place(("gate_gradient", place.buffer[1]), place.offset) for name, place in layout.items()}
    for index, norm in enumerate(norms):
        if norm in adjoint.norms:
            first = norm.inputs[0]
            where[adjoint.norms[norm]] = gates[first.key] if first.op == "gate" else Place(("norm_gradient", index))
    where |= {value: part_of(value, where) for value in values if value.op == "part"}
    results = [
        value if where.get(value) == gates[name] else assign(value, gates[name], where)
        for name, value in adjoint.gates.items()
    ]
    results += [assign(value, Place(("constant_gradient", name)), where) for name, value in adjoint.constants.items()]
    buffers: list[GradientBuffer] = []
    for buffer in dict.fromkeys(place.buffer for place in gates.values()):
        names = [name for name, place in gates.items() if place.buffer == buffer]
        buffers.append(GradientBuffer(buffer, len(names), all(name in adjoint.gates for name in names)))
    buffers += [GradientBuffer(("constant_gradient", name), 1, True) for name in adjoint.constants]
    for index, norm in enumerate(norms):
        if norm in adjoint.norms:
            results += place_norm_gradient(adjoint, index, norm, where, buffers)
    found, of_all_steps = [], [one.buffer for one in buffers if one.has_steps]
    for index, product in enumerate(products):
        width, parts = widths.get(product.key, 1), adjoint.products.get(product, {})
        place = contiguous([where.get(parts[k]) if k in parts else None for k in range(width or 1)], of_all_steps)
        if place is None:
            place = Place(("product_gradient", index))
            parts = {k: assign(part, place._replace(offset=k), where) for k, part in parts.items()}
            results += parts.values()
            buffers.append(GradientBuffer(place.buffer, width, len(parts) == (width or 1)))
        found.append(Product(product.key, width, where[product.inputs[0]], place))
        for value in values:
            if value.op == "product" and value.key is product:
                value.key, value.inputs = Transposed(product.key, place), tuple(parts.values())
    order = with_carries(adjoint, states, results, where, known)
    return lower(order, where, narrow), tuple(found), tuple(buffers)


def place_norm_gradient(
    adjoint: Adjoint, index: int, norm: Value, where: dict[Value, Place], buffers: list[GradientBuffer]
) -> list[Value]:
    """Put the gradients of a norm's output side by side, and that of its input into a place of its own.

    Returns:
        What is computed for it.
    """
    value, parts, width, first = adjoint.norms[norm], adjoint.products[norm], norm.key[1], norm.inputs[0]
    places = [where.get(parts[k]) if k in parts else None for k in range(width)]
    place = contiguous(places, [one.buffer for one in buffers])
    if place is None:
        place = Place(("norm_output_gradient", index))
        parts = {k: assign(part, place._replace(offset=k), where) for k, part in parts.items()}
        buffers.append(GradientBuffer(place.buffer, width, len(parts) == width, has_steps=False))
    value.key, value.inputs = NormGradient(index, place, where[first]), (*parts.values(), *norm.inputs)
    if first.op != "gate":
        buffers.append(GradientBuffer(where[value].buffer, width, True, has_steps=first.op == "product"))
    return list(parts.values())


def part_of(value: Value, where: Mapping[Value, Place]) -> Place:
    """The place of one gate of what is computed side by side."""
    place = where[value.inputs[0]]
    return place._replace(offset=place.offset + value.key)


def with_carries(
    adjoint: Adjoint,
    states: Sequence[str],
    results: Sequence[Value],
    where: dict[Value, Place],
    known: frozenset[Value],
) -> list[Value]:
    """All values of the gradient in order, the states' gradients written over those that came from the next step."""
    last = {name: adjoint.state.get(name, Value("zero")) for name in states}
    # One that is an unchanged leaf is copied, since another may overwrite that leaf's place first.
    last = {name: value if value.inputs else Value("sum", (value,)) for name, value in last.items()}
    where |= {value.inputs[0]: ZERO for value in last.values() if value.inputs[0].op == "zero"}
    order = ordered([*results, *last.values()], known)
    for name, value in last.items():
        place = Place(("carry", name))
        own = next(index for index, one in enumerate(order) if one is value)
        read_later = (operand for user in order[own + 1 :] for operand in user.inputs)
        if value in where or any(where.get(operand) == place for operand in read_later):
            value = Value("sum", (value,))
            order.append(value)
        where[value] = place
    return order


def contiguous(places: Sequence[Place | None], among: Container[Buffer]) -> Place | None:
    """The first of ``places`` if they follow one another in one of these buffers, else ``None``."""
    first = places[0]
    if first is None or first.buffer not in among:
        return None
    return first if places == [first._replace(offset=first.offset + k) for k in range(len(places))] else None


class Narrow(dict[Value, bool]):
    """Whether a value has as many features as a projected output, by value; no value has without a projection."""

    def __init__(self, is_projected: bool) -> None:
        super().__init__()
        self.is_projected = is_projected

    def __missing__(self, value: Value) -> bool:
        if not self.is_projected:
            found = False
        elif value.op == "product":  # the gradient of a hidden product's input is one of the output
            is_transposed = isinstance(value.key, Transposed)
            found = isinstance(value.key.matrix, int) if is_transposed else value.key == PROJECTION
        elif value.inputs and value.op not in ("norm", "norm_gradient"):
            found = any(self[operand] for operand in value.inputs)
        else:
            found = (value.op, value.key) in NARROW
        self[value] = found
        return found


def joined_norms(before: list[Value], value: Value) -> tuple[list[Value], bool]:
    """Norms that a value continues, itself included, and whether it has to wait for one of them."""
    if value.op not in ("norm", "norm_gradient"):
        return [], False
    same = before if before and before[-1].op == value.op else []
    sources = [one.inputs[0] if one.op == "part" else one for one in value.inputs]
    needs = any(source is one for source in sources for one in same)
    return [value] if needs else [*same, value], needs


def lower(order: Iterable[Value], where: dict[Value, Place], narrow: Narrow) -> Code:
    """Instructions for values in order; a value without a place gets a register, which is reused after its last use."""
    order = [value for value in order if value.inputs and value.op != "part"]
    last_use = {operand: index for index, value in enumerate(order) for operand in value.inputs}
    places: dict[Place, int] = {ZERO: 0}
    matrices: dict[tuple[str, Any], int] = {}
    instructions, free, registers = [], [], 0
    together: list[Value] = []  # norms one after the other, whose moments threads exchange at once
    for index, value in enumerate(order):
        inputs, matrix = [where[operand] for operand in value.inputs], None
        released = [where[operand] for operand in dict.fromkeys(value.inputs) if last_use[operand] == index]
        released = [place for place in released if place.buffer[0] == "register"]
        if value.op == "product":
            is_transposed = isinstance(value.key, Transposed)
            matrix = ("transposed", value.key.matrix) if is_transposed else ("plain", value.key)
            inputs = [value.key.gradient if is_transposed else inputs[0]]
        elif value.op == "norm_gradient":
            inputs = [value.key.gradient, value.key.input]
        elif value.op == "norm":
            inputs = inputs[:1]
        else:  # elementwise, so that the result may overwrite an operand
            free += released
        if value not in where:
            if not free:
                free.append(Place(("register", registers)))
                registers += 1
            where[value] = free.pop()
        if matrix is not None or value.op in ("norm", "norm_gradient"):
            free += released
        inputs += [ZERO if value.op in SUMS else inputs[0]] * (3 - len(inputs))
        a, b, c = (places.setdefault(place, len(places)) for place in inputs)
        to = places.setdefault(where[value], len(places))
        if matrix is not None:
            c = matrices.setdefault(matrix, len(matrices))
        elif value.op in ("norm", "norm_gradient"):
            c = value.key.norm if value.op == "norm_gradient" else where[value].buffer[1]
        together, needs = joined_norms(together, value)
        if needs:
            value.numbers = (1.0, 0.0)
        operation = OPERATIONS.index(value.op)
        instructions.append(Instruction(operation, int(narrow[value]), to, a, b, c, *value.numbers))
    return Code((Instruction * len(instructions))(*instructions), tuple(places), tuple(matrices), registers)
