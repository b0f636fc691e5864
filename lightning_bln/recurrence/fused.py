"""One layer in one direction on the compiled kernels: what the operator is called with, for one mode or for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels.library import CELLS, NormArgs, RecurrenceArgs, bits_of, call
from lightning_bln.kernels.matmul import multiply
from lightning_bln.kernels.recurrent import INTEGERS, Constants, Inputs, Recurrence, Settings, allocate, arguments
from lightning_bln.modes import StatisticsMode
from lightning_bln.recurrence.gate_norm import SequenceNorm

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
NORMS = ("ih", "hh", "cell")


class Prepared(NamedTuple):
    """A layer's call, ready for the operator."""

    inputs: Inputs
    constants: Constants
    settings: Settings


class LayerResult(NamedTuple):
    """What a layer returns."""

    output: Tensor
    """``(N, H)``"""
    state: tuple[Tensor, ...]
    moments: tuple[Tensor, ...]
    """What each norm saw, as the operator writes it; see :func:`~lightning_bln.recurrence.statistics.gather`."""


class LayerNorms(NamedTuple):
    """The norms of a layer for the steps of one sequence."""

    ih: SequenceNorm | None
    hh: SequenceNorm | None
    cell: SequenceNorm | None


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
        norms: What the products and the cell state are normalised by; the weights are in ``inputs`` too.
        steps: Number of steps.
        sizes: How many sequences run at each step; ``None`` if all run to the end.
        hidden_mask: Multiplies the hidden state where it enters the product.
        zoneout: Expected part of its value that a unit keeps over a step.
        zoneout_mask: In place of that, ones where it does, for h and c: ``(2, N, H)``.
        recompute: Whether the backward pass computes products and gates again rather than keeping them.

    Returns:
        Outputs, last states and moments.
    """
    tensors, constants, settings = prepare(
        cell, inputs, norms, steps, sizes, hidden_mask, zoneout, zoneout_mask, recompute
    )
    if torch.compiler.is_compiling() and HAS_CUSTOM_OPS:
        found = torch.ops.lightning_bln.recurrence(
            *tensors, *constants, [*settings][:INTEGERS], [*settings][INTEGERS:]
        )[:6]
    else:
        found = Recurrence.apply(settings, constants, *tensors)
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
    # what the modes have in common is set once: all but where they read and write, and what the population gives
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
    """``value`` with each mode's part contiguous, the same memory for all where they are one array."""
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
    """What the operator is called with."""
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
        uses_ih=bits(norms.ih),
        uses_hh=bits(norms.hh),
        uses_cell=bits(norms.cell),
        zoneout=0.0 if zoneout_mask is not None else float(zoneout),
        scale_ih=1.0 if norms.ih is None else norms.ih.scale,
        scale_hh=1.0 if norms.hh is None else norms.hh.scale,
        scale_cell=1.0 if norms.cell is None else norms.cell.scale,
        eps=max([0.0, *(norm.eps for norm in norms if norm is not None)]),
    )
    dtype = inputs.weight_hh.dtype
    has_norm = settings.on_ih or settings.on_hh or settings.on_cell
    constants = Constants(
        None if sizes is None else torch.tensor(sizes),
        None if hidden_mask is None else hidden_mask.to(dtype).contiguous(),
        None if zoneout_mask is None else zoneout_mask.to(dtype).contiguous(),
        mixings(norms, steps) if has_norm else None,
        *(given(norm, dtype) for norm in norms),
    )
    return Prepared(tensors, constants, settings)


def bits(norm: SequenceNorm | None) -> int:
    """Which statistics are the population's, batch mean in the lowest bit."""
    if norm is None or norm.population is None:
        return 0
    return bits_of(norm.uses)


def mixings(norms: LayerNorms, steps: int) -> Tensor:
    """The weights of each norm's two parts at each step, ``(3, 2, T)``."""
    weights = [(0.0, 0.0) if norm is None else (norm.w_feature, norm.w_batch) for norm in norms]
    if not any(isinstance(one, Tensor) for pair in weights for one in pair):
        return torch.tensor(weights, dtype=torch.float64).unsqueeze(-1).expand(-1, -1, steps).contiguous()
    return torch.stack([torch.stack([at_steps(one, steps) for one in pair]) for pair in weights])


def at_steps(weight: float | Tensor, steps: int) -> Tensor:
    """A weight at each step."""
    if not isinstance(weight, Tensor):
        return torch.full((steps,), weight, dtype=torch.float64)
    return weight.expand(steps, 1).squeeze(-1).double()


def given(norm: SequenceNorm | None, dtype: torch.dtype) -> Tensor | None:
    """The population's statistics one after the other, if any is used."""
    if norm is None or norm.population is None or all(use is False for use in norm.uses):
        return None
    return torch.cat([value.reshape(-1) for value in norm.population]).to(dtype)  # type: ignore[union-attr]
