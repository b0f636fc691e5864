"""Simple gated recurrent network."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class SGRN(Cell):
    r"""Simple gated recurrent network, whose gate and candidate share one projection.

    .. math::
        f_t &= \sigma(W x_t + U h_{t-1} + b) \\
        h_t &= \tanh((1 - f_t) \circ (W x_t + b_x) + f_t \circ h_{t-1})

    Source:
        "Simple gated recurrent network", IET Generation, Transmission and Distribution, 2021, doi 10.1049/gtd2.12056.
    """

    gates = ("hidden",)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        f = sigmoid(x.hidden + project.hidden(state.h))
        return self.State(h=tanh(lerp(x.hidden, state.h, f)))
