"""What a mode has of its own in a validation, and what is needed to give it that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_bln.callbacks.user_state import Snapshot, UserState, own
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.per_mode_tensor import undoable


class Run:
    """What one mode has gathered so far in this validation, or several that go together.

    Args:
        modes: Whose run it is; with several, what differs between them is a
            :class:`~lightning_bln.sweep.per_mode_tensor.PerMode`.
        results: What ``self.log`` fills.
        state: The module's own state.
        metrics: The Trainer's dictionaries of metrics.
    """

    def __init__(
        self, modes: tuple[StatisticsMode, ...], results: Any, state: Snapshot, metrics: list[dict[str, Any]]
    ) -> None:
        self.modes = modes
        self.results = results
        self.state = state
        self.metrics = metrics
        self.hook: str | None = None

    @property
    def mode(self) -> StatisticsMode:
        """The mode of a run that has one."""
        (mode,) = self.modes
        return mode

    def part(self, results: Any, place: int) -> Run:
        """The run of one of the modes, in objects of its own, with ``results`` to be filled."""
        for key, row in self.results.items():
            results[key] = copied_row(row, place)
        results.dataloader_idx = self.results.dataloader_idx
        metrics = [{name: of_part(value, place) for name, value in values.items()} for values in self.metrics]
        run = Run((self.modes[place],), results, UserState.copy(self.state, place), metrics)
        run.hook = self.hook
        return run

    @contextmanager
    def undoable(self) -> Iterator[None]:
        """Within the context, an error leaves the run as it was."""
        rows = {key: (row, dict(row.__dict__)) for key, row in self.results.items()}
        state, metrics, hook = UserState.copy(self.state), [dict(values) for values in self.metrics], self.hook
        try:
            with undoable():
                yield
        except BaseException:
            self.results.clear()
            for key, (row, values) in rows.items():
                row.__dict__.clear()
                row.__dict__.update(values)
                self.results[key] = row
            self.state, self.metrics, self.hook = state, metrics, hook
            raise

    def is_same_as(self, other: Run) -> bool:
        """Whether both have gathered the same values."""
        rows = [{key: row_values(row) for key, row in run.results.items()} for run in (self, other)]
        return same([*rows[:1], self.state, self.metrics], [*rows[1:], other.state, other.metrics])


class Silent:
    """Stands in for a logger while other modes run; takes every call and does nothing."""

    def __getattr__(self, name: str) -> Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Silent:
        return self

    def __getitem__(self, index: Any) -> Silent:
        return self


class Copies:
    """Batches for runs that may change theirs: fresh containers each time, fresh tensors once one was written to."""

    def __init__(self, batch: Any) -> None:
        self.original = batch
        self.renew()

    def renew(self) -> None:
        self.shared = apply_to_collection(self.original, Tensor, torch.clone)
        self.tensors: list[Tensor] = []
        apply_to_collection(self.shared, Tensor, self.tensors.append)
        self.versions = self.current_versions()

    def current_versions(self) -> list[int] | None:
        # inference tensors count no versions, so there every run gets tensors of its own
        if any(tensor.is_inference() for tensor in self.tensors):
            return None
        return [tensor._version for tensor in self.tensors]

    def next(self) -> Any:
        if self.versions is None or self.versions != self.current_versions():
            self.renew()
        return apply_to_collection(self.shared, Tensor, unchanged)


class RandomState:
    """The random state of everything a step may draw from, to be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = [torch.get_rng_state()]
        if device.type == "cuda":
            self.torch.append(torch.cuda.get_rng_state(device))
        self.numpy: Any = np.random.get_state()  # noqa: NPY002
        self.python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.torch[0])
        for state in self.torch[1:]:
            torch.cuda.set_rng_state(state, self.device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        numpy: Any = np.random.get_state()  # noqa: NPY002
        return not (
            torch.equal(self.torch[0], torch.get_rng_state())
            and all(torch.equal(state, torch.cuda.get_rng_state(self.device)) for state in self.torch[1:])
            and np.array_equal(self.numpy[1], numpy[1])
            and self.numpy[2:] == numpy[2:]
            and self.python == random.getstate()
        )


def nothing(steps: int) -> None:
    """What is called after each batch where nobody watches."""


def unchanged(tensor: Tensor) -> Tensor:
    return tensor


def copied_row(row: Any, part: int | None = None) -> Any:
    """A logged value of one's own; a metric object in it stays the user's."""
    # not a deep copy: a row refers to the strategy by the function that reduces it
    copied = object.__new__(type(row))
    state = {name: of_part(value, part) for name, value in row.__getstate__().items() if name != "to"}
    copied.__setstate__(state)
    return copied


def of_part(value: Any, part: int | None) -> Any:
    return own(value, part) if isinstance(value, Tensor) else value


def row_values(row: Any) -> dict[str, Any]:
    """What a row has gathered, without how."""
    names = ("value", "cumulated_batch_size", "has_reset", "_forward_cache", "_computed", "_update_count")
    return {name: row.__dict__.get(name) for name in names}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal in all that they hold; NaN equals NaN."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if hasattr(a, "__len__") and hasattr(a, "__iter__") and not isinstance(a, (str, bytes, set, frozenset)):
        return len(a) == len(b) and all(same(one, two) for one, two in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)
