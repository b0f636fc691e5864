"""Gated recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class GRU(Cell):
    r"""Gated recurrent unit with the reset gate applied after the product, as in :class:`torch.nn.GRU`.

    .. math::
        r, z &= \sigma(W x_t + U h_{t-1} + b), \qquad n = \tanh(W_n x_t + b_n + r \circ (U_n h_{t-1} + d_n)) \\
        h_t &= (1 - z) \circ n + z \circ h_{t-1}

    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
        2014, arXiv 1406.1078.
    """

    gates = ("reset", "update", "new")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        p = project(state.h)
        r, z = sigmoid(x.reset + p.reset), sigmoid(x.update + p.update)
        n = tanh(x.new + r * p.new)
        return self.State(h=(1 - z) * n + z * state.h)
