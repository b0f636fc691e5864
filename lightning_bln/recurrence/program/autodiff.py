"""The gradient of a recorded step by the chain rule, itself a graph of recorded operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lightning_bln.recurrence.program.graph import Step, Value, ordered


class Adjoint(NamedTuple):
    """Gradients of a step's leaves and products; what the step does not depend on is missing."""

    state: dict[str, Value]
    """Of the states before the step."""
    gates: dict[str, Value]
    constants: dict[str, Value]
    products: dict[Value, dict[int, Value]]
    """Of the parts of each product and norm."""
    norms: dict[Value, Value]
    """Of the input of each norm."""

    def roots(self) -> list[Value]:
        """All gradients, to walk the graph from."""
        parts = [part for parts in self.products.values() for part in parts.values()]
        return [*self.gates.values(), *self.constants.values(), *self.state.values(), *parts]


def differentiate(step: Step) -> Adjoint:
    """The gradient of a step.

    Its leaves are ``carry``, the gradient of a state after the step from the steps that follow, and ``output``, that of
    the step's output; besides, it reads values of the step itself.
    """
    gradients: dict[Value, Value] = {}
    products: dict[Value, dict[int, Value]] = {}
    norms: dict[Value, Value] = {}

    def accumulate(value: Value, gradient: Value) -> None:
        sum_so_far = gradients.get(value)
        gradients[value] = gradient if sum_so_far is None else plus(sum_so_far, gradient)

    for index, (name, value) in enumerate(step.after.items()):
        accumulate(value, Value("carry", key=name))
        if index == 0:
            accumulate(value, Value("output"))
    for value in reversed(ordered(step.after.values())):
        gradient = gradients.get(value)
        if value.op == "product":
            if value in products:
                accumulate(value.inputs[0], Value("product", products[value].values(), key=value))
        elif value.op == "norm":
            if value in products:
                of_input = Value("norm_gradient", (*products[value].values(), *value.inputs), key=value)
                parts = [Value("part", (of_input,), key=k) for k in range(value.key[1])]
                norms[value] = of_input
                if value.inputs[0].op == "product":
                    products[value.inputs[0]] = dict(enumerate(parts))
                else:
                    for operand, part in zip(value.inputs, parts, strict=True):
                        accumulate(operand, part)
        elif gradient is None:
            continue
        elif value.op == "part":
            products.setdefault(value.inputs[0], {})[value.key] = gradient
        else:
            for operand, its_gradient in chain_rule(value, gradient):
                accumulate(operand, its_gradient)

    def of_leaves(op: str) -> dict[str, Value]:
        return {value.key: gradient for value, gradient in gradients.items() if value.op == op}

    return Adjoint(of_leaves("state"), of_leaves("gate"), of_leaves("constant"), products, norms)


def plus(x: Value, y: Value) -> Value:
    """``x + y``, one instruction even where ``y`` is an elementwise product."""
    return Value("addcmul", (x, *y.inputs), (1.0, 0.0)) if y.op == "multiply" else Value("sum", (x, y))


def scaled(x: Value, factor: float) -> Value:
    """``factor x``."""
    return x if factor == 1 else Value("affine", (x,), (factor, 0.0))


def times(x: Value, y: Value) -> Value:
    """``x y``."""
    return Value("multiply", (x, y))


def chain_rule(value: Value, gradient: Value) -> Iterator[tuple[Value, Value]]:
    """Each operand of ``value`` with its share of the gradient of ``value``."""
    s, u = value.numbers
    match value.op, value.inputs:
        case "sum", terms:
            yield from ((term, gradient) for term in terms)
        case "sigmoid" | "tanh" | "relu" | "softplus" | "hardsigmoid", terms:
            of_sum = Value(f"{value.op}_gradient", (gradient, value))
            yield from ((term, of_sum) for term in terms)
        case "affine", (x,):
            yield x, scaled(gradient, s)
        case "blend", (x, y):
            yield x, scaled(gradient, s)
            yield y, scaled(gradient, u)
        case "multiply", (x, y):
            yield x, times(gradient, y)
            yield y, times(gradient, x)
        case "addcmul", (x, y, z):
            yield x, gradient
            yield y, times(scaled(gradient, s), z)
            yield z, times(scaled(gradient, s), y)
        case "lerp", (x, y, weight):
            of_y = times(gradient, weight)
            yield y, of_y
            yield x, Value("blend", (gradient, of_y), (1.0, -1.0))
            yield weight, Value("difference", (gradient, y, x))
        case "divide", (x, y):
            of_x = Value("divide", (gradient, y))
            yield x, of_x
            yield y, scaled(times(of_x, value), -1.0)
        case "exp", (x,):
            yield x, times(gradient, value)
        case "maximum", (x, y):
            yield x, Value("maximum_gradient", (gradient, x, y))
            yield y, Value("maximum_gradient", (gradient, y, x))
        case "where", (condition, x, y):
            of_x = times(gradient, condition)
            yield x, of_x
            yield y, Value("blend", (gradient, of_x), (1.0, -1.0))
        case "clamp_max", (x,):
            yield x, Value("clamp_max_gradient", (gradient, x), (s, u))
