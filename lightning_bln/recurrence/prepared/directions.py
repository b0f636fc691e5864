"""The directions of a recurrent layer in one call: those prepared by earlier calls, and the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain, own_parameters
from lightning_bln.modes import FanOut
from lightning_bln.recurrence.backends import runs_fused
from lightning_bln.recurrence.direction import run_direction
from lightning_bln.recurrence.parameters import HasCells
from lightning_bln.recurrence.prepared.inference import Inference
from lightning_bln.recurrence.prepared.training import Training
from lightning_bln.recurrence.regularization import Regularization
from lightning_bln.recurrence.sequences import LayerState, Running


class Kept:
    """A layer's prepared directions by the endings of their parameters' names."""

    def __init__(self) -> None:
        self.calls: dict[str, Inference | Training] = {}
        self.running: Running | None = None
        """The batch that training saw last."""
        self.served = True
        """Whether what was prepared last has been of use."""
        self.pause = self.wait = 0
        """How many calls go by before the next is prepared, twice as many each time that it is of no use."""


KEPT: WeakKeyDictionary[HasCells, dict[bool, Kept]] = WeakKeyDictionary()
"""By whether layers train. No attribute of theirs, whose copies and files have nothing to do with it."""

MOST = 64
"""Longest pause."""


class Directions:
    """All directions of a layer in one call.

    Args:
        layer: The layer.
        suffixes: Endings of the names of their parameters.
        x: The layer's input, ``(T, ..., B, input_size)``.
        state: First states of each.
        sizes: Running sequences at each step; ``None`` if all run to the end.
        fan: The statistics modes along the second axis of ``x``.
        start: Steps before the first one.
    """

    def __init__(
        self,
        layer: HasCells,
        suffixes: Iterable[str],
        x: Tensor,
        state: Sequence[LayerState],
        sizes: list[int] | None,
        fan: FanOut | None,
        start: int,
    ) -> None:
        self.layer, self.x, self.sizes, self.fan = layer, x, sizes, fan
        self.running = Running.of(x, sizes, start)
        suffixes = list(suffixes)
        self.kept = self._kept(suffixes[0], [x, *(value for states in state for value in states)])
        self.known = {} if self.kept is None else self._known(self.kept, suffixes)
        self.weights = {name: layer._weights(name) for name in suffixes if name not in self.known}

    def _kept(self, suffix: str, tensors: Sequence[Tensor]) -> Kept | None:
        """Calls that earlier ones like this have prepared; ``None`` where none is.

        They are of plain tensors of one dtype, where nothing looks on, in training with gradients or in evaluation
        without.
        """
        if self.fan is not None or self.sizes is not None or torch.compiler.is_compiling() or is_observed():
            return None
        training, weight = self.layer.training, own_parameters(self.layer).get(f"weight_ih{suffix}")
        if training is not torch.is_grad_enabled() or weight is None:  # one made of others is not to be made once more
            return None
        if not all(is_plain(one) and one.dtype == weight.dtype for one in tensors):
            return None
        return KEPT.setdefault(self.layer, {}).setdefault(training, Kept())

    def _known(self, kept: Kept, suffixes: Iterable[str]) -> dict[str, Any]:
        """Calls that are ready, each with the tensors it reads."""
        found = {}
        for name in suffixes:
            call = kept.calls.get(name)  # looked up once: another thread may put a new one in its place
            if call is not None:
                tensors = call.ready(self.layer, name, self.running)
                if tensors is not None:
                    found[name] = partial(call.run, tensors)
        kept.served |= bool(found)
        return found

    def run(self, suffix: str, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Outputs and last states of one of them, forward in time."""
        if suffix in self.known:
            steps, samples, _, start = self.running
            return self.known[suffix](x, state, steps, samples, start)
        layer = self.layer
        dropout = layer.input_dropout, layer.recurrent_dropout, layer.zoneout
        return run_direction(
            x,
            state,
            self.weights[suffix],
            self.sizes,
            backend=layer.backend,
            regularization=Regularization(*dropout, layer.training),
            recompute=layer.recompute,
            fan=self.fan,
            start=self.running.start,
        )

    def keep(self) -> None:
        """Prepare those that have run, as far as they can be, for calls like this one."""
        kept = self.kept
        if kept is None or not self.weights:
            return
        seen, kept.running = kept.running, self.running
        if self.layer.training and seen != self.running:
            return  # batches may be of one length each
        if kept.wait:
            kept.wait -= 1
            return
        kept.pause = 0 if kept.served else min(2 * kept.pause + 1, MOST)
        kept.wait, kept.served = kept.pause, False
        kind: type[Inference | Training] = Training if self.layer.training else Inference
        for name, weights in self.weights.items():
            is_fused = runs_fused(self.layer.backend, weights, self.x)
            found = kind.of(self.layer, name, weights, self.running) if is_fused else None
            if found is None:
                kept.calls.pop(name, None)
            else:
                kept.calls[name] = found
