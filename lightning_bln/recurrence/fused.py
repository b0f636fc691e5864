"""One layer in one direction on the fused kernels, in one statistics mode or in many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bln.equation import mixing_row
from lightning_bln.kernels.library import CELLS, NormArgs, RecurrenceArgs, bits_of, call
from lightning_bln.kernels.matmul import multiply
from lightning_bln.kernels.recurrent import RECURRENCE, Constants, Inputs, Settings, allocate, arguments
from lightning_bln.modes import FanOut, StatisticsMode
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.parameters import Weights
from lightning_bln.recurrence.regularization import Regularization
from lightning_bln.recurrence.sequences import is_running
from lightning_bln.recurrence.statistics import gather

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
NORMS = ("ih", "hh", "cell")


class Prepared(NamedTuple):
    """The arguments of the operator."""

    inputs: Inputs
    constants: Constants
    settings: Settings


class LayerResult(NamedTuple):
    """Outputs, last states and moments of a layer."""

    output: Tensor
    """``(N, H)``"""
    state: tuple[Tensor, ...]
    moments: tuple[Tensor, ...]
    """Of each norm, as the operator writes them; see :func:`~lightning_bln.recurrence.statistics.gather`."""


class LayerNorms(NamedTuple):
    """The norms of a layer for the steps of one sequence."""

    ih: SequenceNorm | None
    hh: SequenceNorm | None
    cell: SequenceNorm | None


def run_fused(
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    sizes: list[int] | None,
    regularization: Regularization,
    *,
    recompute: bool,
    fan: FanOut | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`~lightning_bln.recurrence.direction.run_direction` as one call of the fused kernels.

    Only rows that hold data are passed on: those of each step after those of the step before.
    """
    name, dtype = name_of(weights.cell), weights.weight_ih.dtype
    assert name is not None
    assert weights.weight_hh is not None
    steps, samples, units = x.shape[0], x.shape[-2], weights.weight_hh.shape[-1]
    running = [samples] * steps if sizes is None else sizes
    if fan is not None:
        x = contiguous_in_modes(x.transpose(0, 1))
    modules = (weights.norm_ih, *(weights.norm_hh or (None,)), weights.norm_cell)
    norms = LayerNorms(*(None if norm is None else norm.sequence(steps, running) for norm in modules))
    rows = None if sizes is None else is_running(sizes, x.unsqueeze(-2)).flatten().nonzero().squeeze(1)
    flat = x.flatten(-3, -2) if rows is None else x.flatten(0, 1).index_select(0, rows)
    first = tuple(value.to(dtype) for value in state)
    zoneout_mask = None
    if regularization.zoneout and regularization.training:
        drawn = torch.rand((2, len(flat), units), dtype=dtype)
        zoneout_mask = (drawn < regularization.zoneout).to(dtype)
    inputs = Inputs(
        flat.to(dtype),
        weights.weight_ih,
        weights.weight_hh,
        weights.bias_ih,
        weights.bias_hh,
        first[0],
        first[1] if len(first) > 1 else None,
        None if norms.ih is None else norms.ih.equation.weight,
        None if norms.hh is None else norms.hh.equation.weight,
        None if norms.cell is None else norms.cell.equation.weight,
        None if norms.cell is None else norms.cell.equation.bias,
    )
    if fan is not None:
        result = layer_in_modes(name, inputs, norms, steps, fan.modes, regularization.zoneout)
        return result.output.unflatten(1, (steps, samples)).transpose(0, 1), result.state
    result = run_layer(
        name,
        inputs,
        norms,
        steps,
        sizes,
        hidden_mask=regularization.mask(first[0], regularization.recurrent_dropout),
        zoneout=regularization.zoneout,
        zoneout_mask=zoneout_mask,
        recompute=recompute,
    )
    for module, norm, moments in zip(modules, norms, result.moments, strict=True):
        if module is not None and norm is not None and norm.observes:
            gather(module, norm, moments, steps, samples, sizes)
    output = result.output
    if rows is not None:
        output = output.new_zeros(steps * samples, units).index_copy(0, rows, output)
    return output.view(steps, samples, -1), result.state


def run_layer(
    cell: str,
    inputs: Inputs,
    norms: LayerNorms,
    steps: int,
    sizes: Sequence[int] | None,
    *,
    hidden_mask: Tensor | None = None,
    zoneout: float = 0.0,
    zoneout_mask: Tensor | None = None,
    recompute: bool = False,
) -> LayerResult:
    """Run one layer in one direction.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        inputs: Input, parameters and first states.
        norms: Norms of the products and the cell state; their weights are in ``inputs`` too.
        steps: Number of steps.
        sizes: Running sequences at each step; ``None`` if all run to the end.
        hidden_mask: Multiplies the hidden state where it enters the product.
        zoneout: Share of its value that a unit keeps over a step, as an expectation.
        zoneout_mask: In place of that, one where a unit of h and c keeps its value: ``(2, N, H)``.
        recompute: Whether the backward pass computes products again rather than keep them.

    Returns:
        Outputs, last states and moments.
    """
    tensors, constants, settings = prepare(
        cell, inputs, norms, steps, sizes, hidden_mask, zoneout, zoneout_mask, recompute
    )
    found = RECURRENCE.run(tensors, constants, settings)
    state = (found[1], found[2]) if cell == "lstm" else (found[1],)
    return LayerResult(found[0], state, found[3:6])


def layer_in_modes(
    cell: str, inputs: Inputs, norms: LayerNorms, steps: int, modes: Sequence[StatisticsMode], zoneout: float
) -> LayerResult:
    """:func:`run_layer` without gradients for each mode, along a first axis of input, states and what is returned."""
    if inputs.x.stride(0) == 0:  # all modes read the same input, and share its product
        assert inputs.weight_ih is not None
        x = multiply(inputs.x[0], inputs.weight_ih.t()).expand(len(modes), -1, -1)
        inputs = inputs._replace(x=x, weight_ih=None)
    each = {"input": inputs.x, "h0": inputs.h, "c0": inputs.c}
    places = {name: value if value is None else contiguous_in_modes(value) for name, value in each.items()}
    first = inputs._replace(x=inputs.x[0], h=inputs.h[0], c=None if inputs.c is None else inputs.c[0])
    tensors, constants, settings = prepare(cell, first, norms, steps, None, None, zoneout, None, False)
    one = allocate(tensors, constants, settings)
    output, h, c = (value.new_empty(len(modes), *value.shape) for value in one[:3])
    # modes differ in where they read and write and in which statistics are given: all else is set once
    args = arguments(tensors, constants, settings._replace(uses_ih=0b1111, uses_hh=0b1111, uses_cell=0b1111), one)
    args.threads = 1
    calls = (RecurrenceArgs * len(modes))(*[args] * len(modes))
    fields = np.frombuffer(calls, np.int64).reshape(len(modes), -1)  # type: ignore[call-overload]
    for name, value in (places | {"output": output, "hn": h, "cn": c}).items():
        if value is not None and value.numel():
            stride = value.stride(0) * value.element_size()
            fields[:, getattr(RecurrenceArgs, name).offset // 8] = value.data_ptr() + stride * np.arange(len(modes))
    is_given = np.array([mode.uses_population for mode in modes])
    for name in NORMS:
        offset = getattr(RecurrenceArgs, f"norm_{name}").offset + NormArgs.batch_mean.offset
        fields[:, offset // 8 : offset // 8 + 4] *= is_given  # a pointer for each statistic, none where not given
    call("forward_each", calls, output.dtype, len(modes), torch.get_num_threads())
    return LayerResult(output, (h, c)[: 2 if cell == "lstm" else 1], ())


def contiguous_in_modes(value: Tensor) -> Tensor:
    """``value`` with each mode's part contiguous; parts that share memory still do."""
    return value[0].contiguous().expand_as(value) if value.stride(0) == 0 else value.contiguous()


def prepare(
    cell: str,
    inputs: Inputs,
    norms: LayerNorms,
    steps: int,
    sizes: Sequence[int] | None,
    hidden_mask: Tensor | None,
    zoneout: float,
    zoneout_mask: Tensor | None,
    recompute: bool,
) -> Prepared:
    """The operator's arguments, see :func:`run_layer`."""
    tensors = Inputs(*(None if value is None else value.contiguous() for value in inputs))  # type: ignore[arg-type]
    needs_grad = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    observes = any(norm is not None and norm.observes for norm in norms)
    settings = Settings(
        cell=CELLS.index(cell),
        steps=steps,
        keep=(2 if recompute or not needs_grad else 1) if needs_grad or observes else 0,
        joint=int(any(norm is not None and norm.groups == 1 for norm in (norms.ih, norms.hh)) and GATES[cell] > 1),
        on_ih=int(norms.ih is not None),
        on_hh=int(norms.hh is not None),
        on_cell=int(norms.cell is not None),
        uses_ih=0 if norms.ih is None else bits_of(norms.ih.source.uses),
        uses_hh=0 if norms.hh is None else bits_of(norms.hh.source.uses),
        uses_cell=0 if norms.cell is None else bits_of(norms.cell.source.uses),
        zoneout=0.0 if zoneout_mask is not None else float(zoneout),
        scale_ih=1.0 if norms.ih is None else norms.ih.equation.scale,
        scale_hh=1.0 if norms.hh is None else norms.hh.equation.scale,
        scale_cell=1.0 if norms.cell is None else norms.cell.equation.scale,
        eps=max([0.0, *(norm.equation.eps for norm in norms if norm is not None)]),
    )
    dtype = inputs.weight_hh.dtype
    has_norm = settings.on_ih or settings.on_hh or settings.on_cell
    constants = Constants(
        None if sizes is None else torch.tensor(sizes),
        None if hidden_mask is None else hidden_mask.to(dtype).contiguous(),
        None if zoneout_mask is None else zoneout_mask.to(dtype).contiguous(),
        mixings(norms, steps) if has_norm else None,
        *(None if norm is None else norm.source.flat(dtype) for norm in norms),
    )
    return Prepared(tensors, constants, settings)


def mixings(norms: LayerNorms, steps: int) -> Tensor:
    """Mixing weights of each norm at each step, ``(3, 2, T)``."""
    weights = [(0.0, 0.0) if norm is None else norm.equation[-2:] for norm in norms]
    if not any(isinstance(one, Tensor) for pair in weights for one in pair):
        return torch.tensor(weights, dtype=torch.float64).unsqueeze(-1).expand(-1, -1, steps).contiguous()
    return torch.stack([torch.stack([mixing_row(one, steps) for one in pair]) for pair in weights])
