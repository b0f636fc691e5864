"""State that a module holds, so that a forward which changes any of it is told from one that only computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bln._torch import MODULE_INTERNALS, own_buffers, writes
from lightning_bln.modes import HasMode
from lightning_bln.population import Population

LEFT_OUT = (HasMode, Population, torch.jit.ScriptModule)
"""Modules whose state is no user's."""

SMALL = 4096
"""Entries of a container, or of an array without a count of writes, up to which each is looked at."""

UPDATES = "_update_count"
"""The attribute in which a metric counts its updates, so that nothing else of it has to be looked at."""

UNCHANGING = frozenset({int, float, bool, str, type(None)})

LARGE = 2**16
"""Numbers of a tensor, or entries of a container, above which no copy is made."""


def snapshot(module: nn.Module) -> list[Any]:
    """The state of every part of ``module`` but layers with a mode: attributes and buffers, by identity and writes."""
    found: list[Any] = []
    for part in module.modules():
        if isinstance(part, LEFT_OUT):
            continue
        fields = part.__dict__
        if UPDATES in fields:
            found.append(fields[UPDATES])
            continue
        for name in fields.keys() - MODULE_INTERNALS:
            value = fields[name]
            if type(value) in UNCHANGING:
                found.append((name, value))
            elif name != "forward":
                found.append((name, state_of(value)))
        found += [state_of(value) for value in own_buffers(part).values()]
    return found


def state_of(value: Any, depth: int = 3) -> Any:
    """The state of a value: its identity, and what shows that it has been written into."""
    if isinstance(value, Tensor):
        return id(value), state_of_tensor(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes() if value.size <= SMALL else None
    if not depth:
        return id(value)
    if isinstance(value, dict):
        held = list(value.items()) if len(value) <= SMALL else []
        return id(value), len(value), [(id(key), state_of(one, depth - 1)) for key, one in held]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return id(value), len(value), [state_of(one, depth - 1) for one in (value if len(value) <= SMALL else ())]
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__") or isinstance(value, type) or callable(value):
        return id(value)
    if type(value).__module__.partition(".")[0] in {"torch", "lightning", "pytorch_lightning", "lightning_fabric"}:
        return id(value)
    return id(value), [(name, state_of(one, depth - 1)) for name, one in value.__dict__.items()]


def state_of_tensor(value: Tensor) -> Any:
    """The number of writes into a tensor; its numbers where it does not count them."""
    if not value.is_inference():
        return writes(value)
    stack = getattr(value, "stack", value)
    if stack is None or stack.numel() > SMALL * 16 or stack.layout != torch.strided:
        return None
    return stack.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def isolated(module: nn.Module) -> Iterator[None]:
    """After the context attributes and buffers of ``module`` are as before, whatever its forward did to them.

    Raises:
        RuntimeError: A buffer too large for a copy was written into.
    """
    held: list[tuple[dict[str, Any], dict[str, Any]]] = []
    memo: dict[int, Any] = {}
    large: list[tuple[Tensor, int]] = []
    for part in module.modules():
        if isinstance(part, LEFT_OUT):
            continue
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
        for fields, values in held:
            for name in [name for name in fields if name not in values and name not in MODULE_INTERNALS]:
                del fields[name]
            fields.update(values)
        if any(writes(value) != count for value, count in large):
            raise RuntimeError(f"{type(module).__name__}.forward writes into a buffer of over {LARGE} numbers")


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what may be changed in place: tensors, arrays and plain containers; all else is the same object."""
    if id(value) in memo:
        return memo[id(value)]
    made = value
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        made = value.clone()
    elif isinstance(value, np.ndarray):
        made = value.copy()
    elif type(value) in (list, set, deque) and len(value) <= LARGE:
        made = type(value)(copied(one, memo) for one in value)
    elif isinstance(value, dict) and len(value) <= LARGE:
        made = copy(value)
        for key, one in value.items():
            made[key] = copied(one, memo)
    memo[id(value)] = made
    return made
