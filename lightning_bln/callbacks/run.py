"""Values that a validation has gathered in a mode, or in several: results, user state, state of the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_bln._torch import storage_address
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.large_state import Snapshot
from lightning_bln.callbacks.merge import merged
from lightning_bln.callbacks.surroundings import Structure
from lightning_bln.callbacks.user_state import UserState, collect, own, shared_memory
from lightning_bln.modes import StatisticsMode
from lightning_bln.per_mode import NotTogether, PerMode, undoable
from lightning_bln.sweep.pytree import is_close_or_identical, trees_match
from lightning_bln.sweep.shared_forward import memory


@dataclass(eq=False)
class Run:
    """Values gathered so far in this validation, by one mode or by several in joint evaluation.

    Args:
        modes: The modes; tensors that differ between several are
            :class:`~lightning_bln.per_mode.PerMode`.
        results: The collection that ``self.log`` fills.
        state: The module's user state.
        log: The state of the Trainer's log, see :func:`~lightning_bln.callbacks._lightning.log_state`.
        structure: Parts, hooks and flags of the module, where steps of the run have changed them.
        gradients: The gradients that steps of the run have added to.
    """

    modes: tuple[StatisticsMode, ...]
    results: Any
    state: Snapshot
    log: dict[str, Any]
    structure: Structure | None = None
    gradients: list[Tensor | None] | None = None

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
        return Run(modes, results, UserState.copy(self.state, place), log, self.structure)

    def part(self, loop: Any, mode: StatisticsMode) -> Run:
        """The run of one of the modes alone."""
        return self.copy(loop, (mode,), self.modes.index(mode))

    def copied_log(self) -> dict[str, Any]:
        """A copy of the log's state; values are replaced and not written into."""
        return {name: copy(value) for name, value in self.log.items()}

    @classmethod
    def merged(cls, loop: Any, runs: Sequence[Run]) -> Run:
        """One run of the modes of several, which have one each, and stay as they are.

        Raises:
            NotTogether: Something that is no tensor differs between modes.
        """
        first = runs[0]
        memo: dict[Any, Any] = {}
        results = _lightning.new_results(loop, has_bar=False)
        if shared_memory(first.state):
            raise NotTogether("a step keeps a tensor and a view of it")
        if any(run.gradients is not None for run in runs):
            raise NotTogether("steps add to gradients")
        if not all(is_same_structure(run.structure, first.structure) for run in runs):
            raise NotTogether("the module has other parts or hooks in one mode than in another")
        if any(list(run.results) != list(first.results) for run in runs):
            raise NotTogether("other values are logged in one mode than in another")
        for key, row in first.results.items():
            results[key] = copied_row(row)
            results[key].__dict__.update(merged_row([run.results[key] for run in runs], memo))
        results.dataloader_idx = first.results.dataloader_idx
        columns = zip(*(run.state for run in runs), strict=True)
        state = Snapshot([merged(column, memo) for column in columns], first.state.sharing)
        if state.sharing is not None:
            state.sharing.join(state)
        log = merged_logs([run.log for run in runs], memo)
        return cls(tuple(run.mode for run in runs), results, state, log, first.structure)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state and of the logged values."""
        found: list[Tensor] = []
        rows = [row.__dict__ for row in self.results.values()]
        collect([*self.state, self.log, *rows], found, set())
        return found

    @contextmanager
    def undoable(self) -> Iterator[None]:
        """Within the context, an error leaves the run as it was."""
        rows = {key: (row, dict(row.__dict__)) for key, row in self.results.items()}
        state, log = UserState.copy(self.state), self.copied_log()
        around = self.structure, self.gradients
        old = {storage_address(part) for one in self.tensors() if isinstance(one, PerMode) for part in memory(one)}
        try:
            with undoable(old, reach=lambda: {id(tensor) for tensor in self.tensors()}):
                yield
        except BaseException:
            self.results.clear()
            for key, (row, values) in rows.items():
                row.__dict__.clear()
                row.__dict__.update(values)
                self.results[key] = row
            self.state, self.log = state, log
            self.structure, self.gradients = around
            raise

    def is_same_as(self, other: Run) -> bool:
        """Whether both have gathered the same values, up to rounding."""
        return trees_match(self.gathered(), other.gathered(), is_close_or_identical)

    def gathered(self) -> list[Any]:
        """All values, without the way they are reduced."""
        rows = {key: [row.__dict__.get(name) for name in _lightning.ROW_VALUES] for key, row in self.results.items()}
        # the order of attributes depends on when a run's state was put back
        return [dict(sorted(values.items())) for values in (rows, *UserState.comparable(self.state), self.log)]


def first_difference(one: Run, other: Run) -> str:
    """The first value that two runs of a mode do not have in common, as each has it."""
    for some, others in zip(one.gathered(), other.gathered(), strict=True):
        for name in sorted(some.keys() | others.keys(), key=str):
            if not trees_match(some.get(name), others.get(name), is_close_or_identical):
                return f"{name} is {some.get(name)} and {others.get(name)}"
    return "in order"


def is_same_structure(one: Structure | None, other: Structure | None) -> bool:
    return one is other or (one is not None and other is not None and one.equals(other))


def merged_row(rows: list[Any], memo: dict[Any, Any]) -> dict[str, Any]:
    """The values that are gathered in the rows of all modes, merged."""
    # Lightning never sets the count of updates back
    names = [name for name in _lightning.ROW_VALUES if name in rows[0].__dict__ and name != "_update_count"]
    return {name: merged([row.__dict__.get(name) for row in rows], memo) for name in names}


def merged_logs(logs: list[dict[str, Any]], memo: dict[Any, Any]) -> dict[str, Any]:
    """States of the log, merged: of the metrics shown, those that all modes have."""
    made = {}
    for name, first in logs[0].items():
        values = [log[name] for log in logs]
        if isinstance(first, dict):
            common = [key for key in first if all(key in value for value in values)]
            values = [{key: value[key] for key in common} for value in values]
        else:
            values = [first]  # the hook that was last logged from, another callback's perhaps
        made[name] = merged(values, memo)
    return made


def copied_row(row: Any, part: int | None = None) -> Any:
    """A copy of a logged value, or of one mode's part; a metric object in it stays the user's."""
    # not a deep copy: the row's reduction refers to the strategy
    copied = object.__new__(type(row))
    state = {name: of_part(value, part) for name, value in row.__getstate__().items() if name != "to"}
    copied.__setstate__(state)
    return copied


def of_part(value: Any, part: int | None) -> Any:
    return own(value, part) if isinstance(value, Tensor) else value
