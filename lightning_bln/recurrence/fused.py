"""One layer in one direction on the fused kernels, in one statistics mode or in many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.equation import Equation, Source, mixing_rows, number_of, weight_of
from lightning_bln.kernels.gate import checked
from lightning_bln.kernels.library import CELLS, NormArgs, RecurrenceArgs, bits_of, call
from lightning_bln.kernels.matmul import multiply
from lightning_bln.kernels.recurrent import RECURRENCE, Constants, Inputs, Settings, admitted, allocate, arguments
from lightning_bln.modes import FanOut, StatisticsMode
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.parameters import Weights
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Sequences, recurrence
from lightning_bln.recurrence.regularization import Regularization
from lightning_bln.recurrence.sequence_norm import normalize_steps
from lightning_bln.recurrence.sequences import Running
from lightning_bln.recurrence.statistics import gather

Norms = Sequence[SequenceNorm | None]
"""The norms of the input's product, of the state's and of the cell state for the steps of one sequence."""


def run_fused(
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    sizes: list[int] | None,
    regularization: Regularization,
    *,
    recompute: bool,
    fan: FanOut | None,
    start: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`~lightning_bln.recurrence.direction.run_direction` as one call of the fused kernels.

    Only rows that hold data are passed on: those of each step after those of the step before.
    """
    dtype, running = weights.weight_ih.dtype, Running.of(x, sizes, start)
    if fan is not None:
        x = contiguous_in_modes(x.transpose(0, 1))
    modules = (weights.norm_ih, *(weights.norm_hh or (None,)), weights.norm_cell)
    norms = [None if norm is None else norm.sequence(running) for norm in modules]
    rows = running.rows(x.device)
    flat = x.flatten(-3, -2) if rows is None else x.flatten(0, 1).index_select(0, rows)
    first = tuple(value.to(dtype) for value in state)
    inputs = inputs_of(flat.to(dtype), first, weights, norms)
    noise = Noise(
        regularization.mask(first[0], regularization.recurrent_dropout),
        regularization.zoneout,
        regularization.kept(weights.cell, first, running.steps),
    )
    constants = Constants(
        None if sizes is None else torch.tensor(sizes, device="cpu"),
        noise.hidden_mask,
        zoneout_mask(noise, rows, dtype),
        mixings(norms, running.steps),
        *(None if norm is None else norm.source.flat(dtype) for norm in norms),
    )
    zoneout = regularization.zoneout if noise.kept is None else 0.0
    settings = settings_of(weights, norms, inputs, running.steps, zoneout, recompute)
    if fan is not None:
        output, *last = run_in_modes(inputs, constants, settings, fan.modes)
        return output.unflatten(1, (running.steps, running.samples)).transpose(0, 1), tuple(last[: len(state)])
    output, h, c, *seen = RECURRENCE.run(contiguous(inputs), constants, settings, partial(on_torch, weights.cell))
    for module, norm, moments in zip(modules, norms, seen, strict=True):
        if module is not None and norm is not None and norm.observes:
            gather(module, norm, moments, running)
    return running.padded(output, rows), (h, c)[: len(state)]


def inputs_of(x: Tensor, state: tuple[Tensor, ...], weights: Weights, norms: Norms) -> Inputs:
    """The operator's differentiable tensors."""
    assert weights.weight_hh is not None
    norm_weights = [None if norm is None else norm.equation.weight for norm in norms]
    return Inputs(
        x,
        weights.weight_ih,
        weights.weight_hh,
        weights.bias_ih,
        weights.bias_hh,
        state[0],
        state[1] if len(state) > 1 else None,
        norm_weights[0],
        norm_weights[1],
        norm_weights[2],
        None if norms[2] is None else norms[2].equation.bias,
    )


def on_torch(cell: Cell, inputs: Inputs, constants: Constants, settings: Settings) -> tuple[Tensor, ...]:
    """The operator's differentiable outputs by torch operations."""
    sizes = None if constants.batch_sizes is None else constants.batch_sizes.tolist()
    running = Running(settings.steps, inputs.h.shape[0], sizes)
    rows = running.rows(inputs.x.device)
    norm_ih, norm_hh, norm_cell = norms_of(inputs, constants, settings)
    x = running.padded(inputs.x, rows)
    assert inputs.weight_ih is not None
    gates = F.linear(x, inputs.weight_ih, inputs.bias_ih if norm_ih is None else None)
    gates = gates.unflatten(-1, (len(cell.gates), -1))
    if norm_ih is not None:
        gates, _ = normalize_steps(norm_ih, gates, running, inputs.bias_ih, backend="reference")
    kept = None
    if constants.zoneout_mask is not None:
        kept = {name: running.padded(mask, rows) > 0 for name, mask in zip("hc", constants.zoneout_mask, strict=True)}
    noise = Noise(constants.hidden_mask, settings.zoneout if kept is None else 1.0, kept)
    state = (inputs.h,) if inputs.c is None else (inputs.h, inputs.c)
    hidden = HiddenWeights(inputs.weight_hh, inputs.bias_hh, None, () if norm_hh is None else (norm_hh,), norm_cell)
    result = recurrence(cell, Sequences(gates, state, sizes), hidden, noise)
    outputs = result.outputs.flatten(0, 1)
    return outputs if rows is None else outputs.index_select(0, rows), *result.state


def norms_of(inputs: Inputs, constants: Constants, settings: Settings) -> Norms:
    """The norms of a call, made again of the operator's arguments."""
    weights = inputs.weight_norm_ih, inputs.weight_norm_hh, inputs.weight_norm_cell
    biases = None, None, inputs.bias_norm_cell
    scales = settings.scale_ih, settings.scale_hh, settings.scale_cell
    given = constants.given_ih, constants.given_hh, constants.given_cell
    uses = settings.uses_ih, settings.uses_hh, settings.uses_cell
    found: list[SequenceNorm | None] = [None] * 3
    for index, weight in enumerate(weights):
        if weight is not None:
            assert constants.mixing is not None
            groups = 1 if settings.joint else len(weight) // inputs.weight_hh.shape[1]
            mixing = (weight_of(row, weight.dtype) for row in constants.mixing[index])
            source = Source.of(given[index], uses[index], (settings.steps, groups), len(weight))
            equation = Equation(weight, biases[index], scales[index], settings.eps, *mixing)
            found[index] = SequenceNorm(equation, source, groups, False)
    return found


def zoneout_mask(noise: Noise, rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """:attr:`Noise.kept` as the operator takes it."""
    if noise.kept is None:
        return None
    flat = torch.stack([noise.kept["h"], noise.kept.get("c", noise.kept["h"])]).flatten(1, 2)
    return (flat if rows is None else flat.index_select(1, rows)).to(dtype)


def mixings(norms: Norms, steps: int) -> Tensor | None:
    """Mixing weights of each norm at each step, ``(3, 2, T)``; ``None`` without norms."""
    if all(norm is None for norm in norms):
        return None
    weights = [(None, None) if norm is None else norm.equation[-2:] for norm in norms]
    numbers = [[number_of(one) for one in pair if not isinstance(one, Tensor)] for pair in weights]
    if all(len(pair) == 2 for pair in numbers):
        row = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return row.unsqueeze(-1).expand(-1, -1, steps).contiguous()
    known = [None if norm is None else norm.rows for norm in norms]
    pairs = zip(weights, known, strict=True)
    return torch.stack([mixing_rows(*pair, steps) if rows is None else rows for pair, rows in pairs])


def settings_of(
    weights: Weights, norms: Norms, inputs: Inputs, steps: int, zoneout: float, recompute: bool
) -> Settings:
    """The operator's numbers; with ``recompute`` the backward pass computes products again rather than keep them."""
    name = name_of(weights.cell)
    assert name is not None
    needs_grad = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    keeps = needs_grad or any(norm is not None and norm.observes for norm in norms)
    is_joint = any(norm is not None and norm.groups == 1 for norm in norms[:2]) and len(weights.cell.gates) > 1
    uses = [0 if norm is None else bits_of(norm.source.uses) for norm in norms]
    scales = [1.0 if norm is None else norm.equation.scale for norm in norms]
    return Settings(
        cell=CELLS.index(name),
        steps=steps,
        keep=(2 if recompute or not needs_grad else 1) if keeps else 0,
        joint=int(is_joint),
        uses_ih=uses[0],
        uses_hh=uses[1],
        uses_cell=uses[2],
        zoneout=float(zoneout),
        scale_ih=scales[0],
        scale_hh=scales[1],
        scale_cell=scales[2],
        eps=max([0.0, *(norm.equation.eps for norm in norms if norm is not None)]),
    )


def contiguous(inputs: Inputs) -> Inputs:
    """``inputs`` as the kernels read them."""
    return Inputs(*(None if value is None else value.contiguous() for value in inputs))  # type: ignore[arg-type]


def run_in_modes(
    inputs: Inputs, constants: Constants, settings: Settings, modes: Sequence[StatisticsMode]
) -> tuple[Tensor, ...]:
    """Output and last states in each mode, along a first axis as in input and first states, without gradients."""
    if inputs.x.stride(0) == 0:  # all modes read the same input, and share its product
        assert inputs.weight_ih is not None
        x = multiply(inputs.x[0], inputs.weight_ih.t()).expand(len(modes), -1, -1)
        inputs = inputs._replace(x=x, weight_ih=None)
    each = {"input": inputs.x, "h0": inputs.h, "c0": inputs.c}
    places = {
        name: contiguous_in_modes(checked(name, value, value.shape, inputs.weight_hh.dtype))
        for name, value in each.items()
        if value is not None
    }
    first = contiguous(inputs._replace(x=inputs.x[0], h=inputs.h[0], c=None if inputs.c is None else inputs.c[0]))
    one = allocate(first, constants, settings)
    output, h, c = (value.new_empty(len(modes), *value.shape) for value in one[:3])
    # modes differ in where they read and write and in which statistics are given: all else is set once
    first, constants = admitted(first, constants, settings)
    args = arguments(first, constants, settings._replace(uses_ih=0b1111, uses_hh=0b1111, uses_cell=0b1111), one)
    args.threads = 1
    calls = (RecurrenceArgs * len(modes))(*[args] * len(modes))
    fields = np.frombuffer(calls, np.int64).reshape(len(modes), -1)  # type: ignore[call-overload]
    for name, value in (places | {"output": output, "hn": h, "cn": c}).items():
        if value.numel():
            stride = value.stride(0) * value.element_size()
            fields[:, getattr(RecurrenceArgs, name).offset // 8] = value.data_ptr() + stride * np.arange(len(modes))
    is_given = np.array([mode.uses_population for mode in modes])
    for name in ("norm_ih", "norm_hh", "norm_cell"):
        offset = getattr(RecurrenceArgs, name).offset + NormArgs.batch_mean.offset
        fields[:, offset // 8 : offset // 8 + 4] *= is_given  # a pointer for each statistic, none where not given
    call("forward_each", calls, output.dtype, len(modes), torch.get_num_threads())
    return output, h, c


def contiguous_in_modes(value: Tensor) -> Tensor:
    """``value`` with each mode's part contiguous; parts that share memory still do."""
    return value[0].contiguous().expand_as(value) if value.stride(0) == 0 else value.contiguous()
