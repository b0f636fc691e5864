"""Per-mode validation state: results, user state, batch copies, random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.large_state import Snapshot
from lightning_bln.callbacks.user_state import UserState, own
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.per_mode_tensor import undoable
from lightning_bln.sweep.pytree import is_identical, trees_match, versions


@dataclass(eq=False)
class Run:
    """Values gathered so far in this validation, by one mode or by several in joint evaluation.

    Args:
        modes: The modes; tensors that differ between several are
            :class:`~lightning_bln.sweep.per_mode_tensor.PerMode`.
        results: The collection that ``self.log`` fills.
        state: The module's user state.
        log: The state of the Trainer's log, see :func:`~lightning_bln.callbacks._lightning.log_state`.
    """

    modes: tuple[StatisticsMode, ...]
    results: Any
    state: Snapshot
    log: dict[str, Any]

    @property
    def mode(self) -> StatisticsMode:
        """The mode of a run with only one."""
        (mode,) = self.modes
        return mode

    def copy(self, loop: Any, modes: tuple[StatisticsMode, ...], place: int | None = None) -> Run:
        """A run of ``modes`` with these values, or their parts at ``place``, in objects of its own."""
        results = _lightning.new_results(loop, has_bar=len(modes) == 1)
        for key, row in self.results.items():
            results[key] = copied_row(row, place)
        results.dataloader_idx = self.results.dataloader_idx
        log = self.copied_log() if place is None else UserState.copy([self.log], place)[0]
        return Run(modes, results, UserState.copy(self.state, place), log)

    def part(self, loop: Any, mode: StatisticsMode) -> Run:
        """The run of one of the modes alone."""
        return self.copy(loop, (mode,), self.modes.index(mode))

    def copied_log(self) -> dict[str, Any]:
        """A copy of the log's state; values are replaced and not written into."""
        return {name: copy(value) for name, value in self.log.items()}

    @contextmanager
    def undoable(self) -> Iterator[None]:
        """Within the context, an error leaves the run as it was."""
        rows = {key: (row, dict(row.__dict__)) for key, row in self.results.items()}
        state, log = UserState.copy(self.state), self.copied_log()
        try:
            with undoable():
                yield
        except BaseException:
            self.results.clear()
            for key, (row, values) in rows.items():
                row.__dict__.clear()
                row.__dict__.update(values)
                self.results[key] = row
            self.state, self.log = state, log
            raise

    def is_same_as(self, other: Run) -> bool:
        """Whether both have gathered the same values."""
        return trees_match(self.gathered(), other.gathered(), is_identical)

    def gathered(self) -> list[Any]:
        """All values, without the way they are reduced."""
        rows = {key: [row.__dict__.get(name) for name in _lightning.ROW_VALUES] for key, row in self.results.items()}
        # the order of attributes depends on when a run's state was put back
        return [dict(sorted(values.items())) for values in (rows, *UserState.comparable(self.state), self.log)]


class Copies:
    """Copies of a batch for runs that may change theirs: new containers each time, new tensors after a write."""

    def __init__(self, batch: Any) -> None:
        self.original = batch
        self.renew()

    def renew(self) -> None:
        self.shared = map_tensors(self.original, torch.clone)
        self.tensors: list[Tensor] = []
        map_tensors(self.shared, self.tensors.append)
        self.versions = versions(self.tensors)

    def next(self) -> Any:
        if self.versions is None or self.versions != versions(self.tensors):
            self.renew()
        return map_tensors(self.shared, lambda tensor: tensor)


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """``batch`` in new containers, with ``function`` of each tensor; of a packed batch, of its tensors."""

    def apply(value: Any) -> Any:
        if not isinstance(value, PackedSequence):
            return function(value)
        return value._replace(**{name: apply(one) for name, one in value._asdict().items() if one is not None})

    return apply_to_collection(batch, (Tensor, PackedSequence), apply)


class RandomState:
    """State of every random generator that a step may draw from: torch's, numpy's and Python's."""

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
        now = RandomState(self.device)
        return not (
            all(map(torch.equal, self.torch, now.torch))
            and np.array_equal(self.numpy[1], now.numpy[1])
            and self.numpy[2:] == now.numpy[2:]
            and self.python == now.python
        )


def copied_row(row: Any, part: int | None = None) -> Any:
    """A copy of a logged value, or of one mode's part; a metric object in it stays the user's."""
    # not a deep copy: the row's reduction refers to the strategy
    copied = object.__new__(type(row))
    state = {name: of_part(value, part) for name, value in row.__getstate__().items() if name != "to"}
    copied.__setstate__(state)
    return copied


def of_part(value: Any, part: int | None) -> Any:
    return own(value, part) if isinstance(value, Tensor) else value
