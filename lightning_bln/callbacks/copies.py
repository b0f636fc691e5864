"""Copies of a batch for runs that may change theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln.per_mode import PerMode
from lightning_bln.sweep.pytree import versions

COPIED = (Tensor, PackedSequence, np.ndarray, list, tuple, dict, set)
UNCHANGING = (str, bytes, int, float, complex, bool, type(None), range, torch.dtype, torch.device)


def alike(tensor: Tensor) -> Tensor:
    """A copy of a tensor, which autograd may use if it may use that."""
    with torch.inference_mode(tensor.is_inference()):
        return tensor.detach().clone()


class Copies:
    """Copies of a batch for runs that may change theirs: new containers each time, new tensors after a write.

    Attributes:
        shared: The type of an object in the batch that cannot be copied, so that all runs have it in common, or None.
    """

    def __init__(self, batch: Any) -> None:
        self.original = batch
        self.shared: str | None = None
        self.renew()

    def renew(self) -> None:
        self.first = self.mapped(self.original, alike)
        self.tensors: list[Tensor] = []
        self.mapped(self.first, self.taken)
        self.versions = versions(self.tensors)

    def taken(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor)
        return tensor

    def next(self) -> Any:
        """The copy for the next run."""
        was_written = self.versions is None or any(isinstance(one, PerMode) for one in self.tensors)
        if was_written or self.versions != versions(self.tensors):
            self.renew()
        return self.mapped(self.first, lambda tensor: tensor)

    def mapped(self, value: Any, function: Callable[[Tensor], Any]) -> Any:
        """``value`` in new containers, with ``function`` of each tensor; objects of unknown types are copied whole."""
        if isinstance(value, Tensor):
            return function(value)
        if isinstance(value, UNCHANGING):
            return value
        if isinstance(value, PackedSequence):
            return value._replace(**{name: function(one) for name, one in value._asdict().items() if one is not None})
        if isinstance(value, np.ndarray):
            return value.copy()
        if type(value) in (set, frozenset):
            return copy(value)
        try:
            return self.rebuilt(value, function)
        except Exception as error:  # whatever a type of the user's may raise where it is copied
            self.shared = f"{type(value).__name__}, which cannot be copied ({type(error).__name__})"
            return value

    def rebuilt(self, value: Any, function: Callable[[Tensor], Any]) -> Any:
        """A container or an object of an unknown type, copied."""
        kind = type(value)
        if isinstance(value, tuple):
            parts = [self.mapped(one, function) for one in value]
            return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
        if isinstance(value, list):
            made = copy(value)
            made[:] = [self.mapped(one, function) for one in value]
            return made
        if isinstance(value, Mapping):
            entries: Any = copy(value)
            for key in list(value):
                entries[key] = self.mapped(value[key], function)
            return entries
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            whole: Any = copy(value)
            for name, one in vars(value).items():
                object.__setattr__(whole, name, self.mapped(one, function))
            return whole
        try:
            return deepcopy(value)
        except Exception:  # tensors that belong to a graph, locks: its attributes one by one
            other: Any = copy(value)
            if not vars(value) or other is value:
                raise
            for name, one in vars(value).items():
                vars(other)[name] = self.mapped(one, function) if isinstance(one, COPIED) else one
            return other
