"""Memory-controller LSTM."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class MCLSTM(Cell):
    r"""LSTM whose gates read a control vector ``v`` in place of the output.

    .. math::
        f, i, o, m &= \sigma(W x_t + U v_{t-1} + b), \qquad n = \tanh(W_n x_t + U_n v_{t-1} + b_n) \\
        c_t &= f \circ c_{t-1} + i \circ n \\
        h_t &= o \circ \tanh(c_t), \qquad v_t = m \circ \tanh(c_t)

    Source:
        "Memory-controller LSTM", a workshop paper of NIPS 2017, in the form that torchrecurrent gives it.
    """

    gates = ("forget", "input", "output", "control", "cell")
    states = ("h", "v", "c")
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.v)
        c = addcmul(sigmoid(a.forget) * state.c, sigmoid(a.input), tanh(a.cell))
        squashed = tanh(self.norm_cell(c))
        return self.State(h=sigmoid(a.output) * squashed, v=sigmoid(a.control) * squashed, c=c)
