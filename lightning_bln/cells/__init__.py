"""Recurrent cells: one file a cell, each a gate equation and nothing else."""

from lightning_bln.cells.cell import Cell, Extra, LinearCell
from lightning_bln.cells.gates import Gates
from lightning_bln.cells.gru import GRU
from lightning_bln.cells.lstm import LSTM
from lightning_bln.cells.registry import registry
from lightning_bln.cells.rnn import RNN
from lightning_bln.cells.single import BLNGRUCell, BLNLSTMCell, BLNRNNCell, RecurrentCell

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
