"""Sequences in parts: the steps that came before, and a word where they were forgotten."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lightning_bln._checks import check_int
from lightning_bln._torch import is_observed, is_plain
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.gate_norm import GateNorm

GIVEN_OUT: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""The last state of each layer, held so that no other tensor lies where it does."""

WARNED: WeakSet[nn.Module] = WeakSet()


def check_start(start: Any, is_bidirectional: bool) -> None:
    """Raise unless ``start`` counts steps, and a layer can have had some.

    Raises:
        TypeError: It is no integer.
        ValueError: It is negative, or the layer reads sequences from their end, too.
    """
    if type(start) is not int and not isinstance(start, torch.SymInt):
        check_int("start", start)
    if start < 0:
        raise ValueError(f"start={start}, but it counts steps that came before; pass at least 0")
    if is_bidirectional and start:
        raise ValueError(f"start={start}, but a bidirectional layer reads whole sequences; pass them in one piece")


def follow(layer: nn.Module, hx: Any, start: int, last: Any) -> None:
    """Warn, once, where a layer gets back the state it gave out, as if the sequence began anew.

    Statistics of separate steps are those of the first ones then.

    Args:
        layer: A recurrent layer.
        hx: First states of a call, if any.
        start: Steps before.
        last: The states that it gives out.
    """
    if layer.norm is None or layer.training or torch.compiler.is_compiling() or is_observed() or layer in WARNED:
        return
    comes_back = hx is not None and not start and is_the_last(layer, first_of(hx))
    if comes_back and evaluates_steps(layer):
        WARNED.add(layer)
        GIVEN_OUT.pop(layer, None)
        warnings.warn(
            "a state that the layer gave out comes back without start=, so the population of the first steps is used "
            "again; pass start=, the number of steps before, or build the layer with time_statistics='shared'",
            stacklevel=3,
        )
    elif is_plain(first_of(last)):
        GIVEN_OUT[layer] = first_of(last).detach()


def first_of(state: Any) -> Tensor:
    """The first of a cell's states."""
    return state if isinstance(state, Tensor) else state[0]


def is_the_last(layer: nn.Module, state: Tensor) -> bool:
    """Whether a state lies where the one lies that the layer gave out last."""
    given = GIVEN_OUT.get(layer)
    return (
        given is not None
        and is_plain(state)
        and state.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    )


def evaluates_steps(layer: nn.Module) -> bool:
    """Whether a layer evaluates by statistics of several steps."""
    norms = (one for one in layer.children() if isinstance(one, (GateNorm, FrozenNorm)))
    return any(one.reads() is not None and one.steps_known > 1 for one in norms)
