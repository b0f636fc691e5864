"""A recurrent layer under fan-out, one statistics mode after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._scoped import setting
from lightning_bln.modes import FanOut, mode_layers, using_mode

Sequences = Tensor | PackedSequence


def run_each_mode(layer: nn.Module, input: Sequences, hx: Any, fan: FanOut, batch_dim: int) -> tuple[Sequences, Any]:
    """Outputs and states of ``layer`` in every mode of ``fan``, mode by mode along the batch axis.

    Raises:
        ValueError: A packed input was fanned out by anything but a recurrent layer, so its order is unknown.
    """
    number = len(fan.modes)
    parts: list[Any] = [input] * number
    if fan.is_fanned and isinstance(input, PackedSequence):
        parts = split_packed(input, number)
    elif fan.is_fanned and isinstance(input, Tensor):
        parts = list(input.chunk(number, batch_dim))
    fan.is_fanned = True
    states = split_states(hx, number, samples_of(parts[0], batch_dim))
    with setting(mode_layers(layer), fan=None):
        results = []
        for mode, part, state in zip(fan.modes, parts, states, strict=True):
            with using_mode(layer, mode):
                results.append(layer(part, state))
    outputs, last = zip(*results, strict=True)
    packed = isinstance(outputs[0], PackedSequence)
    output = join_packed(list(outputs)) if packed else torch.cat(outputs, batch_dim)
    if isinstance(last[0], Tensor):
        return output, torch.cat(last, 1)
    return output, tuple(torch.cat(parts, 1) for parts in zip(*last, strict=True))


def samples_of(part: Sequences, batch_dim: int) -> int:
    """Number of sequences."""
    return int(part.batch_sizes[0]) if isinstance(part, PackedSequence) else part.shape[batch_dim]


def split_states(hx: Any, number: int, samples: int) -> list[Any]:
    """First states for each mode: its own if ``hx`` has one for each, else the same for all."""
    if hx is None:
        return [None] * number
    given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if all(state.ndim == 3 and state.shape[1] == samples * number for state in given):
        split = list(zip(*(state.chunk(number, 1) for state in given), strict=True))
    else:
        split = [given] * number
    return [state[0] if isinstance(hx, Tensor) else state for state in split]


def join_packed(parts: list[PackedSequence]) -> PackedSequence:
    """One packed batch of several with equal lengths; unpacked, the parts follow one another.

    At each step the rows of one sequence in all parts stand side by side, so that lengths still fall.
    """
    first, number = parts[0], len(parts)
    samples = int(first.batch_sizes[0])
    identity = torch.arange(samples, device=first.data.device)
    sorted_indices = identity if first.sorted_indices is None else first.sorted_indices
    unsorted_indices = identity if first.unsorted_indices is None else first.unsorted_indices
    offset = torch.arange(number, device=first.data.device)
    return PackedSequence(
        torch.stack([part.data for part in parts], 1).flatten(0, 1),
        first.batch_sizes * number,
        (sorted_indices[:, None] + offset * samples).flatten(),
        (unsorted_indices * number + offset[:, None]).flatten(),
    )


def split_packed(packed: PackedSequence, number: int) -> list[PackedSequence]:
    """The inverse of :func:`join_packed`."""
    if packed.sorted_indices is None or packed.unsorted_indices is None:
        raise ValueError("a packed input was fanned out before it was packed; run each mode on its own")
    samples = int(packed.batch_sizes[0]) // number
    sizes = torch.div(packed.batch_sizes, number, rounding_mode="floor")
    return [
        PackedSequence(data, sizes, packed.sorted_indices[::number], packed.unsorted_indices[:samples] // number)
        for data in packed.data.unflatten(0, (-1, number)).unbind(1)
    ]
