"""Inference of one direction of a layer: no gradient, nothing gathered, all sequences as long."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln.kernels.library import NormArgs, RecurrenceArgs, call
from lightning_bln.kernels.recurrent import Constants, allocate, arguments
from lightning_bln.recurrence.fused import inputs_of, settings_of
from lightning_bln.recurrence.parameters import HasCells, InnerNorm, Weights
from lightning_bln.recurrence.prepared.watched import NORMS, WatchedLayer, admitted, norms_of
from lightning_bln.recurrence.sequences import LayerState, Running

Final = tuple[Tensor, LayerState]
"""Outputs and last states."""


class KeptNorm:
    """A norm at the steps that it knows, whose mixing weights follow from the batch sizes."""

    def __init__(self, norm: InnerNorm, rows: Tensor, reads: Sequence[str]) -> None:
        self.positions, self.rows, buffers = norm.steps_known, rows, norm.given()
        sizes = buffers.get("batch_size")
        self.sizes, self.nbytes = (0, 0) if sizes is None else (sizes.data_ptr(), sizes.numel() * sizes.element_size())
        self.numbers = self.numbers_now()
        given: Any = {name: buffers[name] for name in reads if name != "batch_size"}
        self.given = {name: (one.data_ptr(), one.stride(0) * one.element_size()) for name, one in given.items()}

    def numbers_now(self) -> bytes:
        """The batch sizes' numbers: they are compared, for not every way of writing them is counted."""
        return ctypes.string_at(self.sizes, self.nbytes) if self.nbytes else b""

    def knows(self, end: int) -> bool:
        """Whether the population has statistics of its own for all steps before ``end``, or one set for all."""
        return self.positions == 1 or end <= self.positions

    def fill(self, args: NormArgs, start: int, steps: int) -> Tensor:
        """Let ``args`` point at the numbers of these steps; the tensor returned has to live as long."""
        rows, first = self.rows, start
        if self.positions == 1:
            args.fixed, first = 1, 0
            if rows.shape[1] < steps:
                rows = rows[:, :1].repeat(1, steps)
        address = rows.data_ptr() + first * rows.element_size()
        args.w_feature, args.w_batch = address, address + rows.shape[1] * rows.element_size()
        for name, (lies, size) in self.given.items():
            setattr(args, name, lies + first * size)
        return rows


class Steps(NamedTuple):
    """A call's arguments that hang on the steps alone."""

    key: tuple[int, int]
    """Steps before, and their number."""
    args: RecurrenceArgs
    rows: list[Tensor]
    """Mixing weights that they point at."""


class Inference:
    """A call of the kernels but for the input, its first states and the outputs.

    Args:
        watched: The layer's parameters, norms and options.
        norms: Its norms by their names.
        args: The call's arguments that never change.
        like: A row of the states.
        states: Their number.
    """

    def __init__(
        self, watched: WatchedLayer, norms: dict[str, KeptNorm], args: RecurrenceArgs, like: Tensor, states: int
    ) -> None:
        self.watched, self.norms, self.args = watched, norms, args
        self.new_empty, self.new_zeros, self.dtype, self.units = (
            like.new_empty,
            like.new_zeros,
            like.dtype,
            like.shape[1],
        )
        self.states = states
        self.has_steps = any(norm.positions > 1 for norm in norms.values())
        self.steps = Steps((0, 0), args, [])

    @classmethod
    def of(cls, layer: HasCells, suffix: str, weights: Weights, running: Running) -> Inference | None:
        """A direction that runs on the kernels; ``None`` where it cannot be prepared for such sequences."""
        own = {name: norm for name, norm in norms_of(layer, suffix).items() if norm is not None}
        reads = {norm: norm.reads() for norm in own.values()}
        if None in reads.values():
            return None
        watched = WatchedLayer.of(layer, suffix, weights, reads.__getitem__)
        if watched is None:
            return None
        norms = {name: KeptNorm(norm, norm.mixing_rows(), reads[norm]) for name, norm in own.items()}
        if not all(norm.knows(running.start + running.steps) for norm in norms.values()):
            return None
        row, states = weights.weight_ih.new_empty(1, layer.hidden_size), len(weights.cell.states)
        sequences = [own[name].sequence(Running(1, 1)) if name in own else None for name in NORMS]
        inputs = inputs_of(weights.weight_ih[:1], (row,) * states, weights, sequences)
        mixing = torch.zeros(3, 2, 1, dtype=torch.float64, device="cpu") if norms else None
        constants = Constants(None, None, None, mixing, None, None, None)
        settings = settings_of(weights, sequences, inputs, 1, layer.zoneout, recompute=False)
        args = arguments(inputs, constants, settings, allocate(inputs, constants, settings))
        return cls(watched, norms, args, row, states)

    def ready(self, layer: HasCells, suffix: str, running: Running) -> list[Tensor | None] | None:
        """The layer's tensors where nothing has changed and there are statistics of these steps, else ``None``."""
        found = self.watched.same(layer, suffix)
        if found is None:
            return None
        end = running.start + running.steps
        for norm in self.norms.values():
            if not norm.knows(end) or norm.numbers_now() != norm.numbers:
                return None
        return found

    def run(
        self, tensors: list[Tensor | None], x: Tensor, state: LayerState, steps: int, samples: int, start: int
    ) -> Final:
        """Outputs and last states from an input of so many steps and samples, and first states.

        Args:
            tensors: Of the layer, kept alive.
            x: ``(T, B, input_size)``, with or without the axis of a single step.
            state: ``(B, size)`` each, with or without an axis of one in front.
            steps: T.
            samples: B.
            start: Steps before.
        """
        read = [admitted(value, self.dtype) for value in (x, *state)]
        of_steps, new_empty, units = self.of_steps(start, steps), self.new_empty, self.units
        args = RecurrenceArgs.from_buffer_copy(of_steps.args)
        args.batch, args.rows, args.threads = samples, steps * samples, torch.get_num_threads()
        output, h = new_empty(steps, samples, units), new_empty(samples, units)
        args.input, args.output, args.h0, args.hn = map(Tensor.data_ptr, (read[0], output, read[1], h))
        last: LayerState = (h,)
        if len(state) > 1:
            c = new_empty(samples, units)
            args.c0, args.cn, last = read[2].data_ptr(), c.data_ptr(), (h, c)
        call("forward", args, self.dtype)
        del of_steps, tensors
        return output, last

    def of_steps(self, start: int, steps: int) -> Steps:
        """The arguments for some steps, those of the call before where they are the same."""
        found = self.steps
        if found.key != (start, steps):
            args = RecurrenceArgs.from_buffer_copy(self.args)
            args.steps = steps
            rows = [norm.fill(getattr(args, name), start, steps) for name, norm in self.norms.items()]
            found = self.steps = Steps((start, steps), args, rows)
        return found
