"""Training of one direction of a layer: whole sequences without dropout, as many and as long as in the call before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from lightning_bln._torch import own_buffers
from lightning_bln._writing import one_at_a_time
from lightning_bln.kernels.dispatch import Operator, Reference
from lightning_bln.kernels.library import GatherArgs, RecurrenceArgs, call
from lightning_bln.kernels.recurrent import (
    RECURRENCE,
    Constants,
    Inputs,
    Outputs,
    Settings,
    admitted_outputs,
    differentiate,
    output_shapes,
    place,
    sizes_and_numbers,
)
from lightning_bln.kernels.recurrent import admitted as admitted_inputs
from lightning_bln.merging import can_merge, merge_by, point
from lightning_bln.moments import Moments
from lightning_bln.population import Population
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.fused import contiguous, inputs_of, mixings, on_torch, settings_of
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm
from lightning_bln.recurrence.parameters import HasCells, Weights
from lightning_bln.recurrence.prepared.watched import Watched, WatchedLayer, admitted, is_readable, norms_of
from lightning_bln.recurrence.sequences import LayerState, Running
from lightning_bln.recurrence.statistics import gather, sizes_of


class Passes(NamedTuple):
    """Forward and backward pass by sizes and numbers that are kept."""

    args: RecurrenceArgs
    shapes: tuple[tuple[int, ...], ...]
    """Of the outputs."""

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings) -> Passes:
        """The passes for arguments of this shape."""
        return cls(sizes_and_numbers(inputs, settings), output_shapes(inputs, settings))

    def forward(self, inputs: Inputs, constants: Constants, settings: Settings) -> Outputs:
        """:func:`~lightning_bln.kernels.recurrent.forward` with parameters that the library reads as they lie."""
        dtype = inputs.weight_hh.dtype
        c = None if inputs.c is None else admitted(inputs.c, dtype)
        inputs = inputs._replace(x=admitted(inputs.x, dtype), h=admitted(inputs.h, dtype), c=c)
        outputs = Outputs(*map(inputs.weight_hh.new_empty, self.shapes))
        call("forward", self.placed(inputs, constants, settings, outputs), dtype)
        return outputs

    def backward(
        self,
        grads: Sequence[Tensor | None],
        inputs: Inputs,
        constants: Constants,
        settings: Settings,
        saved: Sequence[Tensor],
        needs_x: bool,
    ) -> Inputs:
        """:func:`~lightning_bln.kernels.recurrent.backward`."""
        inputs, constants = admitted_inputs(inputs, constants, settings)
        outputs = admitted_outputs(saved, inputs, settings)
        return differentiate(self.placed(inputs, constants, settings, outputs), grads, inputs, settings, needs_x)

    def placed(self, inputs: Inputs, constants: Constants, settings: Settings, outputs: Outputs) -> RecurrenceArgs:
        """The arguments of one call."""
        args = RecurrenceArgs.from_buffer_copy(self.args)
        place(args, inputs, constants, settings, outputs)
        return args


class Gathering:
    """A norm's population, which takes in the moments of each batch."""

    def __init__(self, module: GateNorm, norm: SequenceNorm, running: Running) -> None:
        equation = norm.equation._replace(weight=None, bias=None)
        self.module, self.running = ref(module), running
        self.norm = norm._replace(equation=equation)
        self.watched: Watched | None = None
        self.args = GatherArgs()

    def take(self, moments: Tensor) -> None:
        """Take in a batch, as :func:`~lightning_bln.recurrence.statistics.gather` does."""
        module = self.module()
        assert module is not None
        with one_at_a_time():
            if self.watched is not None and self.watched.same([own_buffers(module.population)]) is not None:
                if module.population.takes_batch:
                    merge_by(self.args, moments)
                return
            gather(module, self.norm, moments, self.running)
            self.watch(module.population, moments)

    def watch(self, population: Population, moments: Tensor) -> None:
        """Prepare for batches that are merged into the buffers as they lie."""
        places, self.watched = (self.running.steps, self.norm.groups), None
        if not self.running.start and population.is_gathering and can_merge(population, moments, places):
            tables = [own_buffers(population)]
            found = Watched.of(tables, Moments._fields)
            values, dtypes = found.values(tables), (torch.int64, moments.dtype, moments.dtype)
            if all(is_readable(value, dtype) for value, dtype in zip(values, dtypes, strict=True)):
                own = Moments(*values)  # type: ignore[arg-type]
                self.args = GatherArgs(*sizes_of(self.norm, population.num_features, self.running))
                point(self.args, own, own)
                self.watched = found


class Training(NamedTuple):
    """A training step of one direction but for the input and its first states."""

    watched: WatchedLayer
    running: Running
    constants: Constants
    settings: Settings
    operator: Operator[Any, Any, Any]
    reference: Reference
    gatherings: list[Gathering | None]
    """Of each norm."""

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, running: Running) -> Training | None:
        """A direction that runs on the kernels; ``None`` where not all is plain."""
        watched = WatchedLayer.of(layer, suffix, weights, lambda norm: ())
        drops = layer.input_dropout or layer.recurrent_dropout or layer.zoneout
        if watched is None or drops or not weights.weight_ih.requires_grad:
            return None
        modules = norms_of(layer, suffix).values()
        if any(isinstance(module, FrozenNorm) for module in modules):
            return None  # its statistics are given, which is for inference
        if any(module is not None and module.population.training_sizes is not None for module in modules):
            return None
        norms = [None if module is None else module.sequence(running) for module in modules]
        row = weights.weight_ih.new_empty(1, layer.hidden_size)
        x = weights.weight_ih.new_empty(1).expand(running.steps * running.samples, weights.weight_ih.shape[1])
        state = (row.expand(running.samples, -1),) * len(weights.cell.states)
        inputs = inputs_of(x, state, weights, norms)
        constants = Constants(None, None, None, mixings(norms, running.steps), None, None, None)
        settings = settings_of(weights, norms, inputs, running.steps, 0.0, layer.recompute)
        passes = Passes.of(inputs, settings)
        gatherings = [
            None if module is None or norm is None else Gathering(module, norm, running)
            for module, norm in zip(modules, norms, strict=True)
        ]
        return cls(
            watched,
            running,
            constants,
            settings,
            replace(RECURRENCE, forward=passes.forward, backward=passes.backward),
            partial(on_torch, weights.cell),
            gatherings,
        )

    def ready(self, layer: HasCells, suffix: str, running: Running) -> list[Tensor | None] | None:
        """The layer's tensors where nothing has changed and the batch is as large, else ``None``."""
        return self.watched.same(layer, suffix) if running == self.running else None

    def run(
        self, tensors: list[Tensor | None], x: Tensor, state: LayerState, steps: int, samples: int, start: int
    ) -> tuple[Tensor, LayerState]:
        """Outputs and last states from ``x``, ``(T, B, input_size)``, first states and the layer's ``tensors``."""
        own: Any = iter(tensors)
        weight_ih, weight_hh, bias_ih, bias_hh = islice(own, 4)
        norms = [(None, None) if norm is None else (next(own), next(own)) for norm in self.gatherings]
        (ih, _), (hh, _), cell = norms
        h, c = state[0], state[1] if len(state) > 1 else None
        inputs = Inputs(x.flatten(0, 1), weight_ih, weight_hh, bias_ih, bias_hh, h, c, ih, hh, *cell)
        output, *last = self.operator.run(contiguous(inputs), self.constants, self.settings, self.reference)
        for gathering, moments in zip(self.gatherings, last[2:], strict=True):
            if gathering is not None:
                gathering.take(moments)
        return output.view(steps, samples, -1), tuple(last[: len(state)])
