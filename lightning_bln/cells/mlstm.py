"""Multiplicative LSTM."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class MultiplicativeLSTM(Cell):
    r"""LSTM whose recurrent matrix depends on the input, through an intermediate state ``m``.

    .. math::
        m_t &= (W_{mx} x_t) \circ (W_{mh} h_{t-1}) \\
        i, f, o &= \sigma(W x_t + U m_t), \qquad \hat{h} = \tanh(W_h x_t + U_h m_t) \\
        c_t &= f \circ c_{t-1} + i \circ \hat{h}, \qquad h_t = o \circ \tanh(c_t)

    Source:
        Krause et al., "Multiplicative LSTM for sequence modelling", 2017, arXiv 1609.07959.
    """

    gates = ("input", "forget", "cell", "output", "multiplier")
    states = ("h", "c")
    products = (("multiplier",), ("input", "forget", "cell", "output"))
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project.input(x.multiplier * project.multiplier(state.h))
        c = addcmul(sigmoid(a.forget) * state.c, sigmoid(a.input), tanh(a.cell))
        return self.State(h=sigmoid(a.output) * tanh(self.norm_cell(c)), c=c)
