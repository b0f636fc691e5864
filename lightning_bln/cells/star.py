"""Stackable recurrent cell."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class STAR(Cell):
    r"""Stackable recurrent cell, whose gradients keep their size over layers as well as steps.

    .. math::
        z_t &= \tanh(W_z x_t + b_z), \qquad k_t = \sigma(W_x x_t + W_h h_{t-1} + b_k) \\
        h_t &= \tanh((1 - k_t) \circ h_{t-1} + k_t \circ z_t)

    Source:
        Turkoglu et al., "Gating Revisited: Deep Multi-layer RNNs That Can Be Trained", 2021, arXiv 1911.11033.
    """

    gates = ("input", "gate")
    products = (("gate",),)

    def prepare(self, x: Gates, state: Any) -> Gates:
        return x.replace(input=tanh(x.input))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        k = sigmoid(x.gate + project.gate(state.h))
        return self.State(h=tanh(lerp(state.h, x.input, k)))
