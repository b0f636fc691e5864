"""One layer in one direction on the compiled kernels: what the operator is called with, for one mode or for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln._compat import HAS_CUSTOM_OPS
from lightning_bln.gate_norm import SequenceNorm
from lightning_bln.kernels.cpu import INTEGERS, Constants, Inputs, Recurrence, Settings, allocate, arguments
from lightning_bln.kernels.library import CELLS, RecurrenceArgs, bits_of, call, set_given
from lightning_bln.modes import StatisticsMode

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
    """What each norm saw, as the operator writes it; see :func:`~lightning_bln.kernels.gather.gather`."""


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
    tensors, constants, settings = prepare(cell, inputs, norms, steps, None, None, zoneout, None, False)
    first = tensors._replace(x=tensors.x[0], h=tensors.h[0], c=None if tensors.c is None else tensors.c[0])
    given = constants[4:]
    one = allocate(first, constants, settings)
    output, h, c = (value.new_empty(len(modes), *value.shape) for value in one[:3])
    # what the modes have in common is set once: all but where they read and write, and what the population gives
    args = arguments(first, constants._replace(given_ih=None, given_hh=None, given_cell=None), settings, one)
    args.threads = 1
    units, columns = first.weight_hh.shape[1], first.weight_hh.shape[0]
    groups = 1 if settings.joint else columns // units
    sizes = {"ih": (columns, groups), "hh": (columns, groups), "cell": (units, 1)}
    places = {"input": tensors.x, "h0": tensors.h, "c0": tensors.c, "output": output, "hn": h, "cn": c}
    strided = [(name, value.data_ptr(), value[0].nbytes) for name, value in places.items() if value is not None]
    calls = (RecurrenceArgs * len(modes))(*[args] * len(modes))
    for k, (own, mode) in enumerate(zip(calls, modes, strict=True)):
        uses = bits_of(mode.uses_population)
        for name, start, stride in strided:
            setattr(own, name, start + k * stride if stride else None)
        for name, population in zip(NORMS, given, strict=True):
            set_given(getattr(own, f"norm_{name}"), population, uses, steps, *sizes[name])
    call("forward_each", calls, output.dtype, len(modes), torch.get_num_threads())
    return LayerResult(output, (h, c)[: 2 if cell == "lstm" else 1], ())


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
