"""Recurrent cells: the equations of one step, in one file for each cell or family."""

from importlib import import_module
from typing import Any

from lightning_bln import _moved
from lightning_bln.cells.cell import Cell, Extra, LinearCell
from lightning_bln.cells.gates import Gates
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.registry import registry
from lightning_bln.cells.rnn import RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BLNGRUCell",
    "BLNLSTMCell",
    "BLNRNNCell",
    "Cell",
    "Extra",
    "Gates",
    "LinearCell",
    "RecurrentCell",
    "registry",
]

MODULES = ("BLNGRUCell", "BLNLSTMCell", "BLNRNNCell", "RecurrentCell")
"""Single-step modules, imported on first use because they are built on this package."""


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return getattr(import_module("lightning_bln.recurrence.cell_modules"), name)
    return _moved.attribute(__name__, name)
