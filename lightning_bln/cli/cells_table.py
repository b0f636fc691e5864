"""Table of the registry's cells, as ``bln cells`` prints it."""

from __future__ import annotations

import inspect
from typing import NamedTuple

from rich import print as rich_print
from rich.table import Table

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.registry import registry
from lightning_bln.recurrence.cell_modules import RecurrentCell


class Entry(NamedTuple):
    """A row of the table."""

    name: str
    states: tuple[str, ...]
    parameters: int
    source: str


def source(cell: type[Cell]) -> str:
    """The citation of a cell, from the last section of its docstring.

    Example:
        >>> source(registry["mgu"])
        'Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016, arXiv 1603.09420.'
    """
    return " ".join((inspect.getdoc(cell) or "").partition("Source:")[2].split())


def entries(input_size: int = 128, hidden_size: int = 128) -> list[Entry]:
    """A row for every cell, with its number of parameters at a size, norms left out."""
    found = []
    for name, cell in registry.items():
        module = RecurrentCell(name, input_size, hidden_size, norm=None, device="meta")
        parameters = sum(parameter.numel() for parameter in module.parameters())
        found.append(Entry(name, cell.states, parameters, source(cell)))
    return found


def table(input_size: int = 128, hidden_size: int = 128) -> Table:
    """The table of every cell's name, states, parameters at a size and citation.

    Args:
        input_size: Features of the input.
        hidden_size: Units of the state.

    Returns:
        A table for :func:`rich.print`.

    Example:
        >>> table(64, 128).row_count == len(registry)
        True
    """
    result = Table(title=f'Recurrent("name", {input_size}, {hidden_size}, norm="bln")')
    result.add_column("name", style="bold", no_wrap=True)
    result.add_column("states", no_wrap=True)
    result.add_column("parameters", justify="right", no_wrap=True)
    result.add_column("source")
    for entry in entries(input_size, hidden_size):
        result.add_row(entry.name, ", ".join(entry.states), f"{entry.parameters:,}", entry.source)
    return result


def show(input_size: int = 128, hidden_size: int = 128) -> None:
    """Print :func:`table`."""
    rich_print(table(input_size, hidden_size))
