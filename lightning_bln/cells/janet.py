"""Just another network."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class JANET(Cell):
    r"""Just another network (JANET): an LSTM with a forget gate only.

    .. math::
        s_t &= U_f h_{t-1} + W_f x_t + b_f, \qquad \tilde{c}_t = \tanh(U_c h_{t-1} + W_c x_t + b_c) \\
        h_t &= \sigma(s_t) \circ h_{t-1} + (1 - \sigma(s_t - \beta)) \circ \tilde{c}_t

    Args:
        beta: Offset of the input gate from the forget gate.

    Source:
        van der Westhuizen and Lasenby, "The unreasonable effectiveness of the forget gate", 2018, arXiv 1804.04849.
    """

    gates = ("forget", "cell")
    options = {"beta": 1.0}
    beta: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        return self.State(h=addcmul(sigmoid(a.forget) * state.h, sigmoid(self.beta - a.forget), tanh(a.cell)))
