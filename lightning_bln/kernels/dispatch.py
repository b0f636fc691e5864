"""Operators on the C++ kernels, each described once: for autograd here, for torch's dispatcher in ``custom_ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS

I = TypeVar("I", bound=NamedTuple)  # noqa: E741
C = TypeVar("C", bound=NamedTuple)
S = TypeVar("S", bound=NamedTuple)


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

    def run(self, inputs: I, constants: C, settings: S) -> tuple[Tensor, ...]:
        """Run the registered operator where torch traces, else the eager one, which has less overhead."""
        if torch.compiler.is_compiling() and HAS_CUSTOM_OPS:
            numbers = [*settings]
            registered = getattr(torch.ops.lightning_bln, self.name)
            results = registered(*inputs, *constants, numbers[: self.integers], numbers[self.integers :])
            return results[: self.returned]
        return self.node.apply(self, settings, constants, *inputs)


class EagerFunction(torch.autograd.Function):
    """An operator as autograd sees it where nothing is traced."""

    @staticmethod
    def forward(
        ctx: Any, operator: Operator[Any, Any, Any], settings: Any, constants: Any, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs = operator.forward(operator.inputs(*inputs), constants, settings)
        ctx.operator, ctx.settings = operator, settings
        ctx.set_materialize_grads(False)
        if settings.keep:
            ctx.save_for_backward(*inputs, *constants, *outputs[operator.first_saved :])
        ctx.mark_non_differentiable(*outputs[operator.differentiable :])
        return outputs[: operator.returned]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operator, needs_grad = ctx.operator, ctx.needs_input_grad
        grads = grads[: operator.differentiable]
        if grads[0] is None and all(grad is None for grad in grads):
            return (None,) * len(needs_grad)
        inputs, constants, saved = operator.split(ctx.saved_tensors)
        found = operator.backward(grads, inputs, constants, ctx.settings, saved, needs_grad[3])
        return (None, None, None, *operator.as_gradients(found, inputs))


def present(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the inputs that are there and have elements, None for the others."""
    return [
        None if value is None or gradient.numel() == 0 else gradient
        for value, gradient in zip(inputs, gradients, strict=True)
    ]
