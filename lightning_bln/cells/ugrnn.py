"""Update-gate network."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class UGRNN(Cell):
    r"""Update-gate RNN.

    .. math::
        c_t &= \tanh(W_c x_t + U_c h_{t-1} + b_c), \qquad g_t = \sigma(W_g x_t + U_g h_{t-1} + b_g) \\
        h_t &= g_t \circ h_{t-1} + (1 - g_t) \circ c_t

    Source:
        Collins et al., "Capacity and Trainability in Recurrent Neural Networks", 2017, arXiv 1611.09913.
    """

    gates = ("hidden", "update")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        return self.State(h=lerp(tanh(a.hidden), state.h, sigmoid(a.update)))
