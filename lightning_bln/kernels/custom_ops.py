"""The compiled passes registered with torch's dispatcher, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bln.kernels import batch_layer_norm as dense_pass
from lightning_bln.kernels import recurrent as cpu

# The dispatcher knows no NamedTuple, so that each tensor stands by its name, in the order of Inputs and Constants.
INPUTS = (
    "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor h, Tensor? c, "
    "Tensor? weight_norm_ih, Tensor? weight_norm_hh, Tensor? weight_norm_cell, Tensor? bias_norm_cell"
)
CONSTANTS = (
    "Tensor? batch_sizes, Tensor? hidden_mask, Tensor? zoneout_mask, Tensor? mixing, Tensor? given_ih, "
    "Tensor? given_hh, Tensor? given_cell"
)
SETTINGS = "int[] integers, float[] numbers"
TENSORS = len(cpu.Inputs._fields)
FIXED = len(cpu.Constants._fields)


def results(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


@torch.library.custom_op(
    "lightning_bln::recurrence",
    mutates_args=(),
    schema=f"({INPUTS}, {CONSTANTS}, {SETTINGS}) -> {results(len(cpu.Outputs._fields))}",
)
def recurrence(*args: Any) -> tuple[Tensor, ...]:
    """One layer in one direction."""
    return tuple(cpu.forward(*unpack(args)))


@recurrence.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(cpu.allocate(*unpack(args)))


@torch.library.custom_op(
    "lightning_bln::recurrence_backward",
    mutates_args=(),
    schema=(
        f"(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, {INPUTS}, {CONSTANTS}, {SETTINGS}, Tensor[] outputs, "
        f"bool needs_x) -> {results(TENSORS)}"
    ),
)
def recurrence_backward(*args: Any) -> tuple[Tensor, ...]:
    """Its gradients."""
    *passed, outputs, needs_x = args
    return tuple(cpu.backward(passed[:3], *unpack(passed[3:]), cpu.Outputs(*outputs), needs_x))  # type: ignore[arg-type]


@recurrence_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    *passed, _, needs_x = args
    inputs, _, settings = unpack(passed[3:])
    return tuple(cpu.empty_gradients(inputs, settings, needs_x))  # type: ignore[arg-type]


def unpack(args: Sequence[Any]) -> tuple[cpu.Inputs, cpu.Constants, cpu.Settings]:
    """The operator's arguments by name."""
    tensors, fixed, (integers, numbers) = args[:TENSORS], args[TENSORS : TENSORS + FIXED], args[TENSORS + FIXED :]
    return cpu.Inputs(*tensors), cpu.Constants(*fixed), cpu.Settings.of(integers, numbers)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, integers, numbers = inputs
    ctx.settings = integers, numbers
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    count = TENSORS + FIXED
    tensors, outputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    found = recurrence_backward(*grads[:3], *tensors, *ctx.settings, list(outputs), ctx.needs_input_grad[0])
    inputs = cpu.Inputs(*tensors[:TENSORS])
    return (*cpu.as_gradients(found, inputs, cpu.Settings.of(*ctx.settings)), *[None] * (FIXED + 2))


recurrence.register_autograd(_backward, setup_context=_save)


DENSE = "Tensor x, Tensor? weight, Tensor? bias, Tensor mixing, Tensor? given, int[] integers, float[] numbers"


@torch.library.custom_op("lightning_bln::dense", mutates_args=(), schema=f"({DENSE}) -> (Tensor, Tensor)")
def dense(*args: Any) -> tuple[Tensor, Tensor]:
    """Batch layer normalization of an array."""
    return dense_pass.forward(*args[:5], dense_pass.DenseSettings(*args[5], *args[6]))  # type: ignore[call-arg]


@dense.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return dense_pass.allocate(args[0], dense_pass.DenseSettings(*args[5], *args[6]))


@torch.library.custom_op(
    "lightning_bln::dense_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {DENSE}, Tensor moments, bool needs_x) -> (Tensor, Tensor, Tensor)",
)
def dense_backward(*args: Any) -> tuple[Tensor, ...]:
    """Its gradients."""
    *passed, integers, numbers, moments, needs_x = args
    return dense_pass.backward(*passed, dense_pass.DenseSettings(*integers, *numbers), moments, needs_x)  # type: ignore[call-arg]


@dense_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return dense_pass.empty_gradients(*args[1:4], args[-1])  # type: ignore[call-arg]


def _save_dense(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, integers, numbers = inputs
    ctx.settings = integers, numbers
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward_dense(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    *tensors, moments = ctx.saved_tensors
    found = dense_backward(grad, *tensors, *ctx.settings, moments, ctx.needs_input_grad[0])
    return (*dense_pass.as_gradients(found), *[None] * 4)


dense.register_autograd(_backward_dense, setup_context=_save_dense)
