"""Fast recurrent cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class FastRNN(Cell):
    r"""RNN with a weighted residual connection.

    .. math::
        \tilde{h}_t &= \tanh(W x_t + U h_{t-1} + b) \\
        h_t &= \sigma(\alpha) \tilde{h}_t + \sigma(\beta) h_{t-1}

    Source:
        Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent Neural Network",
        2018, arXiv 1901.02358.
    """

    gates = ("hidden",)
    parameters = {"alpha": Extra((1,), -3.0, sigmoid), "beta": Extra((1,), 3.0, sigmoid)}
    alpha: Tensor
    beta: Tensor

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        n = tanh((x + project(state.h)).hidden)
        return self.State(h=addcmul(self.beta * state.h, self.alpha, n))


class FastGRNN(Cell):
    r"""Gated RNN whose gate and candidate share their products.

    .. math::
        z_t &= \sigma(W x_t + U h_{t-1} + b_z), \qquad \tilde{h}_t = \tanh(W x_t + U h_{t-1} + b_h) \\
        h_t &= (\sigma(\zeta) (1 - z_t) + \sigma(\nu)) \circ \tilde{h}_t + z_t \circ h_{t-1}

    Source:
        Kusupati et al., "FastGRNN: A Fast, Accurate, Stable and Tiny Kilobyte Sized Gated Recurrent Neural Network",
        2018, arXiv 1901.02358.
    """

    gates = ("hidden",)
    biased = False
    parameters = {
        "bias_update": Extra(),
        "bias_hidden": Extra(),
        "zeta": Extra((1,), 1.0, sigmoid),
        "nu": Extra((1,), -4.0, sigmoid),
    }
    bias_update: Tensor
    bias_hidden: Tensor
    zeta: Tensor
    nu: Tensor

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = (x + project(state.h)).hidden
        z, n = sigmoid(a + self.bias_update), tanh(a + self.bias_hidden)
        return self.State(h=addcmul(z * state.h, self.zeta * (1 - z) + self.nu, n))
