"""Gathering as one operator of a compiled graph, in which the size of a buffer that grows would be a constant."""

from __future__ import annotations

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS, disable_current_modes, is_exporting


class Gatherer(Protocol):
    """A population, which takes in the statistics of batches."""

    def take(self, observed: list[Tensor], start: int) -> None:
        """Take in one batch, or begin again where there are no statistics."""


GATHERERS: WeakValueDictionary[int, Gatherer] = WeakValueDictionary()
"""Each by the number in its ticket."""

NUMBERS = count()


def ticket(gatherer: Gatherer) -> Tensor:
    """A tensor that stands for ``gatherer`` in a graph: not a number, so that layers alike share their graph."""
    number = next(NUMBERS)
    GATHERERS[number] = gatherer
    with torch.inference_mode(False), disable_current_modes():  # graphs write into it, whatever it was made in
        return torch.tensor([number], device="cpu")


def gathers_by_ticket(device: torch.device) -> bool:
    """Whether ``torch.compile`` traces for the CPU; graphs of other devices are to hold nothing but kernels."""
    return HAS_CUSTOM_OPS and torch.compiler.is_compiling() and not is_exporting() and device.type == "cpu"


def gather(ticket: Tensor, observed: list[Tensor], start: int) -> None:
    """Let the gatherer of ``ticket`` take in a batch, when the graph runs.

    The ticket counts as written into, or a compiler would leave the operator out.
    """
    GATHERERS[int(ticket)].take([one.clone() for one in observed], start)  # the graph may use their memory again


if HAS_CUSTOM_OPS:
    schema = "(Tensor(a!) ticket, Tensor[] observed, SymInt start) -> ()"
    gather = torch.library.custom_op("lightning_bln::gather", gather, mutates_args=("ticket",), schema=schema)
    gather.register_fake(lambda ticket, observed, start: None)
