"""Writing into buffers: in turns, and where nothing changes but numbers."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor


class Turns:
    """A lock, in a list so that a forked process, in which no thread would open it, has one of its own."""

    locks: ClassVar[list[Any]] = [RLock()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: Turns.locks.__setitem__(0, RLock()))


def one_at_a_time() -> AbstractContextManager[Any]:
    """Context in which one thread at a time adds to populations, so that none is lost; graphs hold no locks."""
    return nullcontext() if torch.compiler.is_compiling() else Turns.locks[0]


def may_hold(buffer: Tensor, value: Tensor) -> bool:
    """Whether ``value`` can be written into ``buffer`` and nothing changes but numbers."""
    return (
        buffer.shape == value.shape
        and buffer.dtype == value.dtype
        and buffer.device == value.device
        and not (buffer.is_inference() or buffer.requires_grad)
        and buffer.is_contiguous()
    )
