"""Operators on the C++ kernels, each described once: for autograd here, for torch's dispatcher in ``custom_ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS, is_observed, is_ordinary

I = TypeVar("I", bound=NamedTuple)  # noqa: E741
C = TypeVar("C", bound=NamedTuple)
S = TypeVar("S", bound=NamedTuple)


Reference = Callable[[Any, Any, Any], Sequence[Tensor]]
"""Differentiable outputs of an operator by torch operations, from its inputs, constants and settings."""


@dataclass(frozen=True, eq=False)
class Operator(Generic[I, C, S]):
    """A forward and a backward pass of the library.

    The dispatcher takes no NamedTuples: a registered operator has the fields of ``inputs`` and ``constants`` as
    arguments, then ``settings`` as two lists.
    """

    name: str
    inputs: type[I]
    """Tensors that have a gradient, the layer's input first."""
    constants: type[C]
    """Tensors that have none."""
    settings: type[S]
    """Numbers, integers first. ``keep`` among them is 0 where no gradient will follow."""
    integers: int
    """How many of them are integers."""

    outputs: int
    """How many tensors the forward pass returns."""
    returned: int
    """How many of them its caller gets."""
    gradients: str
    """Schema of the gradients of the first outputs; the others have none."""
    saved: str
    """Schema of the outputs that the backward pass reads, the last ones: one by one, or all as a list."""
    first_saved: int

    forward: Callable[[I, C, S], tuple[Tensor, ...]]
    allocate: Callable[[I, C, S], tuple[Tensor, ...]]
    """Empty outputs."""
    backward: Callable[[Sequence[Tensor | None], I, C, S, Sequence[Tensor], bool], I]
    """From gradients of outputs, the arguments, saved outputs, and whether ``x`` needs a gradient: those of ``inputs``,
    without elements where there is none."""
    empty_gradients: Callable[[I, S, bool], I]
    as_gradients: Callable[[Sequence[Tensor], I], list[Tensor | None]]
    """What autograd takes, made of what ``backward`` returns and of the inputs."""

    node: type[EagerFunction]
    """Names the operator in autograd's graph."""

    @property
    def schema(self) -> str:
        """Of the fields of ``inputs`` and ``constants``."""
        fields = get_type_hints(self.inputs) | get_type_hints(self.constants)
        return ", ".join(f"Tensor{'' if kind is Tensor else '?'} {name}" for name, kind in fields.items())

    @property
    def differentiable(self) -> int:
        """Number of outputs that have a gradient."""
        return self.gradients.count(",") + 1

    @property
    def bounds(self) -> tuple[int, int]:
        """End of the inputs and end of the constants among the operator's arguments."""
        return len(self.inputs._fields), len(self.inputs._fields) + len(self.constants._fields)

    def split(self, tensors: Sequence[Any]) -> tuple[I, C, Sequence[Any]]:
        """Inputs, constants and what comes after them."""
        first, second = self.bounds
        return self.inputs(*tensors[:first]), self.constants(*tensors[first:second]), tensors[second:]

    def run(self, inputs: I, constants: C, settings: S, reference: Reference) -> tuple[Tensor, ...]:
        """Run the registered operator where torch compiles, else the eager one, which has less overhead.

        Args:
            inputs: Tensors that have a gradient.
            constants: Tensors that have none.
            settings: Numbers.
            reference: The operator by torch operations, for gradients that have gradients themselves. It holds no
                tensors: those that are saved are under autograd's eyes.
        """
        if torch.compiler.is_compiling() and HAS_CUSTOM_OPS:
            numbers = [*settings]
            registered = getattr(torch.ops.lightning_bln, self.name)
            results = registered(*inputs, *constants, numbers[: self.integers], numbers[self.integers :])
            return results[: self.returned]
        if not settings.keep:  # type: ignore[attr-defined]
            return self.forward(inputs, constants, settings)[: self.returned]
        return self.node.apply(self, reference, settings, constants, *inputs)


AnyOperator = Operator[Any, Any, Any]


class EagerFunction(torch.autograd.Function):
    """An operator as autograd sees it where nothing is traced."""

    @staticmethod
    def forward(
        ctx: Any, operator: AnyOperator, reference: Reference, settings: Any, constants: Any, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs = operator.forward(operator.inputs(*inputs), constants, settings)
        ctx.operator, ctx.reference, ctx.settings = operator, reference, settings
        ctx.set_materialize_grads(False)
        if settings.keep:
            ctx.save_for_backward(*inputs, *constants, *outputs[operator.first_saved :])
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])
        return outputs[: operator.returned]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, needs_grad = ctx.operator, ctx.needs_input_grad
        grads = grads[: operator.differentiable]
        if all(grad is None for grad in grads):
            return (None,) * len(needs_grad)
        inputs, constants, saved = operator.split(ctx.saved_tensors)
        if torch.is_grad_enabled() or is_observed() or not all(map(is_ordinary, grads)):
            reference, settings = ctx.reference, ctx.settings
            found = gradients_on_torch(
                lambda *own: reference(operator.inputs(*own), constants, settings), inputs, grads
            )
            return (None, None, None, None, *found)
        results = operator.backward(grads, inputs, constants, ctx.settings, saved, needs_grad[4])
        return (None, None, None, None, *operator.as_gradients(results, inputs))


def gradients_on_torch(
    reference: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``inputs``, computed on torch operations, so that they have gradients and transforms see them.

    Args:
        reference: Differentiable outputs as a function of ``inputs``, given one by one.
        inputs: Tensors, of which some need a gradient.
        grads: Gradients of the outputs.
    """
    keeps_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Views, since an input may be computed from another one, whose gradient must not include its own.
        own = [value if value is None else value.view_as(value) if keeps_graph else leaf(value) for value in inputs]
        pairs = zip(reference(*own), grads, strict=False)
        ends = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
        needed = [value for value in own if value is not None and value.requires_grad]
        found = iter(gradients(ends, needed, create_graph=keeps_graph))
    return [next(found) if value is not None and value.requires_grad else None for value in own]


def gradients(
    ends: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor], create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Gradients of ``inputs`` from those of the ends of a graph, each given beside its own."""
    if not ends or not inputs:
        return [None] * len(inputs)
    values, given = zip(*ends, strict=True)
    return torch.autograd.grad(values, inputs, given, create_graph=create_graph, allow_unused=True)


def leaf(value: Tensor) -> Tensor:
    """``value`` without its history."""
    return value.detach().requires_grad_(value.requires_grad)


def present(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the inputs that are there and have elements, None for the others."""
    return [
        None if value is None or gradient.numel() == 0 else gradient
        for value, gradient in zip(inputs, gradients, strict=True)
    ]
