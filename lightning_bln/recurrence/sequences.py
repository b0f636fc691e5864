"""Forms of a recurrent layer's input: batched or not, batch first, packed, and their running sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._torch import integers, is_observed
from lightning_bln.functional import check_dtype

State = Tensor | tuple[Tensor, ...]
LayerState = tuple[Tensor, ...]


class Running(NamedTuple):
    """Running sequences at each step of a batch."""

    steps: int
    samples: int
    sizes: Sequence[int] | None = None
    """How many run at each step, longest first; ``None`` if all run to the end."""
    start: int = 0
    """Steps that came before the first one, in earlier parts of the sequences."""

    @classmethod
    def of(cls, x: Tensor, sizes: Sequence[int] | None, start: int = 0) -> Running:
        """Those of ``x``, shaped ``(T, ..., B, size)``."""
        return cls(x.shape[0], x.shape[-2], sizes, start)

    def counts(self, device: torch.device) -> int | Tensor:
        """Running sequences: a number for all steps, or one for each, ``(T, 1)``."""
        return self.samples if self.sizes is None else torch.tensor(self.sizes, device=device)[:, None]

    def rows(self, device: torch.device) -> Tensor | None:
        """Places of the rows that hold data among those of all steps and sequences, in order; ``None`` if all do."""
        if self.sizes is None:
            return None
        order = torch.arange(self.samples, device="cpu")
        return (order < torch.tensor(self.sizes, device="cpu")[:, None]).flatten().nonzero().squeeze(1).to(device)

    def padded(self, flat: Tensor, rows: Tensor | None) -> Tensor:
        """Rows that hold data at their places, ``(T, B, size)``, zeros at the others."""
        if rows is not None:
            flat = flat.new_zeros(self.steps * self.samples, flat.shape[-1]).index_copy(0, rows, flat)
        return flat.view(self.steps, self.samples, -1)


class Form(NamedTuple):
    """An input as ``(T, B, input_size)``, and the form in which its outputs are given back."""

    x: Tensor
    sizes: list[int] | None
    """Running sequences at each step, longest first; ``None`` if all run to the end."""
    is_batched: bool
    batch_first: bool
    packed: PackedSequence | None
    rows: Tensor | None
    """Places of packed rows in ``x``; ``None`` if they fill it."""

    @classmethod
    def of(cls, input: Tensor | PackedSequence, batch_first: bool) -> Form:
        """The form of a layer's input."""
        if isinstance(input, PackedSequence):
            if not torch.compiler.is_compiling():
                check_packed(input)
            sizes = integers(input.batch_sizes)
            uneven = None if sizes[-1] == sizes[0] else sizes
            running = Running(len(sizes), sizes[0], uneven)
            rows = running.rows(input.data.device)
            return cls(running.padded(input.data, rows), uneven, True, False, input, rows)
        is_batched = input.ndim == 3
        x = input if is_batched else input.unsqueeze(1)
        batch_first = batch_first and is_batched
        return cls(x.transpose(0, 1) if batch_first else x, None, is_batched, batch_first, None, None)

    def sort(self, state: list[LayerState]) -> list[LayerState]:
        """First states in the order of the packed sequences."""
        return state if self.packed is None else reordered(state, self.packed.sorted_indices)

    def restore(self, outputs: Tensor, last: list[LayerState]) -> tuple[Tensor | PackedSequence, State]:
        """Outputs in the form of the input, and the last states of all layers and directions.

        All are arrays of their own, which may be written into before the backward pass.
        """
        if self.packed is not None:
            last = reordered(last, self.packed.unsorted_indices)
        elif outputs.requires_grad or is_observed():  # tracing repeats itself without gradients
            outputs = outputs.clone()
        states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if not self.is_batched:
            return outputs.squeeze(1), unwrap(tuple(s.squeeze(1) for s in states))
        if self.packed is not None:
            data = outputs.flatten(0, 1)
            data = data.clone() if self.rows is None else data.index_select(0, self.rows)
            return PackedSequence(data, *self.packed[1:]), unwrap(states)
        return outputs.transpose(0, 1) if self.batch_first else outputs, unwrap(states)


def check_packed(packed: PackedSequence) -> None:
    """Raise ValueError where the parts of a packed batch, as ``_replace`` may leave them, contradict each other.

    Indices on other devices than the CPU are checked for their number alone: to read them would wait for the device.
    """
    sizes = packed.batch_sizes
    mend = "keep those of pack_sequence or pack_padded_sequence"
    if not isinstance(sizes, Tensor):
        raise ValueError(f"packed.batch_sizes is a {type(sizes).__name__}, but a tensor is needed; {mend}")
    if sizes.ndim != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
        raise ValueError(
            f"packed.batch_sizes has shape {tuple(sizes.shape)} and dtype {sizes.dtype} on {sizes.device}, but one "
            f"axis of torch.int64 on the CPU is needed; {mend}"
        )
    running = integers(sizes)
    if not running or running[-1] < 1 or running != sorted(running, reverse=True):
        raise ValueError(
            f"packed.batch_sizes={running}, but the sequences running at each step are at least one and never become "
            f"more; {mend}"
        )
    if sum(running) != len(packed.data):
        raise ValueError(
            f"packed.data has {len(packed.data)} rows, but packed.batch_sizes={running} has a sum of {sum(running)}; "
            "replace the data by as many rows, or pack again"
        )
    for name in ("sorted_indices", "unsorted_indices"):
        check_order(name, getattr(packed, name), running[0])


def check_order(name: str, indices: Tensor | None, samples: int) -> None:
    """Raise ValueError where the indices of a packed batch are no order of its sequences."""
    if indices is None:
        return
    if indices.shape != (samples,) or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"packed.{name} has shape {tuple(indices.shape)} and dtype {indices.dtype}, but an integer for each of "
            f"{samples} sequences is needed; pack again, or leave it None"
        )
    if indices.device.type == "cpu" and sorted(integers(indices)) != list(range(samples)):
        raise ValueError(
            f"packed.{name}={indices.tolist()}, but each of 0 to {samples - 1} is needed once; pack again, or leave it "
            "None"
        )


def reordered(state: list[LayerState], order: Tensor | None) -> list[LayerState]:
    """States ``(..., B, size)`` of each layer and direction in another order of the sequences."""
    if order is None:
        return state
    return [tuple(one.index_select(-2, order) for one in cell) for cell in state]


def first_states(
    hx: State | None, x: Tensor, sizes: dict[str, int], cells: int, is_batched: bool, modes: int
) -> list[LayerState]:
    """First states of each layer and direction, ``(B, size)`` each: those given, or zero.

    Args:
        hx: Given states, ``(cells, B, size)`` each, for one statistics mode or for all.
        x: The input, ``(T, ..., B, input_size)``.
        sizes: Features of each state by its name.
        cells: Number of layers times directions.
        is_batched: Whether given states have a batch axis.
        modes: How many statistics modes the input is for.

    Raises:
        ValueError: ``hx`` has another number of states, or one has another shape.
        TypeError: A state is no tensor, or has another dtype than the input.
        RuntimeError: Or lies on another device.
    """
    samples = math.prod(x.shape[1:-1])  # of all modes together
    shapes = [(cells, samples, size) for size in sizes.values()]
    if hx is None:
        return [tuple(x.new_zeros(shape[1:]) for shape in shapes) for _ in range(cells)]
    given = named_states(hx, tuple(sizes), x)
    batches = ((samples,), (samples // modes,)) if is_batched else ((),)
    for state, (name, size) in zip(given, sizes.items(), strict=True):
        fitting = [(cells, *batch, size) for batch in batches]
        if tuple(state.shape) not in fitting:
            raise ValueError(f"hx: {name} has shape {tuple(state.shape)}, but {fitting[0]} is needed; reshape it")
    if not is_batched:
        given = tuple(state.unsqueeze(1) for state in given)
    given = tuple(state if state.shape[1] == samples else state.repeat(1, modes, 1) for state in given)
    return list(zip(*(state.unbind(0) for state in given), strict=True))


def named_states(hx: State, names: Sequence[str], x: Tensor) -> tuple[Tensor, ...]:
    """Given states as a tuple; raise unless they are one tensor for each name, of the dtype and device of ``x``."""
    if not isinstance(hx, Iterable):
        raise TypeError(f"hx={hx!r}, but tensors are needed: {', '.join(names)}; pass one of each")
    given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if len(given) != len(names):
        raise ValueError(f"hx has {len(given)} tensors, but the states are {', '.join(names)}; pass one of each")
    for name, state in zip(names, given, strict=True):
        if not isinstance(state, Tensor):
            raise TypeError(
                f"hx: {name} is a {type(state).__name__}, but a tensor is needed; pass one, or leave hx out"
            )
        check_dtype(state, x, f"hx: {name}", "the input has")
    return given


def unwrap(states: tuple[Tensor, ...]) -> State:
    """A single state by itself, several as a tuple."""
    return states[0] if len(states) == 1 else states


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """Length of each sequence, longest first, from the running sequences at each step."""
    return (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]), device=batch_sizes.device)).sum(0)


def is_running(sizes: Sequence[int], x: Tensor) -> Tensor:
    """Whether each sequence is running at each step: ``(T, B, 1)``."""
    running = torch.tensor(sizes, device=x.device)[:, None, None]
    return torch.arange(x.shape[-3], device=x.device)[:, None] < running


def reversal(sizes: list[int], x: Tensor) -> Tensor:
    """Index of the step that each step is read from when every sequence is reversed within its length: ``(T, B)``."""
    lengths = lengths_of(torch.tensor(sizes, device="cpu")).to(x.device)
    steps = torch.arange(len(sizes), device=x.device)[:, None]
    return torch.where(steps < lengths, lengths - 1 - steps, steps)


def flip(x: Tensor, back: Tensor | None) -> Tensor:
    """``x`` of shape ``(T, ..., B, size)`` reversed in time, each sequence within its own length."""
    if back is None:
        return x.flip(0)
    return x.gather(0, back[..., None].expand_as(x))
