"""Long short-term memory."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class LSTM(Cell):
    r"""Long short-term memory with a forget gate.

    .. math::
        i, f, o &= \sigma(W x_t + U h_{t-1} + b), \qquad g = \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        c_t &= f \circ c_{t-1} + i \circ g, \qquad h_t = o \circ \tanh(c_t)

    Source:
        Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., "Learning to Forget", 2000.
    """

    gates: ClassVar[tuple[str, ...]] = ("input", "forget", "cell", "output")
    states = ("h", "c")
    has_norm_cell = True
    has_projection = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        c = sigmoid(a.forget) * state.c + sigmoid(a.input) * tanh(a.cell)
        return self.State(h=sigmoid(a.output) * tanh(self.norm_cell(c)), c=c)
