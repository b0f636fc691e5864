"""Intersection network."""

from __future__ import annotations

from typing import Any

from torch import lerp, relu, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class IntersectionRNN(Cell):
    r"""Intersection RNN, gated in depth as well as in time; the output ``y`` does not recur.

    .. math::
        y^{in}_t &= \mathrm{ReLU}(W_y x_t + U_y h_{t-1} + b_y), \qquad
        h^{in}_t = \tanh(W_h x_t + U_h h_{t-1} + b_h) \\
        g^y_t &= \sigma(W_{gy} x_t + U_{gy} h_{t-1} + b_{gy}), \qquad
        g^h_t = \sigma(W_{gh} x_t + U_{gh} h_{t-1} + b_{gh}) \\
        y_t &= g^y_t \circ x_t + (1 - g^y_t) \circ y^{in}_t, \qquad
        h_t = g^h_t \circ h_{t-1} + (1 - g^h_t) \circ h^{in}_t

    The paper has inputs of the hidden size; here :math:`x_t` in the last line is the input projected to that size.

    Source:
        Collins et al., "Capacity and Trainability in Recurrent Neural Networks", 2017, arXiv 1611.09913.
    """

    gates = ("depth", "hidden", "depth_gate", "hidden_gate", "skip")
    products = (("depth", "hidden", "depth_gate", "hidden_gate"),)
    states = ("y", "h")
    unbiased = ("skip",)
    zoned = ("h",)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        y, n = relu(a.depth), tanh(a.hidden)
        g_y, g_h = sigmoid(a.depth_gate), sigmoid(a.hidden_gate)
        return self.State(y=lerp(y, x.skip, g_y), h=lerp(n, state.h, g_h))
