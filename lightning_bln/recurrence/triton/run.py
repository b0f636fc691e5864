"""The recurrence of any recorded cell as one differentiable operation on generated Triton kernels."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_ordinary
from lightning_bln.cells.cell import Cell
from lightning_bln.kernels.dispatch import gradients_on_torch
from lightning_bln.kernels.gate import serves
from lightning_bln.kernels.triton._interpreter import cooperative
from lightning_bln.kernels.triton.available import is_wanted, reason_against_triton
from lightning_bln.recurrence.program.buffers import Shape
from lightning_bln.recurrence.program.norms import NormCall, Norms
from lightning_bln.recurrence.program.recording import RecordedCell, Tensors, options_of
from lightning_bln.recurrence.program.runtime import joined, on_torch, reason_against_program, recorded_recurrence
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences
from lightning_bln.recurrence.sequences import lengths_of
from lightning_bln.recurrence.triton.kernels import Form, Kernels, kernels_of
from lightning_bln.recurrence.triton.phases import NormForm, is_masked_state, source_of
from lightning_bln.recurrence.triton.source import Kernel, argument

Arrays = dict[str, Tensor]
"""Tensors of a call by the kernels' names for them."""

MOST_ROWS = 128
"""Samples that a program holds."""
OTHER_BYTES = 20_000
"""Shared memory of a program besides its weights, which stay there."""


def recurrence_on_triton(
    backend: str, cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise
) -> Result | None:
    """The recurrence on Triton kernels; ``None`` where the backend does not choose them.

    Raises:
        ValueError: ``backend="triton"`` asks for them where they cannot run.
    """
    if backend == "auto" and not (sequences.x.device.type == "cuda" and is_wanted()):
        return None
    if backend not in ("auto", "triton"):
        return None
    if type(cell) in FAILED:
        return None
    norms = [norm for norm in (*weights.norm_hh, weights.norm_cell) if norm is not None]
    reason = reason_against_sizes(sequences, weights)
    if reason is None:
        reason = reason_against_program(cell, sequences, weights, norms, None, reason_against_triton)
    found = None
    if reason is None:
        options: Any = {"function": TritonRecurrence, "against": reason_against_triton}
        try:
            found = recorded_recurrence(cell, sequences, weights, noise, **options)
        except KernelFailed as error:
            note_failure(type(cell), error)
            return None
        reason = None if found is not None else f"the step of {type(cell).__name__} cannot be recorded"
    serves(backend, reason)
    return found


class KernelFailed(RuntimeError):
    """A kernel that does not compile, or that a device does not run."""


FAILED: set[type[Cell]] = set()
"""Kinds of cells whose kernels have failed, which run on torch operations from then on."""


def note_failure(kind: type[Cell], error: KernelFailed) -> None:
    """Say once that torch operations run in place of a kernel."""
    FAILED.add(kind)
    warnings.warn(
        f"a Triton kernel of {kind.__name__} failed, and torch operations run in its place: {error}", stacklevel=2
    )


def reason_against_sizes(sequences: Sequences, weights: HiddenWeights) -> str | None:
    """Obstacle to generated kernels in what a call needs of a device; ``None`` if there is none."""
    if weights.weight_hr is not None:
        return "a projected output (proj_size) has no Triton kernel"
    if sequences.state[0].shape[-2] > MOST_ROWS:
        return f"the batch has {sequences.state[0].shape[-2]} samples, and a Triton kernel takes {MOST_ROWS} at most"
    units, like = sequences.x.shape[-1], weights.weight_hh
    if like is not None and like.is_cuda:
        most = shared_memory(like.device)
        needed = like.shape[0] * units_of(units) * like.element_size() + OTHER_BYTES
        if needed > most:
            return f"hidden_size={units} needs {needed} bytes of shared memory, and {like.device} has {most}"
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


class TritonRecurrence(torch.autograd.Function):
    """Generated kernels run over all steps; gradients of a gradient are taken on torch operations."""

    @staticmethod
    def forward(
        ctx: Any,
        recorded: RecordedCell,
        running: list[int] | None,
        calls: tuple[NormCall, ...],
        needs_grad: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Outputs, last states and the norms' moments, as of the program on the C++ library."""
        flat = tuple(None if value is None else value.contiguous() for value in flat)
        tensors, keep = recorded.tensors(flat), needs_grad and any(ctx.needs_input_grad)
        shape = Shape.of(recorded, tensors, running)
        norms = Norms.of(recorded, tensors, calls, shape.units)
        like = tensors.state[0].to(wide(tensors.state[0].dtype))
        moments = norms.moments(like, shape.units, keep, running is not None)
        kind, options = cast(Hashable, type(recorded.cell)), options_of(recorded.cell)
        assert options is not None
        kernels = kernels_of(kind, options, form_of(recorded, norms, shape, keep))
        arrays = inputs_of(recorded, tensors, norms, moments, shape)
        arrays |= room_of(kernels, tensors, recorded, shape)
        sizes = torch.tensor(running or [shape.samples] * shape.steps, dtype=torch.int32, device=arrays["x0"].device)
        launch(kernels.module.forward, kernels.forward, arrays, sizes, shape)
        states = [arrays[argument(f"state_{name}")] for name in recorded.states]
        if keep:
            names = [name for name in arrays if name.startswith(("product", "input", "state"))]
            ctx.recorded, ctx.shape, ctx.calls, ctx.kernels, ctx.names = recorded, shape, calls, kernels, names
            ctx.save_for_backward(*flat, *moments, sizes, *(arrays[name] for name in names))
            ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*moments)
        outputs = states[0][1:]
        if running is None:
            return outputs.clone(), *(value[-1].clone() for value in states), *moments
        lengths = lengths_of(torch.tensor(running, device="cpu")).to(outputs.device)
        goes_on = torch.arange(shape.steps, device=outputs.device)[:, None] < lengths
        return outputs.where(goes_on[..., None], 0.0), *(value[-1].clone() for value in states), *moments

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        saved, recorded, shape, kernels = ctx.saved_tensors, ctx.recorded, ctx.shape, ctx.kernels
        number, kept = len(recorded.program.norms), len(ctx.names)
        flat = saved[: len(saved) - kept - 1 - number]
        moments, sizes, arrays = saved[len(flat) :][:number], saved[-kept - 1], saved[len(saved) - kept :]
        gradients = gradients[: 1 + len(recorded.states)]
        if all(gradient is None for gradient in gradients):
            return (None,) * (4 + len(flat))
        run = partial(on_torch, recorded, shape.running, ctx.calls)
        is_given = any(call.uses for call in ctx.calls)  # the kernel knows the gradient of current statistics alone
        if is_given or torch.is_grad_enabled() or is_observed() or not all(map(is_ordinary, gradients)):
            return None, None, None, None, *gradients_on_torch(run, flat, gradients)
        tensors = recorded.tensors(flat)
        norms = Norms.of(recorded, tensors, ctx.calls, shape.units)
        found = inputs_of(recorded, tensors, norms, moments, shape) | dict(zip(ctx.names, arrays, strict=True))
        found |= gradient_room(recorded, kernels, tensors, shape, gradients)
        assert kernels.backward is not None
        try:
            launch(kernels.module.backward, kernels.backward, found, sizes, shape)
        except KernelFailed as error:
            note_failure(type(recorded.cell), error)
            return None, None, None, None, *gradients_on_torch(run, flat, gradients)
        return None, None, None, None, *collected(recorded, kernels, tensors, norms, shape, found)


def form_of(recorded: RecordedCell, norms: Norms, shape: Shape, keep: bool) -> Form:
    """All that the kernels' source depends on."""
    forms: list[tuple[Any, NormForm]] = []
    for key, width, call in zip(norms.keys, norms.widths, norms.calls, strict=True):
        w_feature, w_batch = call.mixing.cpu().any(1).tolist()
        given: Any = tuple(bool(call.uses >> bit & 1) for bit in range(4))
        joint = call.groups == 1 and width > 1
        form = NormForm(width, joint, w_batch, w_feature, given, call.eps, keep or call.observes)
        forms.append(((key, width), form))
    return Form(recorded.signature, tuple(forms), keep, shape.units, depth_of(shape.units))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics."""
    return torch.promote_types(dtype, torch.float32)


def depth_of(units: int) -> int:
    """Units in a tile of a product's input."""
    return min(128, max(16, 1 << (units - 1).bit_length()))


def units_of(units: int) -> int:
    """Units of a program."""
    return 8 if units <= 256 else 16


def warps_of(units: int) -> int:
    """Warps of a program: with fewer, registers spill."""
    return 4 if units <= 128 else 8


def inputs_of(
    recorded: RecordedCell, tensors: Tensors, norms: Norms, moments: Sequence[Tensor], shape: Shape
) -> Arrays:
    """Tensors that are given, the norms' moments among them."""
    arrays: Arrays = {f"x{index}": value for index, value in enumerate(tensors.x)}
    for (name, axes), value in zip(recorded.signature.constants, tensors.constants, strict=True):
        arrays[f"{'matrix' if axes == 2 else 'constant'}_{name}"] = value
    single = {"weight_hh": tensors.weight_hh, "bias_hh": tensors.bias_hh, "mask": tensors.mask}
    arrays |= {name: value for name, value in single.items() if value is not None}
    names = recorded.signature.around.zoned if tensors.kept else ()
    arrays |= {f"kept_{name}": value for name, value in zip(names, tensors.kept, strict=True)}
    like = tensors.state[0]
    for number, (call, width) in enumerate(zip(norms.calls, norms.widths, strict=True)):
        weight, bias = norms.affine.weights[number], norms.affine.biases[number]
        zero = like.new_zeros(width * shape.units)
        arrays[f"norm_weight{number}"] = call.scale * (zero + 1 if weight is None else weight)
        arrays[f"norm_bias{number}"] = zero if bias is None else bias
        arrays[f"mixing{number}"] = call.mixing.to(like.device, wide(like.dtype))
        if call.given is not None:
            arrays[f"given{number}"] = call.given
        if moments[number].numel():
            of_batch = 2 * shape.steps * width * shape.units
            arrays[f"batch{number}"], arrays[f"feature{number}"] = moments[number].tensor_split([of_batch])
    return arrays


def room_of(kernels: Kernels, tensors: Tensors, recorded: RecordedCell, shape: Shape) -> Arrays:
    """Tensors that the forward kernel writes."""
    like, (steps, samples, units, *_) = tensors.state[0], shape
    arrays: Arrays = {}
    for name, value in zip(recorded.states, tensors.state, strict=True):
        whole = like.new_empty(steps + 1, samples, units)
        whole[0] = value
        arrays[argument(f"state_{name}")] = whole
    for number, product in enumerate(kernels.recorded.products):
        arrays[f"product{number}"] = like.new_zeros(steps, samples, kernels.recorded.width(product) * units)
        arrays[f"input{number}"] = like.new_zeros(steps, samples, units)
    return arrays


def gradient_room(
    recorded: RecordedCell, kernels: Kernels, tensors: Tensors, shape: Shape, gradients: Sequence[Tensor | None]
) -> Arrays:
    """Gradients that are given, and tensors that the backward kernel writes."""
    like, (steps, samples, units, *_) = tensors.state[0], shape
    output, *last = gradients
    arrays: Arrays = {f"grad_x{index}": torch.zeros_like(value) for index, value in enumerate(tensors.x)}
    arrays["grad_output"] = like.new_zeros(steps, samples, units) if output is None else output.contiguous()
    for name, gradient in zip(recorded.states, last, strict=True):
        name = argument(name)
        arrays[f"carry_{name}"] = like.new_zeros(samples, units) if gradient is None else gradient.contiguous()
        arrays[f"grad_state_{name}"] = like.new_zeros(samples, units)
    for number, product in enumerate(kernels.recorded.products):
        arrays[f"grad_product{number}"] = like.new_zeros(steps, samples, kernels.recorded.width(product) * units)
    for number, norm in enumerate(kernels.recorded.norms):
        for kind in ("weight", "bias"):
            arrays[f"grad_{kind}{number}"] = like.new_zeros(kernels.recorded.width(norm) * units)
    for name, _ in recorded.signature.constants:
        arrays[f"grad_{name}"] = like.new_zeros(units)
    return arrays


def launch(function: Any, kernel: Kernel, arrays: Arrays, sizes: Tensor, shape: Shape) -> None:
    """Run a kernel on as many programs as hold all units."""
    import triton
    import triton.language as tl

    like, units = arrays["x0"], units_of(shape.units)
    programs = -(-shape.units // units)
    room = max(1, kernel.columns) * 4 * programs * shape.samples
    part = like.new_full((room,), float("nan"), dtype=wide(like.dtype))
    flag = torch.zeros(1, dtype=torch.int32, device=like.device)
    is_interpreted = not like.is_cuda
    constants = {
        "H": shape.units,
        "U": units,
        "BM": max(16, 1 << (shape.samples - 1).bit_length()),
        "BK": depth_of(shape.units),
        "PROGRAMS": programs,
        "ROOM": triton.next_power_of_2(programs),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "WIDE": is_interpreted,
        "ACC": tl.float64 if like.dtype == torch.float64 else tl.float32,
    }
    options = {} if is_interpreted else {"launch_cooperative_grid": True, "num_warps": warps_of(shape.units)}
    context: Any = cooperative() if is_interpreted else torch.cuda.device_of(like)
    tensors = [arrays[name] for name in kernel.pointers]
    try:
        with context:
            function[(programs,)](*tensors, sizes, part, flag, shape.steps, shape.samples, **constants, **options)
    except Exception as error:  # of Triton's compiler, or of the driver
        if is_interpreted:
            raise
        raise KernelFailed(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error


def collected(
    recorded: RecordedCell, kernels: Kernels, tensors: Tensors, norms: Norms, shape: Shape, found: Arrays
) -> list[Tensor | None]:
    """Gradients of all tensors from those that the kernel has written, weights' as products over all steps."""
    signature, step = recorded.signature, kernels.recorded
    products: dict[Any, Tensor] = {}
    biases: dict[Any, Tensor] = {}
    for number, product in enumerate(step.products):
        if product not in step.adjoint.products:
            continue
        gradient = found[f"grad_product{number}"].flatten(0, 1)
        of = source_of(product)
        rows = found[argument(f"state_{of.key}")][:-1] if of.op == "state" else found[f"input{number}"]
        if is_masked_state(product.inputs[0]) and tensors.mask is not None:
            rows = rows * tensors.mask
        part = gradient.t() @ rows.flatten(0, 1)
        products[product.key] = products[product.key] + part if product.key in products else part
        if isinstance(product.key, int):
            total = gradient.sum(0)
            biases[product.key] = biases[product.key] + total if product.key in biases else total
    of_norms: dict[Any, tuple[Tensor | None, Tensor | None]] = {}
    for number, (key, call) in enumerate(zip(norms.keys, norms.calls, strict=True)):
        if step.norms[number] in step.adjoint.products:
            weight, bias = norms.affine.weights[number], norms.affine.biases[number]
            of_norms[key] = (
                None if weight is None else call.scale * found[f"grad_weight{number}"],
                None if bias is None else found[f"grad_bias{number}"],
            )
    if signature.around.normalized:
        biases = {key: bias for key, (_, bias) in of_norms.items() if bias is not None}
    keys = signature.norms(recorded.cell)
    known = step.adjoint
    return [
        *(found[f"grad_x{index}"] for index in range(len(signature.segments))),
        *(found[argument(f"grad_state_{name}")] if name in known.state else None for name in recorded.states),
        joined(tensors.weight_hh, products, recorded, shape),
        joined(tensors.bias_hh, biases, recorded, shape),
        None,
        *(
            (products.get(name) if axes == 2 else found[f"grad_{name}"] if name in known.constants else None)
            for name, axes in signature.constants
        ),
        *(of_norms.get(key, (None, None))[0] for key in keys),
        *(of_norms[key][1] if key in of_norms and not isinstance(key, int) else None for key in keys),
        None,
        *(None for _ in tensors.kept),
    ]
