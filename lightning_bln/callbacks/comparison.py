"""Comparison of a validation by the running averages that training left in batch norms with the validation itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_bln._torch import own_buffers
from lightning_bln.batchnorm import batch_norms
from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.callbacks.monitor import Scores, gathered
from lightning_bln.callbacks.run import Run
from lightning_bln.callbacks.running_averages import RunningAverages
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.plot import number
from lightning_bln.sweep.result import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

RUNNING = "running_mean", "running_var"
AVERAGES, COMPUTED = "running averages", "recomputed statistics"
"""Names of rows."""


@dataclass
class Comparison:
    """Metrics of a model by its own running averages, by statistics computed anew, and in the mode chosen.

    Args:
        rows: For each of these the value of each metric.
        epoch: The epoch of the validation that gave them.

    Example:
        >>> print(Comparison({"running averages": {"acc": 0.5}, "recomputed statistics": {"acc": 0.625}}, epoch=3))
             running averages  recomputed statistics
        acc            0.5000                 0.6250
    """

    rows: Mapping[str, Mapping[str, float]]
    epoch: int

    def with_mode(self, mode: StatisticsMode | None, scores: Scores) -> Comparison:
        """The same with the values of the mode that was chosen, if one was."""
        if mode is None or mode not in scores:
            return self
        values = {name: scores[mode].get(name, math.nan) for name in self.rows[AVERAGES]}
        return Comparison({**self.rows, f"mode {mode}": values}, self.epoch)

    def to_json(self) -> str:
        """All of it as JSON; NaN and infinities are strings, since JSON lacks them."""
        rows = {label: {name: plain(one) for name, one in row.items()} for label, row in self.rows.items()}
        return json.dumps({"epoch": self.epoch, "rows": rows})

    def lines(self) -> Iterator[list[str]]:
        """The table's header, and a line for each metric."""
        yield ["", *self.rows]
        for name in next(iter(self.rows.values())):
            yield [name, *(number(values.get(name)) for values in self.rows.values())]

    def __str__(self) -> str:
        every = [*self.lines()]
        widths = [max(map(len, column)) for column in zip(*every, strict=True)]

        def line(first: str, *rest: str) -> str:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            return "  ".join([first.ljust(widths[0]), *cells])

        return "\n".join(line(*cells) for cells in every)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.table import Table

        (_, *labels), *lines = self.lines()
        table = Table(title=f"Statistics of batch norms, validation of epoch {self.epoch}")
        table.add_column("")
        for label in labels:
            table.add_column(label, justify="right")
        for line in lines:
            table.add_row(*line)
        yield table


def run_by_averages(evaluation: Evaluation, averages: RunningAverages) -> Run:
    """A run of a validation in which batch norms have the averages that training left."""
    run, norms = evaluation.start.copy(evaluation.loop, ()), batch_norms(evaluation.module)
    with evaluation.acting(run):
        for name in averages.kept.keys() & norms.keys():
            norm, trained = norms[name], averages.kept[name].trained
            if trained.fit(norm):
                own = own_buffers(norm)
                own.update({key: value.to(own[key], copy=True) for key, value in zip(RUNNING, trained, strict=True)})
    return run


def compared(evaluation: Evaluation, monitor: str) -> Comparison | None:
    """The values of a validation that has ended beside those by running averages, over all ranks, ``monitor`` first."""
    if evaluation.beside is None:
        return None
    rows: dict[str, dict[str, float]] = {
        label: {name: float(value) for name, value in evaluation.values(run).items()}
        for label, run in ((AVERAGES, evaluation.beside), (COMPUTED, evaluation.own_run()))
    }
    names = sorted(set.intersection(*map(set, rows.values())))
    if evaluation.trainer.world_size > 1:
        names = sorted(set.intersection(*map(set, gathered(evaluation.trainer, names))))
        means = iter(evaluation.agreed([values[name] for values in rows.values() for name in names]))
        rows = {label: {name: next(means) for name in names} for label in rows}
    if not names:
        return None
    monitor_first = sorted(names, key=lambda name: name != monitor)
    found = {label: {name: values[name] for name in monitor_first} for label, values in rows.items()}
    return Comparison(found, evaluation.trainer.current_epoch)
