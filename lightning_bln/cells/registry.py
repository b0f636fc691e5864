"""Names of the cells."""

from __future__ import annotations

from typing import Any

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.rnn import RNN

registry: dict[str, type[Cell]] = {"gru": GRU, "lstm": LSTM, "rnn": RNN}


def build(cell: str | type[Cell], **options: Any) -> Cell:
    """A cell by its name in the registry, or of a class of one's own.

    Example:
        >>> build("rnn", nonlinearity="relu").nonlinearity
        'relu'
    """
    if isinstance(cell, type) and issubclass(cell, Cell):
        return cell(**options)
    if cell not in registry:
        raise ValueError(f"cell={cell!r}, but the registry has {', '.join(registry)}; pass one, or a subclass of Cell")
    return registry[cell](**options)
