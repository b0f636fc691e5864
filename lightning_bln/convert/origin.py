"""Settings of a BatchNorm that its counterpart has no place for, kept with it for the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

ORIGIN = "torch_origin"
"""Attribute of a Normalization that was a BatchNorm; a plain one, so that copies and pickles have it."""


class Origin(NamedTuple):
    """A BatchNorm as it was when it was converted."""

    kind: type[nn.Module]
    """Its class in torch, which alone knows how many axes it takes."""
    momentum: float | None
    tracks: bool
    """Its ``track_running_stats``."""
    has_statistics: bool
    batches: int | None
    """Its ``num_batches_tracked``; ``None`` where it had no count."""
    dtype: torch.dtype
    """That of its running statistics, which a population keeps in no less than float32."""


def remember(module: Any, base: type[nn.Module], converted: nn.Module) -> None:
    """Let the counterpart of the BatchNorm ``module`` remember it."""
    count = module.num_batches_tracked
    batches = None if count is None else 0 if count.is_meta else int(count)
    has_statistics = module.running_mean is not None and module.running_var is not None
    dtype = module.running_mean.dtype if has_statistics else torch.get_default_dtype()
    found = Origin(base, module.momentum, module.track_running_stats, has_statistics, batches, dtype)
    setattr(converted, ORIGIN, found)


def origin_of(layer: nn.Module) -> Origin | None:
    """The BatchNorm that a layer was, if it was one."""
    return vars(layer).get(ORIGIN)
