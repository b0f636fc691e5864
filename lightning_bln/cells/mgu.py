"""Minimal gated unit."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class MGU(Cell):
    r"""Minimal gated unit, with one gate in place of the GRU's two.

    .. math::
        f_t &= \sigma(W_f x_t + U_f h_{t-1} + b_f), \qquad
        \tilde{h}_t = \tanh(W_h x_t + U_h (f_t \circ h_{t-1}) + b_h) \\
        h_t &= (1 - f_t) \circ h_{t-1} + f_t \circ \tilde{h}_t

    Source:
        Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks", 2016, arXiv 1603.09420.
    """

    gates = ("forget", "hidden")
    products = (("forget",), ("hidden",))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        f = sigmoid(x.forget + project.forget(state.h))
        n = tanh(x.hidden + project.hidden(f * state.h))
        return self.State(h=lerp(state.h, n, f))
