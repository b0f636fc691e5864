"""Long short-term memory."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class LSTM(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000)."""

    gates = ("input", "forget", "cell", "output")
    states = ("h", "c")
    has_norm_cell = True
    has_projection = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        c = sigmoid(a.forget) * state.c + sigmoid(a.input) * tanh(a.cell)
        return self.State(h=sigmoid(a.output) * tanh(self.norm_cell(c)), c=c)
