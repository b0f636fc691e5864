"""Addition-subtraction twin-gated network."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class ATR(Cell):
    r"""Addition-subtraction twin-gated recurrent network.

    .. math::
        p_t &= W_x x_t, \qquad q_t = W_h h_{t-1} \\
        i_t &= \sigma(p_t + q_t), \qquad f_t = \sigma(p_t - q_t) \\
        h_t &= i_t \circ p_t + f_t \circ h_{t-1}

    Source:
        Zhang et al., "Simplifying Neural Machine Translation with Addition-Subtraction Twin-Gated Recurrent Networks",
        2018, arXiv 1810.12546.
    """

    gates = ("hidden",)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        p, q = x.hidden, project.hidden(state.h)
        return self.State(h=addcmul(sigmoid(p + q) * p, sigmoid(p - q), state.h))
