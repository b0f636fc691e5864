"""A recurrence on torch operations that takes its weights' gradients once for all steps, and has second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import autocast_of_now, is_observed, is_plain, tree_flatten, tree_unflatten
from lightning_bln.cells.cell import Cell
from lightning_bln.kernels.dispatch import gradients, gradients_on_torch, leaf
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, recurrence


def deferred_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence`, its weights' gradients taken once for all steps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or sequences.x.ndim != 4:
        return recurrence(cell, sequences, weights, noise)
    parameters = {name: getattr(cell, name) for name in cell.parameters}
    leaves, tree = tree_flatten((sequences, weights, noise, parameters))
    places = [index for index, value in enumerate(leaves) if isinstance(value, Tensor)]
    inputs = [leaves[index] for index in places]
    others = [None if isinstance(value, Tensor) else value for value in leaves]
    kind, autocast = type(cell), autocast_of_now(sequences.x.device.type)
    options = {name: value for name, value in vars(cell).items() if name not in parameters}

    def run(is_deferred: bool, *inputs: Tensor) -> Result:
        values = list(others)
        for index, value in zip(places, inputs, strict=True):
            values[index] = value
        sequences, weights, noise, parameters = tree_unflatten(values, tree)
        own = object.__new__(kind)
        vars(own).update(options, **parameters)
        with autocast():
            return recurrence(own, sequences, weights, noise, deferred=is_deferred)

    observed: list[Any] = []
    found, *state = Deferred.apply(run, observed, *inputs)
    return Result(found, tuple(state), *observed)


class Deferred(torch.autograd.Function):
    """Outputs with a graph of their own, which gives their gradients; those of gradients are taken step by step."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Result], observed: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Outputs of ``run``; the statistics that it observed are left in ``observed``."""
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        own, result = graph_of(run, inputs)
        observed += result.norm_hh, result.norm_cell
        outputs = outputs_of(result)
        ctx.run, ctx.graph = run, (own, outputs)
        return tuple(value.detach() for value in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients by the graph within, which serves once and is made again if it is needed again."""
        inputs, run, graph = ctx.saved_tensors, ctx.run, ctx.graph
        if torch.is_grad_enabled() or is_observed() or not all(map(is_plain, grads)):
            return None, None, *gradients_on_torch(lambda *own: outputs_of(run(False, *own)), inputs, grads)
        ctx.graph = None
        if graph is None:
            own, result = graph_of(run, inputs)
            graph = own, outputs_of(result)
        own, outputs = graph
        pairs = zip(outputs, grads, strict=True)
        ends = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
        found = iter(gradients(ends, [value for value in own if value.requires_grad]))
        return None, None, *(next(found) if value.requires_grad else None for value in own)


def graph_of(run: Callable[..., Result], inputs: Sequence[Tensor]) -> tuple[list[Tensor], Result]:
    """Leaves that hold the inputs, and what comes of them with its graph."""
    with torch.enable_grad():
        own = [leaf(value) for value in inputs]
        return own, run(True, *own)


def outputs_of(result: Result) -> tuple[Tensor, ...]:
    """The differentiable ones."""
    return result.outputs, *result.state
