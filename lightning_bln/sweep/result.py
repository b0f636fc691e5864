"""Scores of statistics modes, as a table, a heat map or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_bln.modes import FOLDABLE_MODES, StatisticsMode, parse_modes
from lightning_bln.sweep.plot import draw, number
from lightning_bln.sweep.pytree import is_identical

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

Direction = Literal["min", "max"]


class Regrouped(NamedTuple):
    """Monitored value of one mode on the same samples, in the batches they came in and in other batches."""

    as_loaded: float
    regrouped: float

    @property
    def spread(self) -> float:
        """Relative change of the value."""
        if math.isnan(self.as_loaded) or math.isnan(self.regrouped):
            return math.inf
        moved = abs(self.regrouped - self.as_loaded)
        return moved / abs(self.as_loaded) if self.as_loaded else (math.inf if moved else 0.0)


@dataclass
class SweepResult:
    """Scores of the evaluated statistics modes, and the mode that was set in the end.

    Args:
        scores: For each mode, the value of each metric.
        monitor: The metric that decides.
        direction: Whether a small (``"min"``, the default) or a large (``"max"``) value of it is good.
        incumbent: The mode that was set before.
        chosen: The mode that was set afterwards; None if no mode was.
        regrouped: For each mode also scored on regrouped batches, the monitored value on both.
        note: A sentence about the choice for the person who reads the table.
        reason: Cause of per-mode evaluation; None if all modes were evaluated jointly. From ``sweep_modes``, which
            calls ``predict`` once per mode, the cause that no forward was shared.
        unscored: Names of metrics that other callbacks logged: they have one value, of the incumbent.
        mode: Earlier name of ``direction``, which files keep.
        foldable: The modes in which each norm is an affine map, so that :func:`lightning_bln.fold` takes it into
            weights; ``pppp`` is one for all norms.

    Raises:
        ValueError: ``direction`` is neither ``"min"`` nor ``"max"``, or no mode has a score named ``monitor``.

    Example:
        >>> result = SweepResult({"cccc": {"val_loss": 0.52}, "ppcc": {"val_loss": 0.48}}, monitor="val_loss")
        >>> result.best()
        'ppcc'
        >>> print(result)
        mode  val_loss
        ppcc    0.4800  best
        cccc    0.5200
    """

    scores: Mapping[StatisticsMode, Mapping[str, float]]
    monitor: str
    direction: Direction = None  # type: ignore[assignment]  # "min", unless mode says otherwise
    incumbent: StatisticsMode | None = None
    chosen: StatisticsMode | None = None
    regrouped: Mapping[StatisticsMode, Regrouped] = field(default_factory=dict)
    note: str | None = None
    reason: str | None = None
    unscored: Iterable[str] = ()
    mode: InitVar[Direction | None] = None
    foldable: Iterable[str] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle, that of earlier versions too, whose ``mode`` is the direction."""
        mode = state.pop("mode", None)
        self.__dict__.update({"unscored": (), "reason": None, "direction": mode, "foldable": (), **state})
        self.foldable = self._foldable()

    def __post_init__(self, mode: Direction | None) -> None:
        self.direction = one_direction(self.direction, mode)
        self.unscored = tuple(self.unscored)
        self.scores = {
            StatisticsMode(key): {name: float(value) for name, value in values.items()}
            for key, values in self.scores.items()
        }
        self.regrouped = {StatisticsMode(key): Regrouped(*map(float, pair)) for key, pair in self.regrouped.items()}
        self.incumbent = None if self.incumbent is None else StatisticsMode(self.incumbent)
        self.chosen = None if self.chosen is None else StatisticsMode(self.chosen)
        self.foldable = self._foldable()
        self._column(self.monitor)

    def _foldable(self) -> tuple[StatisticsMode, ...]:
        known = {*map(StatisticsMode, self.foldable), *FOLDABLE_MODES}
        return tuple(one for one in self.scores if one in known)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, the monitored one first."""
        names = dict.fromkeys([self.monitor, *(name for values in self.scores.values() for name in values)])
        return list(names)

    def best(
        self,
        monitor: str | None = None,
        direction: Direction | None = None,
        *,
        among: str | Iterable[str] | None = None,
        mode: Direction | None = None,
    ) -> StatisticsMode:
        """The mode with the best score; ties go to a batch-independent mode, then to the incumbent.

        Args:
            monitor: The metric that decides, by default the result's own.
            direction: ``"min"`` or ``"max"``, by default the result's own.
            among: The modes to choose from, by default all that have scores: ``"foldable"`` for those that
                :func:`lightning_bln.fold` takes into weights, ``"batch_independent"``, or modes by name or pattern.
            mode: Earlier name of ``direction``.

        Returns:
            The best mode, or the incumbent if no score is a number.

        Raises:
            ValueError: No metric is named ``monitor``; ``among`` is ``"foldable"`` and no such mode has a score; or
                ``among`` has no mode with a score other than NaN, and there is no incumbent to keep.
        """
        direction = one_direction(direction, mode, default=self.direction)
        column = self._column(self.monitor if monitor is None else monitor)
        eligible = list(column) if among is None else [one for one in self._among(among) if one in column]
        if among == "foldable" and all(math.isnan(column[one]) for one in eligible):
            raise ValueError(
                f"among='foldable', but no mode that folds has a score; score one, such as {FOLDABLE_MODES[0]}"
            )
        if all(math.isnan(column[one]) for one in eligible):
            if self.incumbent is not None:
                return self.incumbent
            raise ValueError(
                f"monitor={monitor or self.monitor!r} is NaN or missing in every mode to choose from, and there is no "
                "incumbent to keep; monitor another metric"
            )
        return self._ranked(eligible, column, direction)[0]

    def _among(self, among: str | Iterable[str]) -> Iterable[StatisticsMode]:
        if among == "foldable":
            return self._foldable()
        return parse_modes("among", among)

    def ranking(self) -> list[StatisticsMode]:
        """All modes by their monitored score, the best first and NaN last."""
        return self._ranked(self.scores, self._column(self.monitor), self.direction)

    def _ranked(
        self, modes: Iterable[StatisticsMode], column: Mapping[StatisticsMode, float], direction: Direction
    ) -> list[StatisticsMode]:
        sign = 1.0 if direction == "min" else -1.0

        def key(one: StatisticsMode) -> tuple[bool, float, bool, bool]:
            value = column.get(one, math.nan)
            is_lost = math.isnan(value)
            return is_lost, 0.0 if is_lost else sign * value, not one.is_batch_independent, one != self.incumbent

        return sorted(modes, key=key)

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON, also written to ``path`` if given; :meth:`from_json` reads both."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> SweepResult:
        """Read the text that :meth:`to_json` returns, or the file it writes."""
        text = str(source)
        return cls.from_dict(json.loads(text if text.lstrip().startswith("{") else Path(source).read_text()))

    def to_dict(self) -> dict[str, Any]:
        """The result in dictionaries, strings and floats; NaN and infinities are strings, since JSON lacks them."""
        return {
            "monitor": self.monitor,
            "mode": self.direction,  # by the name that versions before direction= read
            "incumbent": None if self.incumbent is None else str(self.incumbent),
            "chosen": None if self.chosen is None else str(self.chosen),
            "note": self.note,
            "reason": self.reason,
            **({"unscored": list(self.unscored)} if self.unscored else {}),
            **({"foldable": [str(one) for one in self.foldable]} if self.foldable else {}),
            "scores": {
                str(one): {name: plain(value) for name, value in values.items()} for one, values in self.scores.items()
            },
            "regrouped": {str(one): [plain(value) for value in pair] for one, pair in self.regrouped.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SweepResult:
        """The inverse of :meth:`to_dict`."""
        return cls(**state)

    def plot(self, monitor: str | None = None) -> Figure:
        """A 4 x 4 heat map of one metric: batch statistics down, feature statistics across.

        Where all modes have the same feature letters, or the same batch letters, it is a 2 x 2 heat map of the other
        two letters: the mean down, the variance across.

        Frames mark the best mode, the incumbent and, if it is another one, the chosen mode.

        Args:
            monitor: The metric to draw, by default the one that decides.

        Returns:
            A matplotlib figure, tied to no window: ``result.plot().savefig("modes.png")``.
        """
        metric = self.monitor if monitor is None else monitor
        scores, marks, small_is_good = self._column(metric), {}, False
        if metric == self.monitor:
            marks = {"best": self.best(), "incumbent": self.incumbent, "chosen": self.chosen}
            small_is_good = self.direction == "min"
        return draw(scores, metric, marks, small_is_good=small_is_good)

    def __str__(self) -> str:
        header, rows = self._cells(self.shown())
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

        def line(cells: list[str]) -> str:
            first, *middle, last = zip(cells, widths, strict=True)
            padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in middle), last[0]]
            return "  ".join(padded).rstrip()

        return "\n".join([line(header), *map(line, rows), *self._footer()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield self.table(options.max_width)

    def table(self, width: int | None = None) -> Table:
        """A rich table of at most ``width`` columns: metrics for which there is no room are named below it."""
        from rich.table import Table

        shown = self.shown()
        header, rows = self._cells(shown)
        while width is not None and len(shown) > 1 and table_width(header, rows) > width:
            shown.pop()
            header, rows = self._cells(shown)
        left_out = [name for name in self.shown() if name not in shown]
        footer = [*self._footer(), *([f"Not shown: {', '.join(left_out)}."] if left_out else [])]
        marked = self.best() if self.chosen is None else self.chosen
        title = f"Statistics modes by {self.monitor} ({self.direction})"
        table = Table(title=title, caption="\n".join(footer) or None, caption_justify="left")
        for position, name in enumerate(header):
            table.add_column(name, justify="left" if position in (0, len(header) - 1) else "right")
        for one, cells in zip(self.ranking(), rows, strict=True):
            table.add_row(*cells, style="bold green" if one == marked else None)
        return table

    def _footer(self) -> list[str]:
        reason = f"Modes were evaluated one after the other: {self.reason}." if self.reason else None
        unscored = None
        if self.unscored and self.chosen not in (None, self.incumbent):
            names, before = ", ".join(self.unscored), self.incumbent or "the modes set before"
            unscored = f"Of {before}, not of {self.chosen}, since other callbacks logged them: {names}."
        return [sentence for sentence in (self.note, reason, unscored) if sentence]

    def _column(self, metric: str) -> dict[StatisticsMode, float]:
        column = {one: values[metric] for one, values in self.scores.items() if metric in values}
        if not column:
            known = sorted({name for values in self.scores.values() for name in values})
            raise ValueError(f"monitor={metric!r}, but no mode has a score of that name; take one of {known}")
        return column

    def shown(self) -> list[str]:
        """Metrics with a column of their own; Lightning's ``*_epoch`` twins of others have none."""

        def is_twin(name: str) -> bool:
            base = name.removesuffix("_epoch")
            pairs = [(values.get(base), values.get(name)) for values in self.scores.values()]
            return base != name and all(
                one is not None and other is not None and is_identical(one, other) for one, other in pairs
            )

        return [name for name in self.metrics if name == self.monitor or not is_twin(name)]

    def _cells(self, shown: list[str]) -> tuple[list[str], list[list[str]]]:
        header = ["mode", *shown, *([f"{self.monitor} regrouped"] if self.regrouped else []), ""]
        rows = []
        for one in self.ranking():
            cells = [str(one), *(number(self.scores[one].get(name)) for name in shown)]
            if self.regrouped:
                pair = self.regrouped.get(one)
                cells.append("" if pair is None else f"{number(pair.regrouped)} ({100 * pair.spread:.1f} %)")
            marks = [
                ("chosen", one == self.chosen),
                ("best", one == self.best() and one != self.chosen),
                ("incumbent", one == self.incumbent),
                ("folds", one in self.foldable),
            ]
            rows.append([*cells, ", ".join(mark for mark, holds in marks if holds)])
        return header, rows


SweepResult.mode = property(lambda self: self.direction)  # type: ignore[attr-defined]  # its earlier name


def check_direction(value: str, name: str = "direction") -> Direction:
    """``value`` itself; raises ValueError, by the argument's name, if it is no direction."""
    if value not in ("min", "max"):
        raise ValueError(f"{name}={value!r}, but it says which way the monitored metric is good: 'min' or 'max'")
    return value  # type: ignore[return-value]


def one_direction(direction: str | None, mode: str | None, default: Direction = "min") -> Direction:
    """The direction, given as such or as ``mode``, its earlier name; raises ValueError where both contradict."""
    for name, value in (("direction", direction), ("mode", mode)):
        check_direction(default if value is None else value, name)
    if None not in (direction, mode) and direction != mode:
        raise ValueError(
            f"direction={direction!r} and mode={mode!r}, but both are names of one argument; pass direction alone"
        )
    return check_direction(direction or mode or default)


def table_width(header: list[str], rows: list[list[str]]) -> int:
    """Columns that rich needs for a table: each cell has a border and a space on either side."""
    return 1 + sum(3 + max(map(len, column)) for column in zip(header, *rows, strict=True))


def plain(value: float) -> float | str:
    """``value`` as JSON can hold it."""
    return float(value) if math.isfinite(value) else str(float(value))
