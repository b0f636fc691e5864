"""Sequences of different lengths in one padded batch, and states as torch's layers return them."""

from __future__ import annotations

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]


def unwrap(states: tuple[Tensor, ...]) -> State:
    """A cell's only state by itself, several as a tuple."""
    return states[0] if len(states) == 1 else states


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """Length of each sequence, longest first, from the number running at each step."""
    return (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)


def is_running(sizes: list[int], x: Tensor) -> Tensor:
    """Whether a sequence still runs: ``(T, B, 1)``."""
    running = torch.tensor(sizes, device=x.device)[:, None, None]
    return torch.arange(x.shape[-3], device=x.device)[:, None] < running


def reversal(sizes: list[int], x: Tensor) -> Tensor:
    """Which step stands at each step once every sequence is turned round by its own length: ``(T, B)``."""
    lengths = lengths_of(torch.tensor(sizes)).to(x.device)
    steps = torch.arange(len(sizes), device=x.device)[:, None]
    return torch.where(steps < lengths, lengths - 1 - steps, steps)


def flip(x: Tensor, back: Tensor | None) -> Tensor:
    """``x`` of shape ``(T, ..., B, size)`` turned round in time, each sequence by its own length."""
    if back is None:
        return x.flip(0)
    return x.gather(0, back[..., None].expand_as(x))
