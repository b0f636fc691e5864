"""A recurrent layer under fan-out, one statistics mode after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._scoped import setting
from lightning_bln.modes import FanOut, Stacked, mode_layers
from lightning_bln.per_mode import NotTogether, join_trees, part_of
from lightning_bln.per_mode.layers import laid_out, taken_apart
from lightning_bln.per_mode.tensor import count
from lightning_bln.recurrence.sequences import lengths_of

Sequences = Tensor | PackedSequence


def run_each_mode(
    layer: nn.Module, input: Sequences, hx: Any, fan: FanOut, batch_dim: int, start: int = 0
) -> tuple[Sequences, Any]:
    """Outputs and states of ``layer`` in every mode of ``fan``, mode by mode along the batch axis.

    Raises:
        ValueError: A packed input holds other sequences than those of every mode, one mode after the other.
    """
    number, is_fanned = len(fan.modes), fan.is_fanned
    parts: list[Any] = [input] * number
    if is_fanned and isinstance(input, PackedSequence):
        parts = split_packed(input, number)
    elif is_fanned and isinstance(input, Tensor):
        parts = list(input.chunk(number, batch_dim))
    fan.is_fanned = True
    states = split_states(hx, number, samples_of(parts[0], batch_dim))
    layers, results = mode_layers(layer), []
    with setting(layers, fan=None):
        for mode, part, state in zip(fan.modes, parts, states, strict=True):
            # not by name: within a joint evaluation the layers have no mode to restore, but a sentinel
            with setting(layers, _mode=mode):
                results.append(layer(part, state, start=start))
    outputs, last = zip(*results, strict=True)
    if not isinstance(input, PackedSequence):
        output: Sequences = torch.cat(outputs, batch_dim)
    elif is_fanned:
        back = rows_of_modes(input, number).flatten().argsort()
        output = input._replace(data=torch.cat([part.data for part in outputs]).index_select(0, back))
    else:
        output = join_packed(list(outputs))
    if isinstance(last[0], Tensor):
        return output, torch.cat(last, 1)
    return output, tuple(torch.cat(parts, 1) for parts in zip(*last, strict=True))


def run_each_part(layer: nn.Module, fan: Stacked | None, input: Any, hx: Any, *, start: int = 0) -> Any:
    """The result of ``layer`` for the part of each mode, in that mode, joined."""
    if layer.training:
        raise NotTogether(f"{type(layer).__name__} in training is called with what differs between modes")
    size = count((input, hx)) if fan is None else len(fan.modes)
    layers, results = mode_layers(layer), []
    with setting(layers, fan=None):
        for place in range(size):
            # not by name: within a joint evaluation the layers have no mode to restore, but a sentinel
            with setting(layers, **({} if fan is None else {"_mode": fan.modes[place]})):
                results.append(layer(part_of(input, place), part_of(hx, place), start=start))
    return join_trees(results)


def run_along_batch(layer: Any, input: Any, hx: Any, start: int) -> Any:
    """The result of a ``layer`` without statistics, modes laid out along its batch axis where there is one."""
    x = input.data if isinstance(input, PackedSequence) else input
    if isinstance(input, PackedSequence) or x.ndim != 3 or mode_layers(layer) or layer.training:
        return run_each_part(layer, None, input, hx, start=start)
    size, batch_dim = count((input, hx)), 0 if layer.batch_first else 1
    states = None if hx is None else [hx] if isinstance(hx, Tensor) else list(hx)
    laid: Any = None if states is None else tuple(laid_out(one, 1, size) for one in states)
    if isinstance(hx, Tensor):
        laid = laid[0]
    output, last = layer(laid_out(input, batch_dim, size), laid, start=start)
    parted = [taken_apart(one, 1, size) for one in ((last,) if isinstance(last, Tensor) else last)]
    return taken_apart(output, batch_dim, size), parted[0] if isinstance(last, Tensor) else tuple(parted)


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
    order = order_of(first)
    offset = torch.arange(number, device=order.device) * len(order)
    return PackedSequence(
        torch.stack([part.data for part in parts], 1).flatten(0, 1),
        first.batch_sizes * number,
        (order[:, None] + offset).flatten(),
    )


def split_packed(packed: PackedSequence, number: int) -> list[PackedSequence]:
    """The packed batch of each mode, from one whose sequences, unpacked, are those of one mode after the other.

    Besides what :func:`join_packed` returns, such a batch comes from packing a tensor that has modes along its batch
    axis.

    Raises:
        ValueError: Modes have sequences of other lengths, there are no parts of equal size, or the order is not given.
    """
    rows = rows_of_modes(packed, number)
    sizes = torch.div(packed.batch_sizes, number, rounding_mode="floor")
    samples, order = int(sizes[0]), order_of(packed)
    orders = [order[order // samples == mode] - mode * samples for mode in range(number)]
    data = packed.data
    return [PackedSequence(data.index_select(0, own), sizes, one) for own, one in zip(rows, orders, strict=True)]


def rows_of_modes(packed: PackedSequence, number: int) -> Tensor:
    """Each mode's rows of ``packed.data``, in order: ``(number, rows)``; raises as :func:`split_packed`."""
    if packed.sorted_indices is None:
        # sequences of equal lengths may follow one another by mode or, from join_packed, by place in the batch
        raise ValueError("a packed input was fanned out before it was packed; run each mode on its own")
    sizes = packed.batch_sizes
    total = int(sizes[0])
    order = packed.sorted_indices.cpu()
    lengths = torch.empty_like(order)
    lengths[order] = lengths_of(sizes)
    if total % number or (lengths.view(number, -1) != lengths[: total // number]).any():
        raise ValueError(
            f"{total} packed sequences of lengths {lengths.tolist()} are not the same lengths once for each of "
            f"{number} modes; pack before the first layer with a mode, or run each mode on its own"
        )
    running = torch.arange(total) < sizes[:, None]
    mode = (order // (total // number)).expand_as(running)[running]
    return mode.argsort(stable=True).view(number, -1).to(packed.data.device)


def order_of(packed: PackedSequence) -> Tensor:
    """The index that each sequence, longest first, has in the batch."""
    if packed.sorted_indices is not None:
        return packed.sorted_indices
    return torch.arange(int(packed.batch_sizes[0]), device=packed.data.device)
