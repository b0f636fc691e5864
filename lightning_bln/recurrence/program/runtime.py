"""The recurrence of any recorded cell as one differentiable operation on the C++ library."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.kernels.library import DTYPES, is_built
from lightning_bln.kernels.matmul import multiply
from lightning_bln.recurrence.program.buffers import (
    Buffers,
    Shape,
    dense_features,
    execute,
    gradient_buffers,
    input_buffers,
    matrices,
    result_buffers,
    rows_of_all_steps,
)
from lightning_bln.recurrence.program.recording import RecordedCell, Signature, Tensors, options_of, record
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, identity, unroll
from lightning_bln.recurrence.sequences import lengths_of


def recorded_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result | None:
    """:func:`~lightning_bln.recurrence.reference.recurrence` by a recorded program; ``None`` if there is none."""
    if not is_supported(sequences, weights, noise):
        return None
    x = cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), cell.State(*sequences.state))
    segments = x.segments()
    dtype, units = sequences.x.dtype, sequences.x.shape[-1]
    constants = {name: getattr(cell, name) for name in cell.parameters}
    options = options_of(cell)
    if options is None or any(value.shape not in ((1,), (units,), (units, units)) for value in constants.values()):
        return None
    signature = Signature(
        tuple(segments),
        tuple((name, value.ndim) for name, value in constants.items()),
        weights.bias_hh is not None,
        noise.hidden_mask is not None,
    )
    recorded = record(cast(Hashable, type(cell)), options, signature)
    if recorded is None:
        return None
    tensors = Tensors(
        tuple(dense_features(value.to(dtype)) for value in segments.values()),
        tuple(dense_features(value) for value in sequences.state),
        None if weights.weight_hh is None else dense_features(cell.act(weights.weight_hh)),
        None if weights.bias_hh is None else dense_features(weights.bias_hh),
        tuple((v.expand(units) if v.ndim == 1 else v).to(dtype).contiguous() for v in constants.values()),
        None if noise.hidden_mask is None else noise.hidden_mask.contiguous(),
    )
    outputs, *state = RecordedRecurrence.apply(recorded, sequences.sizes, *tensors.flat())
    return Result(outputs, tuple(state), (), None)


def is_supported(sequences: Sequences, weights: HiddenWeights, noise: Noise) -> bool:
    """Whether recorded programs run a recurrence of this kind: on the CPU, without norms, projection and zoneout."""
    x, state = sequences.x, sequences.state
    parameters = [value for value in (weights.weight_hh, weights.bias_hh) if value is not None]
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.ndim == 4
        and not torch.compiler.is_compiling()
        and not weights.norm_hh
        and weights.norm_cell is None
        and weights.weight_hr is None
        and not noise.zoneout
        and all(value.dtype == x.dtype for value in (*state, *parameters))
        and all(value.shape == (x.shape[1], x.shape[3]) for value in state)
        and is_built()
    )


class RecordedRecurrence(torch.autograd.Function):
    """A recorded program run over all steps; gradients of its gradient are taken on torch operations."""

    @staticmethod
    def forward(
        ctx: Any, recorded: RecordedCell, running: list[int] | None, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Outputs and last states, from the running sequences of each step and :class:`Tensors`."""
        tensors, program = recorded.tensors(flat), recorded.program
        keep = any(ctx.needs_input_grad)
        samples, units = tensors.state[0].shape
        shape = Shape(tensors.x[0].shape[0], samples, units, running)
        buffers = input_buffers(recorded, tensors) | result_buffers(recorded, tensors, shape, keep)
        execute(program.forward, buffers, matrices(recorded, tensors), shape, reverse=False)
        states = [buffers["state", name] for name in recorded.cell.states]
        if keep:
            kept = {name: value for name, value in buffers.items() if name in program.reads}
            ctx.recorded, ctx.shape, ctx.names = recorded, shape, tuple(kept)
            ctx.save_for_backward(*flat, *kept.values())
            ctx.set_materialize_grads(False)
        if running is None:
            return states[0][1:], *(value[-1].clone() for value in states)
        lengths = lengths_of(torch.tensor(running))
        return states[0][1:], *(value[lengths, torch.arange(samples)] for value in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        saved, recorded, shape = ctx.saved_tensors, ctx.recorded, ctx.shape
        flat = saved[: len(saved) - len(ctx.names)]
        if torch.is_grad_enabled():
            return None, None, *gradients_on_torch(recorded, flat, shape.running, gradients)
        buffers: Buffers = dict(zip(ctx.names, saved[len(flat) :], strict=True))
        tensors = recorded.tensors(flat)
        buffers |= gradient_buffers(recorded, tensors.state[0], shape, gradients)
        execute(recorded.program.backward, buffers, matrices(recorded, tensors), shape, reverse=True)
        return None, None, *collected_gradients(recorded, tensors, buffers, shape)


def collected_gradients(
    recorded: RecordedCell, tensors: Tensors, buffers: Buffers, shape: Shape
) -> list[Tensor | None]:
    """Gradients of all tensors from the buffers that the backward instructions have written."""
    (program, signature), states = (recorded.program, recorded.signature), recorded.cell.states
    constants = {
        name: buffers["constant_gradient", name].sum((0, 1)) if name in program.constants else None
        for name, _ in signature.constants
    }
    products = product_gradients(recorded, buffers, shape)
    constants |= {name: weight for name, (weight, _) in products.items() if isinstance(name, str)}
    weight, bias = hidden_gradients(recorded, tensors, products, shape)
    return [
        *(buffers["gate_gradient", index] for index in range(len(signature.segments))),
        *(buffers["carry", name] if name in program.states else None for name in states),
        weight,
        bias,
        *constants.values(),
        None,
    ]


def product_gradients(recorded: RecordedCell, buffers: Buffers, shape: Shape) -> dict[Any, tuple[Tensor, Tensor]]:
    """Gradients of each product's matrix and bias, each one matrix product over all steps."""
    found: dict[Any, tuple[Tensor, Tensor]] = {}
    for product in recorded.program.products:
        gradient = rows_of_all_steps(product.gradient, product.width, buffers, shape)
        parts = multiply(gradient.t(), rows_of_all_steps(product.input, 1, buffers, shape)), gradient.sum(0)
        if product.matrix in found:  # the step multiplies by this matrix more than once
            parts = parts[0] + found[product.matrix][0], parts[1] + found[product.matrix][1]
        found[product.matrix] = parts
    return found


def hidden_gradients(
    recorded: RecordedCell, tensors: Tensors, products: dict[Any, tuple[Tensor, Tensor]], shape: Shape
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the hidden weights and their bias, zero in products that the step does not take."""
    if tensors.weight_hh is None:
        return None, None
    new = tensors.weight_hh.new_zeros
    for index, rows in enumerate(recorded.rows(shape.units)):
        if index not in products:
            products[index] = new(rows, shape.units), new(rows)
    weights, biases = zip(*(products[index] for index in range(len(recorded.cell.products))), strict=True)
    return torch.cat(weights), torch.cat(biases) if recorded.signature.biased else None


def gradients_on_torch(
    recorded: RecordedCell, flat: Sequence[Tensor | None], running: list[int] | None, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of all tensors, computed step by step on torch operations, so that they have gradients themselves."""
    # Views, since a tensor may be computed from another one of them, whose gradient must not include its own.
    flat = [None if value is None else value.view_as(value) for value in flat]
    tensors, signature = recorded.tensors(flat), recorded.signature
    cell = copy(recorded.cell)
    names = [name for name, _ in signature.constants]
    cell.__dict__.update(zip(names, tensors.constants, strict=True), act=identity)
    parts: dict[str, Tensor] = {}
    for gates, value in zip(signature.segments, tensors.x, strict=True):
        parts |= dict(zip(gates, value.chunk(len(gates), -1), strict=True))
    result = unroll(
        cell,
        Gates(None, cell.gates, parts),
        Sequences(tensors.x[0], tensors.state, running),
        HiddenWeights(tensors.weight_hh, tensors.bias_hh, None, (), None),
        Noise(tensors.mask, 0.0, True),
    )
    pairs = zip((result.outputs, *result.state), gradients, strict=True)
    ends = [(value, gradient) for value, gradient in pairs if gradient is not None and value.requires_grad]
    inputs = [value for value in flat if value is not None and value.requires_grad]
    values, weights = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(values, inputs, weights, create_graph=True, allow_unused=True))
    return [next(found) if value is not None and value.requires_grad else None for value in flat]
