"""The recurrence of any recorded cell as one differentiable operation on the C++ library."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain
from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.kernels.dispatch import gradients_on_torch
from lightning_bln.kernels.gate import readable, reason_against
from lightning_bln.kernels.matmul import multiply
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.program.buffers import (
    Buffers,
    Shape,
    admitted,
    execute,
    gradient_buffers,
    input_buffers,
    matrices,
    result_buffers,
    rows_of_all_steps,
)
from lightning_bln.recurrence.program.norms import Affine, NormCall, Norms
from lightning_bln.recurrence.program.recording import RecordedCell, Signature, Tensors, options_of, record
from lightning_bln.recurrence.program.step import NORM_CELL, NORM_INPUT, PROJECTION, Around
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, identity, unroll
from lightning_bln.recurrence.sequence_norm import normalize_steps
from lightning_bln.recurrence.sequences import Running, lengths_of

Against = Callable[[torch.dtype, Iterable["Tensor | None"]], "str | None"]
"""The obstacle to a call with tensors of a dtype."""


def recorded_recurrence(
    cell: Cell,
    sequences: Sequences,
    weights: HiddenWeights,
    noise: Noise,
    norm_ih: SequenceNorm | None = None,
    bias_ih: Tensor | None = None,
    function: type[torch.autograd.Function] | None = None,
    against: Against = reason_against,
) -> Result | None:
    """:func:`~lightning_bln.recurrence.reference.recurrence` by a recorded program; ``None`` if there is none.

    With ``norm_ih`` the input is still to be normalised, and ``bias_ih`` to be added. ``function`` runs the program,
    :class:`RecordedRecurrence` if left out, and ``against`` says what it does not take.
    """
    norms = [norm for norm in (norm_ih, *weights.norm_hh, weights.norm_cell) if norm is not None]
    if reason_against_program(cell, sequences, weights, norms, bias_ih, against) is not None:
        return None
    segments = segments_of(cell, sequences, is_prepared=norm_ih is None)
    recorded = recorded_cell(cell, segments, around_of(cell, weights, noise, norm_ih is not None))
    if isinstance(recorded, str):
        return None
    dtype, (steps, _, _, units) = sequences.x.dtype, sequences.x.shape
    constants, signature = {name: getattr(cell, name) for name in cell.parameters}, recorded.signature
    tensors = Tensors(
        tuple(value.to(dtype) for value in segments.values()),
        tuple(part for value in sequences.state for part in parts_in(value, units)),
        None if weights.weight_hh is None else cell.act(weights.weight_hh),
        weights.bias_hh,
        weights.weight_hr,
        tuple((v.expand(units) if v.ndim == 1 else v).to(dtype) for v in constants.values()),
        tuple(norm.equation.weight for norm in norms),
        tuple(bias_ih if norm is norm_ih else norm.equation.bias for norm in norms),
        noise.hidden_mask,
        () if noise.kept is None else tuple(noise.kept[name].to(dtype) for name in signature.around.zoned),
    )
    calls = tuple(NormCall.of(norm, steps, torch.promote_types(dtype, torch.float32)) for norm in norms)
    needs_grad = torch.is_grad_enabled()  # which it is not within the function
    apply: Any = (function or RecordedRecurrence).apply
    outputs, *rest = apply(recorded, sequences.sizes, calls, needs_grad, *tensors.flat())
    number = len(recorded.states)
    state, moments = recorded.whole(rest[:number]), iter(rest[number:])
    keys = signature.norms(cell)
    seen = {key: next(moments) for key, _ in recorded.program.norms}
    found = {key: seen.get(key) if norm.observes else None for key, norm in zip(keys, norms, strict=True)}
    of_cell, of_input = (found.pop(key, None) for key in (NORM_CELL, NORM_INPUT))
    return Result(outputs, state, tuple(found.values()), of_cell, of_input)


def segments_of(cell: Cell, sequences: Sequences, *, is_prepared: bool) -> dict[tuple[str, ...], Tensor]:
    """Gates of the input in as few tensors as possible, as :meth:`Cell.prepare` leaves them or before."""
    x = Gates(sequences.x.flatten(-2), cell.gates)
    return (cell.prepare(x, cell.State(*sequences.state)) if is_prepared else x).segments()


def recorded_cell(cell: Cell, segments: Iterable[tuple[str, ...]], around: Around) -> RecordedCell | str:
    """The program of a cell whose input comes in these segments; if its step cannot be recorded, why."""
    options = options_of(cell)
    assert options is not None
    constants = tuple((name, getattr(cell, name).ndim) for name in cell.parameters)
    return record(cast(Hashable, type(cell)), options, Signature(tuple(segments), constants, around))


def around_of(cell: Cell, weights: HiddenWeights, noise: Noise, norm_input: bool) -> Around:
    """Norms, bias, dropout and zoneout around the cell's equations in a call."""
    zoned: tuple[str, ...] = ()
    if noise.zoneout:
        zoned = cell.states if cell.zoned is None else cell.zoned
    return Around(
        biased=weights.bias_hh is not None,
        masked=noise.hidden_mask is not None,
        norm_input=norm_input,
        normalized=bool(weights.norm_hh),
        norm_cell=weights.norm_cell is not None,
        projected=weights.weight_hr is not None,
        zoned=zoned,
        zoneout=noise.zoneout if zoned and noise.kept is None else None,
    )


def reason_against_program(
    cell: Cell,
    sequences: Sequences,
    weights: HiddenWeights,
    norms: Sequence[SequenceNorm],
    bias_ih: Tensor | None,
    against: Against = reason_against,
) -> str | None:
    """Obstacle to a recorded program besides the cell's equations; ``None`` if there is none."""
    x, state = sequences.x, sequences.state
    if x.ndim != 4:
        return "fan-out over statistics modes of this cell has no compiled kernel"
    if torch.compiler.is_compiling():
        return "torch.compile takes this cell on torch operations"
    affine = [value for norm in norms for value in norm.equation[:2]]
    own = weights.weight_hh, weights.bias_hh, weights.weight_hr
    parameters = [value for value in (*own, bias_ih, *affine) if value is not None]
    constants = {name: getattr(cell, name) for name in cell.parameters}
    others = [value for value in (*state, *parameters) if value.dtype != x.dtype]
    if others:
        return f"a state or parameter has dtype {others[0].dtype}, and the input's products have {x.dtype}"
    units = x.shape[-1]
    if any(value.shape[-1] % units for value in state[weights.weight_hr is not None :]):
        return "a state has a size that is no multiple of hidden_size"
    odd = [name for name, value in constants.items() if value.shape not in ((1,), (units,), (units, units))]
    if odd:
        return f"the cell's parameter {odd[0]} is no number, vector or matrix of hidden_size"
    if options_of(cell) is None:
        return "an option of the cell is no number, string or tuple"
    given = [norm.source.given.batch_mean for norm in norms]
    return against(x.dtype, (x, *state, *parameters, *constants.values(), *given))


def parts_in(state: Tensor, units: int) -> Sequence[Tensor]:
    """Parts of a state, of so many units each; a projected output is one."""
    return state.split(units, -1) if state.shape[-1] > units else (state,)


class RecordedRecurrence(torch.autograd.Function):
    """A recorded program run over all steps; gradients of its gradient are taken on torch operations."""

    @staticmethod
    def forward(
        ctx: Any,
        recorded: RecordedCell,
        running: list[int] | None,
        calls: tuple[NormCall, ...],
        needs_grad: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Outputs, last states and the norms' moments, from the running sequences of each step and :class:`Tensors`."""
        tensors, program = admitted(recorded, recorded.tensors(flat)), recorded.program
        keep = needs_grad and any(ctx.needs_input_grad)
        shape = Shape.of(recorded, tensors, running)
        samples, units = shape.samples, shape.units
        buffers = input_buffers(recorded, tensors) | result_buffers(recorded, tensors, shape, keep)
        norms = Norms.of(recorded, tensors, calls, units)
        moments = norms.moments(tensors.state[0], units, keep, running is not None)
        execute(
            program.forward, buffers, matrices(recorded, tensors), norms.arrays(moments, units), shape, reverse=False
        )
        states = [buffers["state", name] for name in recorded.states]
        if keep:
            kept = {name: value for name, value in buffers.items() if name in program.reads}
            ctx.recorded, ctx.shape, ctx.calls = recorded, shape, calls
            ctx.kept = {name: value.shape for name, value in kept.items()}
            ctx.save_for_backward(*flat, *moments, *kept.values())
            ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        if running is None:
            return states[0][1:], *(value[-1].clone() for value in states), *moments
        lengths = lengths_of(torch.tensor(running, device="cpu"))
        return states[0][1:], *(value[lengths, torch.arange(samples, device="cpu")] for value in states), *moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        saved, recorded, shape, calls = ctx.saved_tensors, ctx.recorded, ctx.shape, ctx.calls
        number = len(recorded.program.norms)
        flat, rest = saved[: len(saved) - len(ctx.kept) - number], saved[len(saved) - len(ctx.kept) - number :]
        gradients = gradients[: 1 + len(recorded.states)]
        if all(gradient is None for gradient in gradients):
            return (None,) * (4 + len(flat))
        if torch.is_grad_enabled() or is_observed() or not all(map(is_plain, gradients)):
            run = partial(on_torch, recorded, shape.running, calls)
            return None, None, None, None, *gradients_on_torch(run, flat, gradients)
        tensors = admitted(recorded, recorded.tensors(flat))
        dtype, kept = tensors.state[0].dtype, zip(ctx.kept.items(), rest[number:], strict=True)
        buffers = {name: readable(str(name), value, size, dtype) for (name, size), value in kept}
        buffers |= gradient_buffers(recorded, tensors, shape, gradients)
        norms = Norms.of(recorded, tensors, calls, shape.units)
        found = norms.gradients()
        arrays = norms.arrays(norms.admitted(rest[:number], tensors.state[0], shape.units), shape.units, found)
        execute(recorded.program.backward, buffers, matrices(recorded, tensors), arrays, shape, reverse=True)
        return None, None, None, None, *collected_gradients(recorded, tensors, buffers, shape, norms, found)


def collected_gradients(
    recorded: RecordedCell, tensors: Tensors, buffers: Buffers, shape: Shape, norms: Norms, found: Affine
) -> list[Tensor | None]:
    """Gradients of all tensors from the buffers that the backward instructions have written, and those of norms."""
    (program, signature), states = (recorded.program, recorded.signature), recorded.states
    constants = {
        name: buffers["constant_gradient", name].sum((0, 1)) if name in program.constants else None
        for name, _ in signature.constants
    }
    products, biases = product_gradients(recorded, buffers, shape), dict[Any, Tensor]()
    constants |= {name: weight for name, weight in products.items() if isinstance(name, str) and name != PROJECTION}
    of_norms, keys = norms.by_key(found), recorded.signature.norms(recorded.cell)
    if recorded.signature.around.normalized:  # norms add it
        biases = {key: bias for key, (_, bias) in of_norms.items() if bias is not None}
    elif tensors.bias_hh is not None:
        biases = bias_gradients(recorded, buffers, shape)
    return [
        *(buffers["gate_gradient", index] for index in range(len(signature.segments))),
        *(buffers["carry", name] if name in program.states else None for name in states),
        joined(tensors.weight_hh, products, recorded, shape),
        joined(tensors.bias_hh, biases, recorded, shape),
        products.get(PROJECTION),
        *constants.values(),
        *(of_norms.get(key, (None, None))[0] for key in keys),
        *(of_norms[key][1] if key in of_norms and not isinstance(key, int) else None for key in keys),
        None,
        *(None for _ in tensors.kept),
    ]


def product_gradients(recorded: RecordedCell, buffers: Buffers, shape: Shape) -> dict[Any, Tensor]:
    """Gradients of each product's matrix, each one matrix product over all steps."""
    found: dict[Any, Tensor] = {}
    for product in recorded.program.products:
        columns = shape.outputs if isinstance(product.matrix, int) else shape.units
        gradient = rows_of_all_steps(product.gradient, shape.columns(product.width), buffers, shape)
        part = multiply(gradient.t(), rows_of_all_steps(product.input, columns, buffers, shape))
        # a step may multiply by a matrix more than once
        found[product.matrix] = found[product.matrix] + part if product.matrix in found else part
    return found


def bias_gradients(recorded: RecordedCell, buffers: Buffers, shape: Shape) -> dict[Any, Tensor]:
    """Gradients of the bias of each hidden product."""
    found: dict[Any, Tensor] = {}
    for product in recorded.program.products:
        if isinstance(product.matrix, int):
            part = rows_of_all_steps(product.gradient, shape.columns(product.width), buffers, shape).sum(0)
            found[product.matrix] = found[product.matrix] + part if product.matrix in found else part
    return found


def joined(whole: Tensor | None, found: dict[Any, Tensor], recorded: RecordedCell, shape: Shape) -> Tensor | None:
    """The gradient of the hidden weights or of their bias, zero in products that the step does not take."""
    if whole is None:
        return None
    parts = enumerate(whole.split(recorded.rows(shape.units)))
    return torch.cat([found[index] if index in found else torch.zeros_like(part) for index, part in parts])


def on_torch(
    recorded: RecordedCell, running: list[int] | None, calls: tuple[NormCall, ...], *flat: Tensor | None
) -> tuple[Tensor, ...]:
    """Outputs and last states step by step on torch operations."""
    tensors, signature = recorded.tensors(flat), recorded.signature
    cell, units = copy(recorded.cell), Shape.of(recorded, tensors).units
    names = [name for name, _ in signature.constants]
    cell.__dict__.update(zip(names, tensors.constants, strict=True), act=identity)
    parts: dict[str, Tensor] = {}
    for gates, value in zip(signature.segments, tensors.x, strict=True):
        parts |= dict(zip(gates, value.chunk(len(gates), -1), strict=True))
    around, keys = signature.around, signature.norms(cell)
    columns = zip(keys, calls, tensors.norm_weights, tensors.norm_biases, strict=True)
    made = {key: call.sequence(weight, bias) for key, call, weight, bias in columns}
    norm_cell, norm_ih = made.pop(NORM_CELL, None), made.pop(NORM_INPUT, None)
    x = Gates(None, cell.gates, parts)
    if norm_ih is not None:
        raw = tensors.x[0].unflatten(-1, (len(cell.gates), -1))
        value, _ = normalize_steps(norm_ih, raw, Running.of(tensors.x[0], running), backend="reference")
        x = cell.prepare(Gates(value.flatten(-2), cell.gates), cell.State(*recorded.whole(tensors.state)))
    kept = dict(zip(around.zoned, (value > 0 for value in tensors.kept), strict=False)) if tensors.kept else None
    result = unroll(
        cell,
        x,
        Sequences(tensors.x[0], recorded.whole(tensors.state), running),
        HiddenWeights(tensors.weight_hh, tensors.bias_hh, tensors.weight_hr, tuple(made.values()), norm_cell),
        Noise(tensors.mask, float(bool(around.zoned)) if around.zoneout is None else around.zoneout, kept),
    )
    return result.outputs, *(part for value in result.state for part in parts_in(value, units))
