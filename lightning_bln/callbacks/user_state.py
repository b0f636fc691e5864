"""State that a user's validation_step keeps besides its log: taken and put back, so that modes do not mix."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_bln._torch import MODULE_INTERNALS, own_buffers, storage_address
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.contents import written
from lightning_bln.callbacks.large_state import MANY, Sharing, Snapshot
from lightning_bln.modes import HasMode
from lightning_bln.per_mode import PerMode
from lightning_bln.population import Population
from lightning_bln.sweep.generators import GENERATORS, set_state, state_of
from lightning_bln.sweep.snapshot import LIBRARIES

METRIC_INTERNALS = MODULE_INTERNALS | _lightning.METRIC_INTERNALS
TRAINER_OWNED = _lightning.HPARAMS | {"forward", "log", "log_dict"}
UNSEARCHED = _lightning.HPARAMS | _lightning.BACK_REFERENCES
SEQUENCES = (list, tuple, set, frozenset)
DICTIONARIES = (dict, OrderedDict, defaultdict, Counter)
MUTABLE = (Tensor, np.ndarray, list, set, dict, deque)
PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, *MUTABLE, tuple, frozenset)
METRICS = (Metric, MetricCollection)
UNCHANGING = frozenset({int, float, bool, str, type(None), FunctionType, MethodType, BuiltinFunctionType})


class UserState:
    """The mutable state of a LightningModule that is neither weight nor statistic.

    It consists of the plain attributes and buffers of the module and its children, the state of every torchmetrics
    object (also in plain lists and dicts), and the fields of small helper objects such as running averages. Values
    are exchanged and objects stay the same, so references that a user holds remain valid.
    """

    def __init__(self, module: nn.Module) -> None:
        root_internals = internals_of(_lightning.bases(module)["LightningModule"])
        every = list(module.modules())
        held = (value for one in every for value in plain_values(one))  # in containers where modules() does not look
        metrics = unique(found for found in [*every, *held] if is_metric(found))
        metrics = unique(part for metric in metrics for part in metric.modules() if is_metric(part))
        ours = {id(part) for one in every if isinstance(one, (HasMode, Population)) for part in one.modules()}
        ours |= {id(part) for metric in metrics for part in metric.modules()}
        children = [child for child in every if child is not module and id(child) not in ours]
        children = [child for child in children if not isinstance(child, torch.jit.ScriptModule)]

        self.owners: list[tuple[dict[str, Any], frozenset[str]]] = [(module.__dict__, root_internals)]
        for child in children:
            kinds = (*PLAIN, *GENERATORS)
            if any(isinstance(value, kinds) and name not in MODULE_INTERNALS for name, value in child.__dict__.items()):
                self.owners.append((child.__dict__, MODULE_INTERNALS | {"forward"}))
        for metric in metrics:
            self.owners.append((metric.__dict__, METRIC_INTERNALS if isinstance(metric, Metric) else MODULE_INTERNALS))
        for holder in [module, *children]:
            helpers = unique(value for value in plain_values(holder) if is_helper(value))
            self.owners += [(helper.__dict__, frozenset()) for helper in helpers]
            buffers = own_buffers(holder)
            if buffers:
                self.owners.append((buffers, frozenset()))
        held = (value for fields, _ in self.owners for value in values_of(fields))
        self.generators = unique(one for one in held if isinstance(one, GENERATORS))
        self.sharing = Sharing()

    def take(self) -> Snapshot:
        """The state as it is, by reference."""
        state = [{name: value for name, value in fields.items() if name not in skip} for fields, skip in self.owners]
        if self.generators:
            state.append({str(place): state_of(one) for place, one in enumerate(self.generators)})
        return Snapshot(state, self.sharing)

    def put(self, snapshot: Snapshot) -> None:
        """Make ``snapshot`` the state."""
        values_of_owners: list[dict[str, Any]] = list(snapshot)
        if self.generators:
            states = values_of_owners.pop()
            for generator, state in zip(self.generators, states.values(), strict=True):
                set_state(generator, state)
        for (fields, skip), values in zip(self.owners, values_of_owners, strict=True):
            if len(fields) > len(values):
                for name in list(fields):
                    if name not in values and name not in skip:
                        del fields[name]
            fields.update(values)

    def write(self, snapshot: Snapshot) -> None:
        """Make ``snapshot`` the state, its contents in the objects that are there, which others may refer to."""
        memo: dict[int, Any] = {}
        present = self.take()
        self.put(
            Snapshot(
                (
                    {name: written(before.get(name), value, memo) for name, value in values.items()}
                    for before, values in zip(present, snapshot, strict=True)
                ),
                self.sharing,
            )
        )

    @contextmanager
    def holding(self, run: Any) -> Iterator[None]:
        """Within the context the state is ``run.state``, which steps may change; it is put back as they leave it."""
        before = self.take()
        self.sharing.check()
        with self.sharing.guarded(run):
            try:
                self.put(run.state)
                yield
            finally:
                run.state = self.take()
                self.put(before)

    @staticmethod
    def comparable(snapshot: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The values of a snapshot to compare with another's: what both share stands for itself by its identity."""
        sharing = getattr(snapshot, "sharing", None)
        shared = {} if sharing is None else sharing.values
        return [
            {name: ("shared", id(value)) if id(value) in shared else value for name, value in values.items()}
            for values in snapshot
        ]

    @staticmethod
    def copy(
        snapshot: list[dict[str, Any]], part: int | None = None, shared: Iterable[Any] = (), deep: bool = False
    ) -> Snapshot:
        """A copy of a snapshot in new containers and tensors; references to one object still are to one.

        Args:
            snapshot: From :meth:`take`.
            part: Index of the mode whose part replaces each :class:`PerMode`. By default they are not copied, and
                :func:`~lightning_bln.per_mode.undoable` takes back what is written into them.
            shared: Objects that are not copied.
            deep: Whether each :class:`PerMode` is copied, too.
        """
        memo = Memo({id(one): (one, one) for one in shared})
        memo.sharing = getattr(snapshot, "sharing", None)
        memo.aliased, memo.deep = shared_memory(snapshot), deep
        values_of_owners = [
            {name: value if type(value) in UNCHANGING else rebuild(value, memo, part) for name, value in values.items()}
            for values in snapshot
        ]
        made = Snapshot(values_of_owners, memo.sharing)
        if memo.sharing is not None:
            memo.sharing.join(made)
        return made


@cache
def internals_of(base: type) -> frozenset[str]:
    """Attributes that every LightningModule has."""
    return frozenset(base().__dict__) | TRAINER_OWNED


def own(tensor: Tensor, part: int | None = None) -> Tensor:
    """A copy of ``tensor``, or of the ``part`` of a :class:`PerMode`; without ``part`` that is returned as it is."""
    if isinstance(tensor, PerMode):
        if part is None:
            return tensor
        tensor = tensor.parts[part]
    with torch.inference_mode(False):  # so that it counts what is written into it
        return tensor.detach().clone()


class Memo(dict[int, tuple[Any, Any]]):
    """Copies made so far, each with what it is of, by the identity of that; and what snapshots share."""

    sharing: Sharing | None = None
    aliased: frozenset[int] = frozenset()
    deep = False


def rebuild(value: Any, memo: dict[int, tuple[Any, Any]], part: int | None) -> Any:
    """A copy of what a step may change in place; all else is the same object."""
    if type(value) in UNCHANGING:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known[0]
    sharing = getattr(memo, "sharing", None)
    if sharing is not None and sharing.takes(value):
        return value
    copied = value
    kind = type(value)
    if isinstance(value, Tensor):
        copied = value if isinstance(value, nn.Parameter) else own_in(value, memo, part)
    elif isinstance(value, np.ndarray):
        copied = value.copy()
    elif kind in SEQUENCES:
        copied = kind(rebuild(one, memo, part) for one in value)
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        copied = tuple.__new__(kind, (rebuild(one, memo, part) for one in value))
    elif kind is deque:
        copied = deque((rebuild(one, memo, part) for one in value), value.maxlen)
    elif kind in DICTIONARIES or (isinstance(value, dict) and kind.__module__ not in ("builtins", "collections")):
        copied = copy(value)
        for key, one in value.items():
            copied[key] = rebuild(one, memo, part)
    memo[id(value)] = (copied, value)
    return copied


def own_in(value: Tensor, memo: dict[int, Any], part: int | None) -> Tensor:
    """:func:`own`, in memory that is shared with copies of those tensors with which ``value`` shares its own."""
    aliased = getattr(memo, "aliased", ())
    if isinstance(value, PerMode) and part is None:
        return PerMode.of_stack(value.stacked().detach().clone()) if getattr(memo, "deep", False) else value
    if not aliased:
        return own(value, part)
    plain = value.parts[part] if isinstance(value, PerMode) and part is not None else value
    address = storage_address(plain)
    if address not in aliased:
        return own(value, part)
    plain = plain.detach()
    with torch.inference_mode(False):
        if -address not in memo:  # no identity of an object is negative
            memo[-address] = plain.untyped_storage().clone(), None
        made = torch.empty(0, dtype=plain.dtype, device=plain.device)
        return made.set_(memo[-address][0], plain.storage_offset(), plain.size(), plain.stride())


CACHES = {"_computed", "_forward_cache", "_cache"}
"""Attributes of metrics that hold results, into which nobody writes."""


def shared_memory(snapshot: Iterable[dict[str, Any]]) -> frozenset[int]:
    """The places of memory that several tensors of a snapshot have in common, as a tensor and a view of it have."""
    found: list[Tensor] = []
    seen: set[int] = set()
    for values in snapshot:
        for name, value in values.items():
            if name not in CACHES and type(value) not in UNCHANGING:
                collect(value, found, seen)
    tensors = unique(one for one in found if one.layout == torch.strided)
    counts = Counter(storage_address(one.parts[0] if isinstance(one, PerMode) else one) for one in tensors)
    return frozenset(address for address, count in counts.items() if count > 1 and address)


def collect(value: Any, found: list[Tensor], seen: set[int]) -> None:
    """Append the tensors in nested plain containers to ``found``."""
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (dict, list, tuple, deque)) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            if type(one) not in UNCHANGING:
                collect(one, found, seen)


def is_metric(value: Any) -> bool:
    return isinstance(value, METRICS)


def is_helper(value: Any) -> bool:
    """Whether ``value`` is an object of a user's class with plain values only, such as a running average."""
    if isinstance(value, (nn.Module, type, *PLAIN)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    if type(value).__module__.partition(".")[0] in LIBRARIES:
        return False
    values = value.__dict__.values()
    return bool(values) and all(isinstance(one, (*PLAIN, *GENERATORS, *METRICS)) for one in values)


def plain_values(module: nn.Module) -> Iterator[Any]:
    """Attributes of ``module`` that nn.Module does not manage and that may change, and what their containers hold."""
    return values_of(module.__dict__)


def values_of(fields: dict[str, Any]) -> Iterator[Any]:
    """Attributes that may change, and what their containers hold."""
    for name, value in fields.items():
        if type(value) not in UNCHANGING and name not in MODULE_INTERNALS and name not in UNSEARCHED:
            yield from flattened(value, depth=3)
            if is_helper(value):
                yield from value.__dict__.values()


def flattened(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth and isinstance(value, dict) and len(value) <= MANY:
        for one in value.values():
            yield from flattened(one, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, deque)) and len(value) <= 64:
        for one in value:
            yield from flattened(one, depth - 1)


def unique(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())
