"""The recurrence of any cell on the compiled library: its step recorded once, then run over all steps in one call."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Hashable, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.kernels.library import DTYPES, ProgramArgs, call, is_built, pointer
from lightning_bln.kernels.matmul import multiply
from lightning_bln.recurrence.program.codegen import Code, Place, Program, compile_step
from lightning_bln.recurrence.program.graph import record_step
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, identity, unroll

ROWS_OF_A_THREAD = 8


class Tensors(NamedTuple):
    """What a recurrence reads, in the order of the operator's arguments."""

    x: tuple[Tensor, ...]
    """Prepared input, some gates each, ``(T, B, width * H)``."""
    state: tuple[Tensor, ...]
    weight_hh: Tensor | None
    bias_hh: Tensor | None
    constants: tuple[Tensor, ...]
    """The cell's own vectors and matrices."""
    mask: Tensor | None

    def flat(self) -> list[Tensor | None]:
        """One after the other."""
        return [*self.x, *self.state, self.weight_hh, self.bias_hh, *self.constants, self.mask]


class Signature(NamedTuple):
    """What a program is made for besides the cell; sizes are no part of it."""

    segments: tuple[tuple[str, ...], ...]
    """Gates of each tensor of the input."""
    constants: tuple[tuple[str, int], ...]
    """The cell's parameters, and their axes."""
    biased: bool
    masked: bool


class RecordedCell(NamedTuple):
    """A cell's program and all that is needed to call it."""

    cell: Cell
    """Without parameters."""
    signature: Signature
    program: Program

    def tensors(self, flat: Sequence[Any]) -> Tensors:
        """The opposite of :meth:`Tensors.flat`."""
        x = len(self.signature.segments)
        state = x + len(self.cell.states)
        weight, bias, *constants, mask = flat[state:]
        return Tensors(tuple(flat[:x]), tuple(flat[x:state]), weight, bias, tuple(constants), mask)

    def rows(self, units: int) -> list[int]:
        """How many rows of the hidden weights each product has."""
        return [len(names) * units for names in self.cell.products]


class Sizes(NamedTuple):
    """How much there is of everything."""

    steps: int
    samples: int
    units: int


Buffers = dict[tuple[str, Any], Tensor]


def recorded_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result | None:
    """:func:`~lightning_bln.recurrence.reference.recurrence`, or ``None`` where the compiled library cannot run it."""
    if not fits(sequences, weights, noise):
        return None
    x = cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), cell.State(*sequences.state))
    segments = x.segments()
    dtype, units = sequences.x.dtype, sequences.x.shape[-1]
    constants = {name: getattr(cell, name) for name in cell.parameters}
    options = {n: v for n, v in sorted(cell.__dict__.items()) if n not in constants and n != "norm_cell"}
    if not all(value.shape in ((1,), (units,), (units, units)) for value in constants.values()) or not all(
        isinstance(value, int | float | str | tuple) for value in options.values()
    ):
        return None
    signature = Signature(
        tuple(segments),
        tuple((name, value.ndim) for name, value in constants.items()),
        weights.bias_hh is not None,
        noise.hidden_mask is not None,
    )
    recorded = record(cast(Hashable, type(cell)), tuple(options.items()), signature)
    if recorded is None:
        return None
    tensors = Tensors(
        tuple(side_by_side(value.to(dtype)) for value in segments.values()),
        tuple(side_by_side(value) for value in sequences.state),
        None if weights.weight_hh is None else side_by_side(cell.act(weights.weight_hh)),
        None if weights.bias_hh is None else side_by_side(weights.bias_hh),
        tuple((v.expand(units) if v.ndim == 1 else v).to(dtype).contiguous() for v in constants.values()),
        None if noise.hidden_mask is None else noise.hidden_mask.contiguous(),
    )
    outputs, *state = RecordedRecurrence.apply(recorded, sequences.sizes, *tensors.flat())
    return Result(outputs, tuple(state), (), None)


def fits(sequences: Sequences, weights: HiddenWeights, noise: Noise) -> bool:
    """Whether a recurrence is of a kind that programs are made for."""
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


def side_by_side(x: Tensor) -> Tensor:
    """``x`` with its features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=256)
def record(kind: Any, options: tuple[tuple[str, Any], ...], signature: Signature) -> RecordedCell | None:
    """The program of a kind of cell; ``None`` if its step has operations that are unknown here."""
    cell = object.__new__(kind)
    cell.__dict__.update(options)
    layout = {
        name: Place(("x", index), offset)
        for index, names in enumerate(signature.segments)
        for offset, name in enumerate(names)
    }
    try:
        step = record_step(cell, layout, dict(signature.constants), biased=signature.biased, masked=signature.masked)
    except Exception:  # whatever a step of someone's own does to what is no tensor: it runs on torch operations
        return None
    widths = {index: len(names) for index, names in enumerate(cell.products)}
    return RecordedCell(cell, signature, compile_step(step, layout, widths))


class RecordedRecurrence(torch.autograd.Function):
    """The recurrence as one operation. Its gradient has a gradient too, taken step by step on torch operations."""

    @staticmethod
    def forward(ctx: Any, recorded: RecordedCell, sizes: list[int] | None, *flat: Tensor | None) -> tuple[Tensor, ...]:
        """Outputs and last states."""
        tensors, program = recorded.tensors(flat), recorded.program
        keep = any(ctx.needs_input_grad)
        at = Sizes(tensors.x[0].shape[0], *tensors.state[0].shape)
        batch_sizes = None if sizes is None else torch.tensor(sizes)
        buffers = given(recorded, tensors) | written(recorded, tensors, at, keep, batch_sizes is not None)
        execute(program.forward, buffers, matrices(recorded, tensors), at, batch_sizes, reverse=False)
        states = [buffers["state", name] for name in recorded.cell.states]
        if keep:
            kept = {name: value for name, value in buffers.items() if name in program.reads}
            ctx.recorded, ctx.sizes, ctx.at, ctx.names = recorded, sizes, at, tuple(kept)
            ctx.save_for_backward(*flat, *kept.values())
            ctx.set_materialize_grads(False)
        if batch_sizes is None:
            return states[0][1:], *(value[-1].clone() for value in states)
        ends = (batch_sizes[:, None] > torch.arange(at.samples)).sum(0)
        return states[0][1:], *(value[ends, torch.arange(at.samples)] for value in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        saved, recorded, sizes = ctx.saved_tensors, ctx.recorded, ctx.sizes
        flat = saved[: len(saved) - len(ctx.names)]
        if torch.is_grad_enabled():
            return None, None, *differentiable(recorded, flat, sizes, gradients)
        buffers: Buffers = dict(zip(ctx.names, saved[len(flat) :], strict=True))
        return None, None, *once(recorded, recorded.tensors(flat), sizes, ctx.at, buffers, gradients)


def once(
    recorded: RecordedCell,
    tensors: Tensors,
    sizes: list[int] | None,
    at: Sizes,
    buffers: Buffers,
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of all tensors, on the compiled library."""
    (steps, samples, units), program, signature = at, recorded.program, recorded.signature
    start = tensors.state[0]
    output, *last = gradients
    buffers["output", None] = start.new_zeros(units) if output is None else side_by_side(output)
    for name, gradient in zip(recorded.cell.states, last, strict=True):
        value = start.new_empty(samples, units)
        buffers["carry", name] = value.zero_() if gradient is None else value.copy_(gradient)
    for buffer, width, is_complete in program.gradients:
        make = start.new_empty if is_complete and sizes is None else start.new_zeros
        buffers[buffer] = make(steps, samples, width * units)
    batch_sizes = None if sizes is None else torch.tensor(sizes)
    execute(program.backward, buffers, matrices(recorded, tensors), at, batch_sizes, reverse=True)
    constants = {
        name: buffers["constant_gradient", name].sum((0, 1)) if name in program.constants else None
        for name, _ in signature.constants
    }
    weight, bias = gradients_of_products(recorded, tensors, buffers, at, constants)
    return [
        *(buffers["gate_gradient", index] for index in range(len(signature.segments))),
        *(buffers["carry", name] if name in program.states else None for name in recorded.cell.states),
        weight,
        bias,
        *constants.values(),
        None,
    ]


def differentiable(
    recorded: RecordedCell, flat: Sequence[Tensor | None], sizes: list[int] | None, gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of all tensors by torch operations, which have gradients themselves."""
    # Aliases, since one tensor may be made of another: each is to have its own gradient alone.
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
        Sequences(tensors.x[0], tensors.state, sizes),
        HiddenWeights(tensors.weight_hh, tensors.bias_hh, None, (), None),
        Noise(tensors.mask, 0.0, True),
    )
    pairs = zip((result.outputs, *result.state), gradients, strict=True)
    ends = [(value, gradient) for value, gradient in pairs if gradient is not None and value.requires_grad]
    inputs = [value for value in flat if value is not None and value.requires_grad]
    values, weights = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(values, inputs, weights, create_graph=True, allow_unused=True))
    return [next(found) if value is not None and value.requires_grad else None for value in flat]


def given(recorded: RecordedCell, tensors: Tensors) -> Buffers:
    """What the forward instructions read."""
    buffers: Buffers = {("x", index): value for index, value in enumerate(tensors.x)}
    for (name, axes), value in zip(recorded.signature.constants, tensors.constants, strict=True):
        if axes == 1:
            buffers["constant", name] = value
    if tensors.bias_hh is not None:
        parts = tensors.bias_hh.split(recorded.rows(tensors.state[0].shape[-1]))
        buffers |= {("bias", index): part for index, part in enumerate(parts)}
    if tensors.mask is not None:
        buffers["mask", None] = tensors.mask
    return buffers


def written(recorded: RecordedCell, tensors: Tensors, at: Sizes, keep: bool, ragged: bool) -> Buffers:
    """What they write: of every step what is kept, else of one."""
    (steps, samples, units), program = at, recorded.program
    start = tensors.state[0]
    new = start.new_zeros if ragged else start.new_empty
    buffers: Buffers = {}
    for name, value in zip(recorded.cell.states, tensors.state, strict=True):
        buffers["state", name] = new(steps + 1, samples, units)
        buffers["state", name][0] = value
    time = (steps,) if keep else ()
    for index in range(program.tapes):
        buffers["tape", index] = new(*time, samples, units)
    for index, product in enumerate(program.products):
        shape = (*(time if index in program.kept_products else ()), samples, product.width * units)
        buffers["product", index] = new(shape)
    return buffers


def matrices(recorded: RecordedCell, tensors: Tensors) -> dict[Any, Tensor]:
    """The matrices of products, by the cell's products' index and by name."""
    named = zip(recorded.signature.constants, tensors.constants, strict=True)
    found: dict[Any, Tensor] = {name: value for (name, axes), value in named if axes == 2}
    if tensors.weight_hh is not None:
        found |= dict(enumerate(tensors.weight_hh.split(recorded.rows(tensors.state[0].shape[-1]))))
    return found


def execute(
    code: Code, buffers: Buffers, weights: dict[Any, Tensor], at: Sizes, batch_sizes: Tensor | None, *, reverse: bool
) -> None:
    """Run instructions over all steps."""
    steps, samples, units = at
    like = next(iter(buffers.values()))
    scratch = like.new_empty(code.registers, samples, units)
    zero = like.new_zeros(units)
    places, numbers = array("q"), array("q")
    for buffer, offset, shift in code.places:
        kind, index = buffer
        tensor = zero if kind == "zero" else scratch[index] if kind == "register" else buffers[buffer]
        step = tensor.stride(0) if tensor.ndim == 3 else 0
        row = tensor.stride(-2) if tensor.ndim > 1 else 0
        places.extend((tensor.data_ptr() + (offset * units + shift * step) * tensor.element_size(), step, row))
    for form, name in code.matrices:
        weight = weights[name]
        rows_, columns = weight.shape
        if form == "plain":
            numbers.extend((weight.data_ptr(), columns, rows_, 1, weight.stride(0)))
        else:
            numbers.extend((weight.data_ptr(), rows_, columns, weight.stride(0), 1))
    args = ProgramArgs()
    args.steps, args.batch, args.units, args.reversed = steps, samples, units, int(reverse)
    args.threads = max(1, min(torch.get_num_threads(), samples // ROWS_OF_A_THREAD))
    args.instructions, args.matrices = len(code.instructions), len(code.matrices)
    args.batch_sizes = pointer(batch_sizes)
    args.code = ctypes.addressof(code.instructions)
    args.places, args.matrix = places.buffer_info()[0], numbers.buffer_info()[0]
    call("program", args, like.dtype)


def gradients_of_products(
    recorded: RecordedCell, tensors: Tensors, buffers: Buffers, at: Sizes, constants: dict[str, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Of hidden weights and bias, and in ``constants`` of the cell's matrices: each one product over all steps."""
    found: dict[Any, tuple[Tensor, Tensor]] = {}
    for product in recorded.program.products:
        gradient = all_rows(product.gradient, product.width, buffers, at)
        parts = multiply(gradient.t(), all_rows(product.input, 1, buffers, at)), gradient.sum(0)
        if product.matrix in found:  # a product that the step takes more than once
            parts = parts[0] + found[product.matrix][0], parts[1] + found[product.matrix][1]
        found[product.matrix] = parts
    constants.update({name: weight for name, (weight, _) in found.items() if isinstance(name, str)})
    if tensors.weight_hh is None:
        return None, None
    for index, rows in enumerate(recorded.rows(at.units)):
        if index not in found:
            found[index] = tensors.weight_hh.new_zeros(rows, at.units), tensors.weight_hh.new_zeros(rows)
    weights, biases = zip(*(found[index] for index in range(len(recorded.cell.products))), strict=True)
    return torch.cat(weights), torch.cat(biases) if recorded.signature.biased else None


def all_rows(place: Place, width: int, buffers: Buffers, at: Sizes) -> Tensor:
    """What lies at a place, of all steps and sequences: ``(T * B, width * H)``."""
    steps, samples, units = at
    value = buffers[place.buffer][place.shift :][:steps]
    if value.ndim == 2:
        value = value.expand(steps, samples, -1)
    return value[..., place.offset * units : (place.offset + width) * units].reshape(steps * samples, -1)
