"""A recurrence on torch operations that takes its weights' gradients once for all steps, and has second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, tree_flatten, tree_unflatten
from lightning_bln.cells.cell import Cell
from lightning_bln.kernels.dispatch import gradients_on_torch, leaf
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, recurrence


def deferred_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence`, its weights' gradients taken once for all steps."""
    run = partial(recurrence, cell, sequences, weights, noise)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or sequences.x.ndim != 4:
        return run()
    leaves, tree = tree_flatten((sequences, weights, {name: getattr(cell, name) for name in cell.parameters}))
    places = [index for index, value in enumerate(leaves) if isinstance(value, Tensor) and value.requires_grad]
    if not places:
        return run()
    observed: list[Any] = []

    def outputs(is_deferred: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(leaves)
        for index, value in zip(places, inputs, strict=True):
            values[index] = value
        own_sequences, own_weights, parameters = tree_unflatten(values, tree)
        own = copy(cell)
        own.__dict__.update(parameters)
        result = recurrence(own, own_sequences, own_weights, noise, deferred=is_deferred)
        observed.append((result.norm_hh, result.norm_cell))
        return result.outputs, *result.state

    found, *state = Deferred.apply(partial(outputs, True), partial(outputs, False), *(leaves[i] for i in places))
    return Result(found, tuple(state), *observed[0])


class Deferred(torch.autograd.Function):
    """Outputs with a graph of their own, whose gradients have none; further gradients are taken step by step."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Sequence[Tensor]], reference: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of ``run``; those of ``reference`` are the same, and have gradients of any order."""
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        own, outputs = graph_of(run, inputs)
        ctx.run, ctx.reference, ctx.graph = run, reference, (own, outputs)
        return tuple(value.detach() for value in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by the graph within, which serves once and is made again if it is needed again."""
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or is_observed():
            return None, None, *gradients_on_torch(ctx.reference, inputs, grads)
        own, outputs = ctx.graph or graph_of(ctx.run, inputs)
        ctx.graph = None
        pairs = zip(outputs, grads, strict=True)
        ends = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
        if not ends:
            return (None,) * (2 + len(inputs))
        values, given = zip(*ends, strict=True)
        return None, None, *torch.autograd.grad(values, own, given, allow_unused=True)


def graph_of(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Leaves that hold the inputs, and the outputs of ``run`` with their graph."""
    with torch.enable_grad():
        own = [leaf(value) for value in inputs]
        return own, run(*own)
