"""The directions of a recurrent layer in one call: those prepared by earlier calls, and the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_bln._torch import is_observed, is_plain
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
        self.inference: dict[str, Inference] = {}
        self.training: dict[str, Training] = {}
        self.running: Running | None = None
        """The batch that training saw last."""

    def calls(self, layer: HasCells) -> dict[str, Any]:
        """Those for what the layer does now: train with gradients, or evaluate without."""
        if layer.training is not torch.is_grad_enabled():
            return {}
        return self.training if layer.training else self.inference


KEPT: WeakKeyDictionary[HasCells, Kept] = WeakKeyDictionary()
"""No attribute of layers, whose copies and files have nothing to do with it."""


class Directions:
    """All directions of a layer in one call.

    Args:
        layer: The layer.
        suffixes: Endings of the names of their parameters.
        x: The layer's input, ``(T, ..., B, input_size)``.
        sizes: Running sequences at each step; ``None`` if all run to the end.
        fan: The statistics modes along the second axis of ``x``.
        start: Steps before the first one.
    """

    def __init__(
        self,
        layer: HasCells,
        suffixes: Iterable[str],
        x: Tensor,
        sizes: list[int] | None,
        fan: FanOut | None,
        start: int,
    ) -> None:
        self.layer, self.sizes, self.fan = layer, sizes, fan
        self.running = Running.of(x, sizes, start)
        # arguments are kept of plain tensors where nothing looks on
        usual = fan is None and sizes is None and not torch.compiler.is_compiling() and not is_observed()
        self.may_keep = usual and is_plain(x)
        self.known = self._known(suffixes, x) if self.may_keep else {}
        self.weights = {name: layer._weights(name) for name in suffixes if name not in self.known}

    def _known(self, suffixes: Iterable[str], x: Tensor) -> dict[str, Any]:
        kept = KEPT.get(self.layer)
        calls = {} if kept is None else kept.calls(self.layer)
        own = {name: calls[name] for name in suffixes if name in calls}
        return {name: call for name, call in own.items() if call.serves(self.layer, name, x.dtype, self.running)}

    def run(self, suffix: str, x: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """Outputs and last states of one of them, forward in time."""
        if suffix in self.known:
            return self.known[suffix].run(x, state, self.running.start)
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

    def keep(self, x: Tensor) -> None:
        """Prepare those that have run, as far as they can be, for calls like this one, which had the input ``x``."""
        if not (self.may_keep and self.weights):
            return
        layer, kept = self.layer, KEPT.setdefault(self.layer, Kept())
        seen, kept.running = kept.running, self.running
        if layer.training and seen != self.running:
            return  # which may be of one length each
        kind: type[Inference | Training] = Training if layer.training else Inference
        calls = kept.calls(layer)
        for name, weights in self.weights.items():
            calls.pop(name, None)
            if layer.training is torch.is_grad_enabled() and runs_fused(layer.backend, weights, x):
                found = kind.of(layer, name, weights, self.running)
                if found is not None:
                    calls[name] = found
