"""Inference of one direction of a layer: no gradient, nothing gathered, all sequences as long."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln.kernels.library import NormArgs, RecurrenceArgs, call
from lightning_bln.kernels.recurrent import Constants, allocate, arguments
from lightning_bln.population import FROZEN
from lightning_bln.recurrence.fused import inputs_of, settings_of
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm
from lightning_bln.recurrence.parameters import HasCells, Weights
from lightning_bln.recurrence.prepared.watched import WatchedLayer, admitted, norms_of
from lightning_bln.recurrence.sequences import LayerState, Running

Frozen = list[Tensor | None]
"""Buffers of a population in the order of ``FROZEN``: the four statistics, then the batch sizes."""


class FrozenNorm:
    """A norm at the positions of its population, whose mixing weights follow from the batch sizes."""

    def __init__(self, norm: GateNorm, sequence: SequenceNorm) -> None:
        sizes = norm.population.batch_size
        assert sequence.rows is not None
        self.numbers, self.positions, self.rows = numbers_of(sizes), len(sizes), sequence.rows
        self.uses = [index for index, is_used in enumerate(sequence.source.uses) if is_used]

    def knows(self, end: int) -> bool:
        """Whether the population has statistics of its own for all steps before ``end``, or one set for all."""
        return self.positions == 1 or end <= self.positions

    def fill(self, args: NormArgs, frozen: Frozen, start: int, steps: int) -> Tensor:
        """Let ``args`` point at the numbers of these steps; the tensor returned has to live as long."""
        rows, first = self.rows, start
        if self.positions == 1:
            args.fixed, first = 1, 0
            if rows.shape[1] < steps:
                self.rows = rows = rows[:, :1].repeat(1, steps)
        address = rows.data_ptr() + first * rows.element_size()
        args.w_feature, args.w_batch = address, address + rows.shape[1] * rows.element_size()
        for index in self.uses:
            value = frozen[index]
            assert value is not None
            setattr(args, FROZEN[index], value.data_ptr() + first * value.stride(0) * value.element_size())
        return rows


def numbers_of(value: Tensor | None) -> bytes:
    """A contiguous tensor's numbers: they are compared, for not every way of writing them is counted."""
    assert value is not None
    return ctypes.string_at(value.data_ptr(), value.numel() * value.element_size())


class Inference(NamedTuple):
    """A call of the kernels but for the input, its first states and the outputs."""

    watched: WatchedLayer
    norms: dict[str, FrozenNorm]
    args: RecurrenceArgs
    like: Tensor
    """A row of the states."""

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, running: Running) -> Inference | None:
        """A direction that runs on the kernels; ``None`` where it cannot be prepared for such sequences."""
        own = norms_of(layer, suffix)
        if any(norm is not None and not norm.population.is_frozen for norm in own.values()):
            return None
        watched = WatchedLayer.of(layer, suffix, weights, FROZEN)
        if watched is None:
            return None
        found = {name: None if norm is None else norm.sequence(positions_of(norm)) for name, norm in own.items()}
        norms = {name: FrozenNorm(own[name], one) for name, one in found.items() if one is not None}
        if not all(norm.knows(running.start + running.steps) for norm in norms.values()):
            return None
        row, states = weights.weight_ih.new_empty(1, layer.hidden_size), len(weights.cell.states)
        sequences = [*found.values()]
        inputs = inputs_of(weights.weight_ih[:1], (row,) * states, weights, sequences)
        mixing = torch.zeros(3, 2, 1, dtype=torch.float64, device="cpu") if norms else None
        constants = Constants(None, None, None, mixing, None, None, None)
        settings = settings_of(weights, sequences, inputs, 1, layer.zoneout, recompute=False)
        args = arguments(inputs, constants, settings, allocate(inputs, constants, settings))
        return cls(watched, norms, args, row)

    def ready(self, layer: HasCells, suffix: str, running: Running) -> list[list[Tensor | None]] | None:
        """The layer's tensors where nothing has changed and there are statistics of these steps, else ``None``."""
        found = self.watched.same(layer, suffix)
        if found is None:
            return None
        end = running.start + running.steps
        pairs = zip(self.norms.values(), found[1 + len(self.norms) :], strict=True)
        is_known = all(norm.knows(end) and numbers_of(frozen[-1]) == norm.numbers for norm, frozen in pairs)
        return found if is_known else None

    def run(
        self, tensors: list[list[Tensor | None]], x: Tensor, state: LayerState, start: int
    ) -> tuple[Tensor, LayerState]:
        """Outputs and last states from ``x``, ``(T, B, input_size)``, and first states; ``tensors`` are kept alive."""
        (steps, samples, _), dtype, units = x.shape, self.like.dtype, self.like.shape[1]
        read = [admitted(value, dtype) for value in (x, *state)]
        output = self.like.new_empty(steps, samples, units)
        last = [self.like.new_empty(samples, units) for _ in state]
        args = RecurrenceArgs.from_buffer_copy(self.args)
        args.steps, args.batch, args.rows, args.threads = steps, samples, steps * samples, torch.get_num_threads()
        args.input, args.output = read[0].data_ptr(), output.data_ptr()
        args.h0, args.hn = read[1].data_ptr(), last[0].data_ptr()
        if len(state) > 1:
            args.c0, args.cn = read[2].data_ptr(), last[1].data_ptr()
        frozen = tensors[1 + len(self.norms) :]
        pairs = zip(self.norms.items(), frozen, strict=True)
        held = [norm.fill(getattr(args, name), values, start, steps) for (name, norm), values in pairs]
        call("forward", args, dtype)
        del held, tensors
        return output, tuple(last)


def positions_of(norm: GateNorm) -> Running:
    """Steps at the positions that a frozen population has statistics of."""
    return Running(len(norm.population.batch_size), 1)
