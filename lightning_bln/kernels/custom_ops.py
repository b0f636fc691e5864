"""The operators registered with torch's dispatcher, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bln.kernels import batch_layer_norm, recurrent
from lightning_bln.kernels.dispatch import Operator
from lightning_bln.kernels.triton.dense import TRITON_NORM


def register(operator: Operator) -> tuple[Any, Any]:
    """Register the forward and the backward pass of an operator as ``lightning_bln::name`` and ``::name_backward``."""
    arguments = f"{operator.schema}, SymInt[] integers, float[] numbers"
    gradients = len(operator.inputs._fields)
    tensors = gradients + len(operator.constants._fields)
    as_list = operator.saved.startswith("Tensor[]")

    def unpack(args: Sequence[Any]) -> tuple[Any, Any, Any]:
        inputs, constants, (integers, numbers) = operator.split(args)
        return inputs, constants, operator.settings(*integers, *numbers)

    def unpack_backward(args: Sequence[Any]) -> tuple[Any, ...]:
        grads, rest = args[: operator.differentiable], args[operator.differentiable :]
        *saved, needs_x = rest[tensors + 2 :]
        return grads, *unpack(rest[: tensors + 2]), saved[0] if as_list else saved, needs_x

    def fake_backward(*args: Any) -> tuple[Tensor, ...]:
        _, inputs, _, settings, _, needs_x = unpack_backward(args)
        return tuple(operator.empty_gradients(inputs, settings, needs_x))

    def save(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.settings = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *output[operator.first_saved :])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grads = grads[: operator.differentiable]
        if all(grad is None for grad in grads):
            return (None,) * (tensors + 2)
        inputs, constants, saved = operator.split(ctx.saved_tensors)
        passed = [[*saved]] if as_list else saved
        found = backward(*grads, *inputs, *constants, *ctx.settings, *passed, ctx.needs_input_grad[0])
        return (*operator.as_gradients(found, inputs), *[None] * (tensors + 2 - gradients))

    forward = define(
        operator.name,
        f"({arguments}) -> {results(operator.outputs)}",
        lambda *args: tuple(operator.forward(*unpack(args))),
        lambda *args: tuple(operator.allocate(*unpack(args))),
    )
    backward = define(
        f"{operator.name}_backward",
        f"({operator.gradients}, {arguments}, {operator.saved}, bool needs_x) -> {results(gradients)}",
        lambda *args: tuple(operator.backward(*unpack_backward(args))),
        fake_backward,
    )
    forward.register_autograd(differentiate, setup_context=save)
    return forward, backward


def define(
    name: str, schema: str, run: Callable[..., tuple[Tensor, ...]], allocate: Callable[..., tuple[Tensor, ...]]
) -> Any:
    """One operator of the dispatcher; torch has no public name for its type."""
    defined = torch.library.custom_op(f"lightning_bln::{name}", run, mutates_args=(), schema=schema)
    defined.register_fake(allocate)
    if hasattr(defined, "register_vmap"):
        defined.register_vmap(partial(one_by_one, defined))
    return defined


def one_by_one(operator: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """Batching rule of an operator: its results for each entry of the batch, stacked."""
    calls = []
    for index in range(info.batch_size):
        pairs = zip(args, in_dims, strict=True)
        calls.append(operator(*(value if dim is None else select(value, dim, index) for value, dim in pairs)))
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


def select(value: Any, dim: Any, index: int) -> Any:
    """One entry of a batched tensor, or of each tensor of a list."""
    if isinstance(value, Tensor):
        return value.select(dim, index)
    return [one if d is None else one.select(d, index) for one, d in zip(value, dim, strict=True)]


def results(count: int) -> str:
    """Schema of what an operator returns."""
    return f"({', '.join(['Tensor'] * count)})"


recurrence, recurrence_backward = register(recurrent.RECURRENCE)
dense, dense_backward = register(batch_layer_norm.DENSE)
triton_norm, triton_norm_backward = register(TRITON_NORM)
