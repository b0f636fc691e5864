"""Calls of a single direction that an earlier one has prepared, past all that other inputs would need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain
from lightning_bln.recurrence.parameters import HasCells
from lightning_bln.recurrence.prepared.directions import KEPT
from lightning_bln.recurrence.prepared.inference import Final, Inference
from lightning_bln.recurrence.sequences import LayerState, Running
from lightning_bln.recurrence.streaming import follow


def ready_step(cell: HasCells, x: Any, hx: Any, start: int) -> Tensor | LayerState | None:
    """The next state of a single-step cell from ``(B, input_size)``; ``None`` where no call is ready for these."""
    call = prepared(cell, "", start)
    if call is None or not is_fitting(call, x, 2, cell.input_size):
        return None
    samples = x.shape[0]
    state = given(call, hx, (samples, call.units))
    found = None if state is None else run(cell, "", call, x, state, Running(1, samples, None, start))
    if found is None:
        return None
    last = found[1]
    after: Any = last[0] if len(last) == 1 else last
    if call.has_steps:
        follow(cell, hx, start, after)
    return after


def ready_sequence(layer: HasCells, x: Any, hx: Any, start: int) -> tuple[Tensor, Tensor | LayerState] | None:
    """Outputs and last states of a layer of one direction, time first, from ``(T, B, input_size)``; ``None`` likewise.

    The states have an axis of one in front, as those of :class:`torch.nn.LSTM`.
    """
    call = prepared(layer, "_l0", start)
    if call is None or not is_fitting(call, x, 3, layer.input_size):
        return None
    steps, samples, _ = x.shape
    state = given(call, hx, (1, samples, call.units))
    found = None if state is None else run(layer, "_l0", call, x, state, Running(steps, samples, None, start))
    if found is None:
        return None
    output, last = found
    states = tuple(one.unsqueeze(0) for one in last)
    after: Any = states[0] if len(states) == 1 else states
    if call.has_steps:
        follow(layer, hx, start, after)
    return output, after


def prepared(layer: HasCells, suffix: str, start: Any) -> Inference | None:
    """The call that was prepared for inference, if any, where nothing looks on."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_observed():
        return None
    kept = KEPT.get(layer, {}).get(False)
    call = None if kept is None or type(start) is not int or start < 0 else kept.calls.get(suffix)
    return call if isinstance(call, Inference) else None


def run(layer: HasCells, suffix: str, call: Inference, x: Tensor, state: LayerState, running: Running) -> Final | None:
    """Outputs and last states; ``None`` where the layer is not as it was."""
    tensors = call.ready(layer, suffix, running)
    if tensors is None:
        return None
    KEPT[layer][False].served = True
    return call.run(tensors, x, state, running.steps, running.samples, running.start)


def is_fitting(call: Inference, x: Any, axes: int, features: int) -> bool:
    """Whether an input needs no other form, and holds data."""
    is_tensor = isinstance(x, Tensor) and is_plain(x) and x.dtype is call.dtype
    return is_tensor and x.ndim == axes and x.shape[-1] == features and x.numel() > 0


def given(call: Inference, hx: Any, shape: tuple[int, ...]) -> LayerState | None:
    """First states as they are, or zeros; ``None`` where they need a look."""
    if hx is None:
        return tuple(call.new_zeros(shape) for _ in range(call.states))
    state = (hx,) if call.states == 1 else hx
    if type(state) is not tuple or len(state) != call.states:
        return None
    is_given = all(isinstance(one, Tensor) and is_plain(one) and one.dtype is call.dtype for one in state)
    return state if is_given and all(one.shape == shape for one in state) else None
