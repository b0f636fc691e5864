"""Graphs of elementwise operations, matrix products and norms, recorded by running code on their nodes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from lightning_bln._torch import is_autocast_enabled


class NotRecordable(Exception):
    """A step does something that has no instruction in a recorded program."""


class Unknown:
    """A size or the dtype of tensors, which a step may pass on, and not ask: it is recorded once for all."""

    def __init__(self, name: str) -> None:
        self.name = name

    def asked(self, *_: Any) -> Any:
        """Raise."""
        raise NotRecordable(f"what a step does depends on {self.name}")

    def __eq__(self, other: object) -> bool:
        return other is self or (other is not None and self.asked())

    __hash__ = object.__hash__
    __bool__ = __int__ = __index__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = asked
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __floordiv__ = __mod__ = asked


UNITS = "the number of units"


def cut_at(index: Any) -> tuple[Any, Any] | None:
    """Begin and end of ``[..., begin:end]``, sizes by their names; ``None`` for another index."""
    if not (isinstance(index, tuple) and len(index) == 2 and index[0] is Ellipsis and isinstance(index[1], slice)):
        return None
    ends = [one.name if isinstance(one, Unknown) else one for one in (index[1].start, index[1].stop)]
    return None if index[1].step is not None else (ends[0], ends[1])


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
    dtype = Unknown("a dtype")
    """That of all nodes."""

    def __init__(
        self, op: str, inputs: Iterable[Value] = (), numbers: tuple[float, float] = (0.0, 0.0), key: Any = None
    ) -> None:
        if not torch.is_grad_enabled() or is_autocast_enabled("cpu"):
            raise NotRecordable("what a step does without gradients, or under autocast")
        self.op, self.inputs, self.numbers, self.key = op, tuple(inputs), numbers, key

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:
        return operation(func.__name__)(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Value]:
        return partial(METHODS.get(name) or operation(name), self)

    def __eq__(self, other: object) -> Any:
        return compare("equals", self, other)

    def __ne__(self, other: object) -> Any:
        return compare("differs", self, other)

    def __gt__(self, other: Any) -> Value:
        return compare("greater", self, other)

    def __ge__(self, other: Any) -> Value:
        return compare("at_least", self, other)

    def __lt__(self, other: Any) -> Value:
        return compare("less", self, other)

    def __le__(self, other: Any) -> Value:
        return compare("at_most", self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise NotRecordable("what a step does depends on the values of a tensor")

    @property
    def shape(self) -> tuple[Unknown, Unknown]:
        """Numbers of samples and units, new at each call, so that no two compare as equal: a projection has its own."""
        return Unknown("the number of samples"), Unknown(UNITS)

    def __getitem__(self, index: Any) -> Value:
        if cut_at(index) == (None, UNITS):
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

    def __abs__(self) -> Value:
        return operation("abs")(self)

    def __pow__(self, other: Any) -> Value:
        return operation("pow")(self, other)

    def __neg__(self) -> Value:
        return mul(self, -1.0)

    def in_place(self, other: Any) -> Any:
        """Raise: what else refers to the tensor would change, too."""
        raise NotRecordable("a tensor changed in place")

    __radd__, __rmul__ = __add__, __mul__
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __setitem__ = in_place


class Line:
    """A state of several times as many numbers as there are units, such as a delay line: its parts side by side."""

    def __init__(self, parts: tuple[Value, ...]) -> None:
        self.parts = parts

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(func.__name__)(*args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Any:
        if cut_at(index) == (None, UNITS):
            return self.parts[0]
        if cut_at(index) == (UNITS, None):
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


def compare(name: str, x: Value, number: Any) -> Value:
    """One where a comparison with a number holds, else zero."""
    if not isinstance(number, int | float):
        raise NotRecordable("a comparison with something else than a number")
    return Value(name, (x,), (float(number), 0.0))


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
    """``log(1 + exp(x))``; above a threshold of 20, where torch returns ``x``, it differs by rounding only."""
    if beta != 1 or threshold < 20:
        raise NotRecordable("softplus with another beta or threshold")
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


def as_dtype(x: Value, dtype: Any) -> Value:
    """``x`` in the dtype that all nodes have."""
    if dtype is not Value.dtype:
        raise NotRecordable("another dtype")
    return x


def linear(x: Value, weight: Any, bias: Any = None) -> Value:
    """A product with one of the cell's own matrices."""
    if not isinstance(weight, Value) or weight.op != "matrix" or bias is not None:
        raise NotRecordable("a product with something else than a matrix of the cell")
    return Value("part", (Value("product", (x,), key=weight.key),), key=0)


COMPARISONS = {
    "equals": ("eq",),
    "differs": ("ne", "not_equal"),
    "greater": ("gt", "greater"),
    "at_least": ("ge", "greater_equal"),
    "less": ("lt", "less"),
    "at_most": ("le", "less_equal"),
}
"""Torch's names of each."""

OPERATIONS: dict[str, Callable[..., Any]] = {
    "sigmoid": lambda x: Value("sigmoid", (x,)),
    "tanh": lambda x: Value("tanh", (x,)),
    "relu": lambda x, inplace=False: x.in_place(x) if inplace else Value("relu", (x,)),
    "hardsigmoid": lambda x, inplace=False: x.in_place(x) if inplace else Value("hardsigmoid", (x,)),
    "exp": lambda x: Value("exp", (x,)),
    "to": lambda x, dtype: as_dtype(x, dtype),
    "div": Value.__truediv__,
    **{name: partial(compare, operation) for operation, names in COMPARISONS.items() for name in names},
    **{
        f.__name__: f for f in (add, sub, mul, addcmul, lerp, softplus, log_sigmoid, maximum, where, clamp, linear, cat)
    },
}


METHODS: dict[str, Callable[..., Any]] = {"where": lambda x, condition, y: where(condition, x, y)}
"""Methods that take their arguments in another order than the function of their name."""


def operation(name: str) -> Callable[..., Any]:
    """The recording of a torch function or tensor method by its name."""
    if name not in OPERATIONS:
        raise NotRecordable(f"{name} has no instruction")
    return OPERATIONS[name]


class Step(NamedTuple):
    """A recorded step: nodes of the states before and after it, and every norm that it takes."""

    before: dict[str, Value]
    after: dict[str, Value]
    norms: list[Value]


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
                index = next(place for place, one in enumerate(terms) if one is operand)
                terms[index : index + 1] = operand.inputs
        value.inputs = tuple(terms)
