"""Memory of a recorded program, and the call of the C++ library that runs it over all steps."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln.kernels.gate import readable
from lightning_bln.kernels.library import ProgramArgs, call, pointer
from lightning_bln.recurrence.program.codegen import Buffer, Code, Place
from lightning_bln.recurrence.program.norms import NormArrays
from lightning_bln.recurrence.program.recording import RecordedCell, Tensors
from lightning_bln.recurrence.program.step import PROJECTION

ROWS_OF_A_THREAD = 8
"""Sequences below which another thread does not pay."""

Buffers = dict[Buffer, Tensor]


class Shape(NamedTuple):
    """Sizes of a call."""

    steps: int
    samples: int
    units: int
    outputs: int
    """Features of the output, as many as units unless it is projected."""
    running: Sequence[int] | None
    """Running sequences at each step; ``None`` if all run to the end."""

    @classmethod
    def of(cls, recorded: RecordedCell, tensors: Tensors, running: Sequence[int] | None = None) -> Shape:
        """Those of a call."""
        (samples, outputs), (steps, _, columns) = tensors.state[0].shape, tensors.x[0].shape
        return cls(steps, samples, columns // len(recorded.signature.segments[0]), outputs, running)

    def columns(self, width: int) -> int:
        """Features of so many gates, or of the output if zero."""
        return width * self.units or self.outputs


def input_buffers(recorded: RecordedCell, tensors: Tensors) -> Buffers:
    """Buffers that the step reads besides states and products."""
    buffers: Buffers = {("x", index): value for index, value in enumerate(tensors.x)}
    for (name, axes), value in zip(recorded.signature.constants, tensors.constants, strict=True):
        if axes == 1:
            buffers["constant", name] = value
    if tensors.bias_hh is not None and not recorded.signature.around.normalized:
        parts = tensors.bias_hh.split(recorded.rows(Shape.of(recorded, tensors).units))
        buffers |= {("bias", index): part for index, part in enumerate(parts)}
    if tensors.mask is not None:
        buffers["mask", None] = tensors.mask
    names = recorded.signature.around.zoned if tensors.kept else ()
    return buffers | {("kept", name): value for name, value in zip(names, tensors.kept, strict=True)}


def result_buffers(recorded: RecordedCell, tensors: Tensors, shape: Shape, keep: bool) -> Buffers:
    """Buffers that the step writes: all steps of what is kept for the gradient, else one; zero where sequences end."""
    (steps, samples, units, _, running), program = shape, recorded.program
    start = tensors.state[0]
    new = start.new_empty if running is None else start.new_zeros
    buffers: Buffers = {}
    for name, value in zip(recorded.states, tensors.state, strict=True):
        buffers["state", name] = new(steps + 1, *value.shape)
        buffers["state", name][0] = value
    time = (steps,) if keep else ()
    for index in range(program.tapes):
        buffers["tape", index] = new(*time, samples, units)
    widths = {("product", index): product.width for index, product in enumerate(program.products)}
    widths |= {("norm", index): width for index, (_, width) in enumerate(program.norms)}
    for buffer, width in widths.items():
        leading = time if buffer in program.kept else ()
        buffers[buffer] = new(*leading, samples, shape.columns(width))
    return buffers


def gradient_buffers(
    recorded: RecordedCell, tensors: Tensors, shape: Shape, gradients: Sequence[Tensor | None]
) -> Buffers:
    """Gradients of outputs and last states, which the backward instructions read, and room for those they write."""
    (steps, samples, _, outputs, running), start = shape, tensors.state[0]
    output, *last = gradients
    buffers: Buffers = {("output", None): start.new_zeros(outputs)}
    if output is not None:
        buffers["output", None] = readable("grad_output", output, (steps, samples, outputs), start.dtype)
    for name, first, gradient in zip(recorded.states, tensors.state, last, strict=True):
        value = torch.empty_like(first, memory_format=torch.contiguous_format)
        buffers["carry", name] = value.zero_() if gradient is None else value.copy_(gradient)
    for buffer, width, is_complete, has_steps in recorded.program.gradients:
        make = start.new_empty if is_complete and running is None else start.new_zeros
        buffers[buffer] = make(*((steps,) if has_steps else ()), samples, shape.columns(width))
    return buffers


def admitted(recorded: RecordedCell, tensors: Tensors) -> Tensors:
    """The tensors of a call as the library reads them."""
    (steps, samples, units, outputs, _), dtype = Shape.of(recorded, tensors), tensors.state[0].dtype
    rows, signature = sum(recorded.rows(units)), recorded.signature
    sizes = {name: outputs if index == 0 else units for index, name in enumerate(recorded.states)}
    segments, axes = signature.segments, (axes for _, axes in signature.constants)
    of_norms = [recorded.width(key) * units for key in signature.norms(recorded.cell)]

    def read(name: str, value: Tensor | None, *shape: int) -> Any:
        return None if value is None else readable(name, value, shape, dtype)

    return Tensors(
        tuple(
            read("x", value, steps, samples, len(gates) * units)
            for gates, value in zip(segments, tensors.x, strict=True)
        ),
        tuple(read("hx", value, samples, size) for value, size in zip(tensors.state, sizes.values(), strict=True)),
        read("weight_hh", tensors.weight_hh, rows, outputs),
        read("bias_hh", tensors.bias_hh, rows),
        read("weight_hr", tensors.weight_hr, outputs, units),
        tuple(read("constant", value, *[units] * n) for n, value in zip(axes, tensors.constants, strict=True)),
        tuple(read("norm_weight", value, n) for n, value in zip(of_norms, tensors.norm_weights, strict=True)),
        tuple(read("norm_bias", value, n) for n, value in zip(of_norms, tensors.norm_biases, strict=True)),
        read("mask", tensors.mask, samples, outputs),
        tuple(
            read("zoneout", value, steps, samples, sizes[name])
            for name, value in zip(signature.around.zoned if tensors.kept else (), tensors.kept, strict=True)
        ),
    )


def matrices(recorded: RecordedCell, tensors: Tensors) -> dict[Any, Tensor]:
    """Matrices of the products: the hidden weights by index of the product, the cell's own by name."""
    named = zip(recorded.signature.constants, tensors.constants, strict=True)
    found: dict[Any, Tensor] = {name: value for (name, axes), value in named if axes == 2}
    if tensors.weight_hh is not None:
        found |= dict(enumerate(tensors.weight_hh.split(recorded.rows(Shape.of(recorded, tensors).units))))
    return found if tensors.weight_hr is None else found | {PROJECTION: tensors.weight_hr}


def rows_of_all_steps(place: Place, columns: int, buffers: Buffers, shape: Shape) -> Tensor:
    """So many values at a place, of all steps and sequences, ``(T * B, columns)``."""
    steps, samples, units, *_ = shape
    value = buffers[place.buffer]
    value = value[place.shift :][:steps] if value.ndim == 3 else value.expand(steps, samples, -1)
    return value[..., place.offset * units :][..., :columns].reshape(steps * samples, -1)


def execute(
    code: Code, buffers: Buffers, weights: dict[Any, Tensor], norms: NormArrays, shape: Shape, *, reverse: bool
) -> None:
    """Run instructions over all steps in one call."""
    steps, samples, units, outputs, running = shape
    batch_sizes = None if running is None else torch.tensor(running, device="cpu")
    like = next(iter(buffers.values()))
    registers = like.new_empty(code.registers, samples, units)
    zero = like.new_zeros(units)
    places, strides = array("q"), array("q")
    for buffer, offset, shift in code.places:
        kind, index = buffer
        tensor = zero if kind == "zero" else registers[index] if kind == "register" else buffers[buffer]
        step = tensor.stride(0) if tensor.ndim == 3 else 0
        row = tensor.stride(-2) if tensor.ndim > 1 else 0
        places.extend((tensor.data_ptr() + (offset * units + shift * step) * tensor.element_size(), step, row))
    for form, name in code.matrices:
        weight = weights[name]
        rows, columns = weight.shape
        if form == "plain":
            strides.extend((weight.data_ptr(), columns, rows, 1, weight.stride(0)))
        else:
            strides.extend((weight.data_ptr(), rows, columns, weight.stride(0), 1))
    args = ProgramArgs()
    args.steps, args.batch, args.units, args.outputs, args.reversed = steps, samples, units, outputs, int(reverse)
    args.threads = max(1, min(torch.get_num_threads(), samples // ROWS_OF_A_THREAD))
    args.instructions, args.matrices = len(code.instructions), len(code.matrices)
    args.norms, args.norm_gates, args.norm = norms.number, ctypes.addressof(norms.gates), ctypes.addressof(norms.args)
    args.batch_sizes = pointer(batch_sizes)
    args.code = ctypes.addressof(code.instructions)
    args.places, args.matrix = places.buffer_info()[0], strides.buffer_info()[0]
    call("program", args, like.dtype)
