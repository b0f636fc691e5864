"""State that a module holds, so that a forward which changes any of it is told from one that only computes."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bln._torch import MODULE_INTERNALS, own_buffers, writes
from lightning_bln.modes import HasMode
from lightning_bln.population import Population
from lightning_bln.sweep.generators import GENERATORS, set_state
from lightning_bln.sweep.generators import state_of as state_of_generator

LEFT_OUT = (HasMode, Population, torch.jit.ScriptModule)
"""Modules whose state is no user's."""

LARGE = 2**16
"""Numbers of a tensor, or entries of a container, above which no copy is made and none are looked at."""

MOST = 2**28
"""Bytes of an array up to which it is looked at."""

DEFAULTS = "_defaults"
"""The attribute in which a metric has the names of its states."""

UNCHANGING = frozenset({int, float, complex, bool, str, bytes, type(None)})
WHOLE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType, torch.dtype, torch.device)
LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric"}


HELD = -1
"""The key of generators, with their states, in a memo of copies; no identity is negative."""


class Same:
    """An object, equal to itself alone; it is held, so that no other one gets its address."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def snapshot(module: nn.Module) -> list[Any]:
    """The state of every part of ``module`` but layers with a mode: attributes and buffers."""
    found: list[Any] = []
    for part in module.modules():
        if isinstance(part, LEFT_OUT):
            continue
        fields = part.__dict__
        if DEFAULTS in fields:
            found.append(state_of_metric(part))
            continue
        for name in fields.keys() - MODULE_INTERNALS:
            value = fields.get(name)
            if type(value) in UNCHANGING:
                found.append((name, value))
            elif name != "forward":
                found.append((name, state_of(value)))
        found += [state_of(value) for value in own_buffers(part).values()]
    return found


def state_of(value: Any, depth: int = 4) -> Any:
    """The state of a value, equal to a later one only if the value is the same object and holds the same."""
    if type(value) in UNCHANGING:
        return value
    if isinstance(value, Tensor):
        return Same(value), state_of_tensor(value)
    if isinstance(value, np.ndarray):
        is_seen = value.nbytes <= MOST and not value.dtype.hasobject
        return Same(value), zlib.crc32(np.ascontiguousarray(value).tobytes()) if is_seen else object()
    if isinstance(value, GENERATORS):
        return Same(value), repr(state_of_generator(value))
    if isinstance(value, nn.Module) and DEFAULTS in value.__dict__:  # a metric that is no part of a module
        return Same(value), state_of_metric(value)
    if isinstance(value, (*WHOLE, nn.Module)):
        return Same(value)
    if not depth:
        return object()  # equal to nothing, since it is not seen
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        if len(value) > LARGE:
            return object()
        held = [*value, *value.values()] if isinstance(value, dict) else value
        return Same(value), len(value), [state_of(one, depth - 1) for one in held]
    if not hasattr(value, "__dict__") or type(value).__module__.partition(".")[0] in LIBRARIES:
        return Same(value)
    return Same(value), [(name, state_of(one, depth - 1)) for name, one in value.__dict__.items()]


def state_of_metric(metric: nn.Module) -> list[Any]:
    """The states of a metric, and its count of updates."""
    fields = metric.__dict__
    return [fields.get("_update_count"), *(state_of(fields.get(name)) for name in fields[DEFAULTS])]


def state_of_tensor(value: Tensor) -> Any:
    """The number of writes into a tensor; its numbers where it does not count them."""
    if not value.is_inference():
        return writes(value)
    stack = getattr(value, "stack", value)
    if stack is None or stack.numel() > LARGE or stack.layout != torch.strided:
        return object()
    return stack.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """After the context attributes and buffers of ``module`` are as before, whatever its forward did to them.

    Raises:
        RuntimeError: A buffer too large for a copy was written into.
    """
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    parts = [part for part in module.modules() if not isinstance(part, LEFT_OUT)]
    memo: dict[int, Any] = {id(part): part for part in module.modules()}
    large: list[tuple[Tensor, int]] = []
    for part in parts:
        kept = {name: value for name, value in part.__dict__.items() if name not in MODULE_INTERNALS}
        for fields, values in ((part.__dict__, kept), (own_buffers(part), dict(own_buffers(part)))):
            held.append((fields, values))
            for name, value in values.items():
                if isinstance(value, Tensor) and value.numel() > LARGE and not value.is_inference():
                    large.append((value, writes(value)))
                elif name != "forward":
                    fields[name] = copied(value, memo)
    try:
        yield
    finally:
        for generator, state in memo.get(HELD, ()):
            set_state(generator, state)
        for fields, values in held:
            for name in [name for name in fields if name not in values and name not in MODULE_INTERNALS]:
                del fields[name]
            fields.update(values)
        if any(writes(value) != count for value, count in large):
            raise RuntimeError(f"{type(module).__name__}.forward writes into a buffer of over {LARGE} numbers")


def copied(value: Any, memo: dict[int, Any], depth: int = 4) -> Any:
    """A copy of what may be changed in place; objects of libraries and functions are the same."""
    if id(value) in memo or type(value) in UNCHANGING or not depth:
        return memo.get(id(value), value)
    made = value
    if isinstance(value, GENERATORS):
        memo.setdefault(HELD, []).append((value, state_of_generator(value)))
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        made = value.clone()
    elif isinstance(value, np.ndarray):
        made = value.copy()
    elif isinstance(value, nn.Module):
        made = deepcopy(value) if DEFAULTS in value.__dict__ else value  # a metric in a list
    elif type(value) in (list, set, deque) and len(value) <= LARGE:
        made = copy(value)
        made.clear()
        memo[id(value)] = made
        (made.update if isinstance(made, set) else made.extend)(copied(one, memo, depth - 1) for one in value)
    elif isinstance(value, dict) and len(value) <= LARGE:
        made = memo[id(value)] = copy(value)
        for key, one in value.items():
            made[key] = copied(one, memo, depth - 1)
    elif is_helper(value):
        made = copy(value)
        if type(made) is not type(value):
            return value  # a stand-in that copies to something else
        memo[id(value)] = made
        for name, one in value.__dict__.items():
            made.__dict__[name] = copied(one, memo, depth - 1)
    memo[id(value)] = made
    return made


def is_helper(value: Any) -> bool:
    """Whether ``value`` is an object of a user's class with attributes of its own."""
    if isinstance(value, (*WHOLE, Tensor, tuple)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in LIBRARIES
