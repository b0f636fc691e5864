"""A recorded step and its gradient as instructions for the compiled library, and the places they read and write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_bln.kernels.library import Instruction
from lightning_bln.recurrence.program.autodiff import Adjoint, differentiate
from lightning_bln.recurrence.program.graph import SUMS, Step, Value, merge_sums, ordered

OPERATIONS = (
    "product", *SUMS, "sigmoid_gradient", "tanh_gradient", "relu_gradient", "softplus_gradient", "hardsigmoid_gradient",
    "affine", "blend", "multiply", "fused", "lerp", "difference", "divide",
)  # fmt: skip
"""In the order of ``Operation`` in ``csrc/program.h``."""


class Place(NamedTuple):
    """Where the units of a step and a sequence lie."""

    buffer: tuple[str, Any]
    """Its kind and its name or number."""
    offset: int = 0
    """In gates."""
    shift: int = 0
    """In steps."""


ZERO = Place(("zero", 0))
LEAVES = ("state", "constant", "mask", "carry", "output")


class Transposed(NamedTuple):
    """The matrix of a product in its gradient, and where that lies."""

    matrix: Any
    gradient: Place


class Code(NamedTuple):
    """Instructions, which name places and matrices by their index here."""

    instructions: Any
    places: tuple[Place, ...]
    matrices: tuple[Any, ...]
    registers: int


class Product(NamedTuple):
    """A product of the step, and what its weights' gradient is made of."""

    matrix: Any
    """The index of the cell's product, or the name of the cell's own matrix."""
    width: int
    """In gates."""
    input: Place
    gradient: Place
    """Of the product, all gates side by side."""


class Program(NamedTuple):
    """A step forward and backwards."""

    forward: Code
    backward: Code
    products: tuple[Product, ...]
    tapes: int
    """How many values of every step are kept for the gradient, besides states and products."""
    kept_products: frozenset[int]
    """Which products are."""
    reads: frozenset[tuple[str, Any]]
    """What the gradient is computed from."""
    gradients: tuple[tuple[tuple[str, Any], int, bool], ...]
    """Buffers of gradients of every step, how many gates wide they are, and whether they are written as a whole."""
    states: frozenset[str]
    """States that the step depends on."""
    constants: frozenset[str]
    """The same for vectors of the cell's own."""


def compile_step(step: Step, layout: Mapping[str, Place], widths: Mapping[Any, int]) -> Program:
    """Instructions for a step and its gradient.

    Args:
        step: The recorded step.
        layout: Where each gate of the input lies.
        widths: Gates of each of the cell's products.
    """
    merge_sums(step.after.values())
    adjoint = differentiate(step)
    values = ordered(step.after.values())
    known = frozenset(values)
    merge_sums(adjoint.roots(), known)
    products = [value for value in values if value.op == "product"]
    where = leaves(values, layout)
    where |= {value: Place(("product", index)) for index, value in enumerate(products)}
    where |= {value: where[value.inputs[0]]._replace(offset=value.key) for value in values if value.op == "part"}
    ends = [place(value, Place(("state", name), 0, 1), where) for name, value in step.after.items()]
    users = [*ordered(adjoint.roots(), known), *products]
    kept = dict.fromkeys(one for value in users for one in value.inputs if one in known and one.inputs)
    tapes = [value for value in kept if value not in where]
    where |= {value: Place(("tape", index)) for index, value in enumerate(tapes)}
    lowered = lower_adjoint(adjoint, list(step.before), products, layout, where, known, widths)
    return Program(
        forward=lower(ordered(ends), dict(where)),
        backward=lowered.code,
        products=lowered.products,
        tapes=len(tapes),
        kept_products=frozenset(where[value].buffer[1] for value in kept if value.op == "part"),
        reads=frozenset(at.buffer for at in (*lowered.code.places, *(one.input for one in lowered.products))),
        gradients=lowered.buffers,
        states=frozenset(adjoint.state),
        constants=frozenset(adjoint.constants),
    )


def leaves(values: Iterable[Value], layout: Mapping[str, Place]) -> dict[Value, Place]:
    """Where values lie that are given."""
    where = {}
    for value in values:
        if value.op == "gate":
            where[value] = layout[value.key]
        elif value.op == "bias":
            where[value] = Place(("bias", value.key[0]), value.key[1])
        elif value.op in LEAVES:
            where[value] = Place((value.op, value.key))
    return where


def place(value: Value, at: Place, where: dict[Value, Place]) -> Value:
    """What lies at a place with the number of ``value``: itself, or a copy where it already lies elsewhere."""
    if value in where:
        value = Value("sum", (value,))
    where[value] = at
    return value


class Lowered(NamedTuple):
    """The gradient of a step, see :class:`Program`."""

    code: Code
    products: tuple[Product, ...]
    buffers: tuple[tuple[tuple[str, Any], int, bool], ...]


def lower_adjoint(
    adjoint: Adjoint,
    states: Sequence[str],
    products: Sequence[Value],
    layout: Mapping[str, Place],
    where: Mapping[Value, Place],
    known: frozenset[Value],
    widths: Mapping[Any, int],
) -> Lowered:
    """Instructions for the gradient, ``where`` telling where the values of the step lie."""
    values = ordered(adjoint.roots(), known)
    where = {**where, **leaves(values, layout)}
    gates = {name: Place(("gate_gradient", at.buffer[1]), at.offset) for name, at in layout.items()}
    slots = [place(value, gates[name], where) for name, value in adjoint.gates.items()]
    slots += [place(value, Place(("constant_gradient", name)), where) for name, value in adjoint.constants.items()]
    buffers: list[tuple[tuple[str, Any], int, bool]] = []
    for buffer in dict.fromkeys(at.buffer for at in gates.values()):
        names = [name for name, at in gates.items() if at.buffer == buffer]
        buffers.append((buffer, len(names), all(name in adjoint.gates for name in names)))
    buffers += [(("constant_gradient", name), 1, True) for name in adjoint.constants]
    found = []
    for index, product in enumerate(products):
        width, parts = widths.get(product.key, 1), adjoint.products.get(product, {})
        at = beside([where.get(parts[k]) if k in parts else None for k in range(width)])
        if at is None:
            at = Place(("product_gradient", index))
            parts = {k: place(part, at._replace(offset=k), where) for k, part in parts.items()}
            slots += parts.values()
            buffers.append((at.buffer, width, len(parts) == width))
        found.append(Product(product.key, width, where[product.inputs[0]], at))
        for value in values:
            if value.op == "product" and value.key is product:
                value.key, value.inputs = Transposed(product.key, at), tuple(parts.values())
    # A state's gradient that is another's as it came is set aside before that one is overwritten.
    last = {name: adjoint.state.get(name, Value("zero")) for name in states}
    last = {name: value if value.inputs else Value("sum", (value,)) for name, value in last.items()}
    where |= {value.inputs[0]: ZERO for value in last.values() if value.inputs[0].op == "zero"}
    order = ordered([*slots, *last.values()], known)
    for name, value in last.items():
        at = Place(("carry", name))
        later = (one for user in order[order.index(value) + 1 :] for one in user.inputs)
        if value in where or any(where.get(one) == at for one in later):
            value = Value("sum", (value,))
            order.append(value)
        where[value] = at
    return Lowered(lower(order, where), tuple(found), tuple(buffers))


def beside(places: Sequence[Place | None]) -> Place | None:
    """Where values lie side by side, in this order; ``None`` if they do not."""
    first = places[0]
    if first is None or first.buffer[0] != "gate_gradient":
        return None
    return first if places == [first._replace(offset=first.offset + k) for k in range(len(places))] else None


def lower(order: Iterable[Value], where: dict[Value, Place]) -> Code:
    """Instructions for values in order; those that have no place yet get a register."""
    order = [value for value in order if value.inputs and value.op != "part"]
    last_use = {one: index for index, value in enumerate(order) for one in value.inputs}
    places: dict[Place, int] = {ZERO: 0}
    matrices: dict[Any, int] = {}
    instructions, free, registers = [], [], 0
    for index, value in enumerate(order):
        inputs, matrix = [where[one] for one in value.inputs], None
        released = [where[one] for one in dict.fromkeys(value.inputs) if last_use[one] == index]
        released = [at for at in released if at.buffer[0] == "register"]
        if value.op == "product":
            is_transposed = isinstance(value.key, Transposed)
            matrix = ("transposed", value.key.matrix) if is_transposed else ("plain", value.key)
            inputs = [value.key.gradient if is_transposed else inputs[0]]
        else:  # which goes through units one by one, and may overwrite what it reads
            free += released
        if value not in where:
            if not free:
                free.append(Place(("register", registers)))
                registers += 1
            where[value] = free.pop()
        if matrix is not None:
            free += released
        inputs += [ZERO if value.op in SUMS else inputs[0]] * (3 - len(inputs))
        a, b, c = (places.setdefault(one, len(places)) for one in inputs)
        to = places.setdefault(where[value], len(places))
        if matrix is not None:
            c = matrices.setdefault(matrix, len(matrices))
        instructions.append(Instruction(OPERATIONS.index(value.op), to, a, b, c, *value.numbers))
    return Code((Instruction * len(instructions))(*instructions), tuple(places), tuple(matrices), registers)
