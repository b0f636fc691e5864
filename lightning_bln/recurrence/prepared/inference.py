"""Inference of one direction of a layer: no gradient, nothing gathered, all sequences as long."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln.equation import Statistics
from lightning_bln.kernels.library import NormArgs, RecurrenceArgs, call
from lightning_bln.kernels.recurrent import Constants, allocate, arguments
from lightning_bln.population import FROZEN
from lightning_bln.recurrence.fused import inputs_of, settings_of
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm
from lightning_bln.recurrence.parameters import HasCells, Weights
from lightning_bln.recurrence.prepared.watched import WatchedLayer, admitted, norms_of
from lightning_bln.recurrence.sequences import LayerState, Running


class FrozenNorm:
    """A norm's numbers at the positions of its population.

    The mixing weights follow from batch sizes, whose numbers are compared.
    """

    def __init__(self, norm: GateNorm, sequence: SequenceNorm) -> None:
        assert sequence.rows is not None
        self.sizes, self.rows = norm.population.batch_size, sequence.rows
        self.numbers, self.positions = numbers_of(self.sizes), len(self.sizes)
        named = zip(Statistics._fields, *sequence.source, strict=True)
        self.given = [(name, value) for name, value, is_used in named if is_used and value is not None]

    def stays(self) -> bool:
        """Whether the batch sizes are what they were."""
        return numbers_of(self.sizes) == self.numbers

    def knows(self, end: int) -> bool:
        """Whether the population has statistics of its own for all steps before ``end``, or one set for all."""
        return self.positions == 1 or end <= self.positions

    def fill(self, args: NormArgs, start: int, steps: int) -> Tensor:
        """Let ``args`` point at the numbers of these steps; the tensor returned has to live as long."""
        rows, first = self.rows, start
        if self.positions == 1:
            args.fixed, first = 1, 0
            if rows.shape[1] < steps:
                self.rows = rows = rows[:, :1].repeat(1, steps)
        address = rows.data_ptr() + first * rows.element_size()
        args.w_feature, args.w_batch = address, address + rows.shape[1] * rows.element_size()
        for name, value in self.given:
            setattr(args, name, value.data_ptr() + first * value.stride(0) * value.element_size())
        return rows


def positions_of(norm: GateNorm) -> Running:
    """Steps at the positions that a frozen population has statistics of."""
    return Running(len(norm.population.batch_size), 1)


def numbers_of(value: Tensor) -> bytes:
    """A contiguous tensor's numbers."""
    return ctypes.string_at(value.data_ptr(), value.numel() * value.element_size())


class Inference(NamedTuple):
    """A call of the kernels but for the input, its first states and the outputs."""

    watched: WatchedLayer
    norms: dict[str, FrozenNorm]
    args: RecurrenceArgs
    like: Tensor
    """A tensor of the parameters' dtype."""

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, running: Running) -> Inference | None:
        """A direction that runs on the kernels; ``None`` where its norms have no population, or all is not plain."""
        watched = WatchedLayer.of(layer, suffix, weights, FROZEN)
        own = norms_of(layer, suffix)
        if watched is None or any(norm is not None and not norm.population.is_frozen for norm in own.values()):
            return None
        sequences = [None if norm is None else norm.sequence(positions_of(norm)) for norm in own.values()]
        pairs = zip(own.items(), sequences, strict=True)
        norms = {name: FrozenNorm(norm, found) for (name, norm), found in pairs if found is not None}
        row, states = weights.weight_ih.new_empty(1, layer.hidden_size), len(weights.cell.states)
        inputs = inputs_of(weights.weight_ih[:1], (row,) * states, weights, sequences)
        mixing = torch.zeros(3, 2, 1, dtype=torch.float64, device="cpu") if norms else None
        constants = Constants(None, None, None, mixing, None, None, None)
        settings = settings_of(weights, sequences, inputs, 1, layer.zoneout, recompute=False)
        args = arguments(inputs, constants, settings, allocate(inputs, constants, settings))
        return cls(watched, norms, args, row)

    def serves(self, layer: HasCells, suffix: str, dtype: torch.dtype, running: Running) -> bool:
        """Whether nothing has changed, and there are statistics of these steps."""
        end = running.start + running.steps
        return (
            dtype == self.like.dtype
            and self.watched.stays(layer, suffix)
            and all(norm.stays() for norm in self.norms.values())
            and all(norm.knows(end) for norm in self.norms.values())
        )

    def run(self, x: Tensor, state: LayerState, start: int) -> tuple[Tensor, LayerState]:
        """Outputs and last states from ``x``, ``(T, B, input_size)``, and first states."""
        (steps, samples, _), dtype = x.shape, self.like.dtype
        read = [admitted(value, dtype) for value in (x, *state)]
        output = x.new_empty(steps, samples, self.like.shape[1])
        last = [value.new_empty(value.shape) for value in state]
        args = RecurrenceArgs.from_buffer_copy(self.args)
        args.steps, args.batch, args.rows, args.threads = steps, samples, steps * samples, torch.get_num_threads()
        args.input, args.output = read[0].data_ptr(), output.data_ptr()
        args.h0, args.hn = read[1].data_ptr(), last[0].data_ptr()
        if len(state) > 1:
            args.c0, args.cn = read[2].data_ptr(), last[1].data_ptr()
        held = [norm.fill(getattr(args, name), start, steps) for name, norm in self.norms.items()]
        call("forward", args, dtype)
        del held
        return output, tuple(last)
