"""Minimal RNN."""

from __future__ import annotations

from typing import Any

from torch import Tensor, lerp, sigmoid, tanh
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class MinimalRNN(Cell):
    r"""Minimal RNN, whose state moves towards a latent representation of the input.

    .. math::
        z_t &= \tanh(W_x x_t + b_z), \qquad u_t = \sigma(U_h h_{t-1} + U_z z_t + b_u) \\
        h_t &= u_t \circ h_{t-1} + (1 - u_t) \circ z_t

    :math:`U_z z_t` needs no state: it is computed for all steps at once and has no norm.

    Source:
        Chen, "MinimalRNN: Toward More Interpretable and Trainable Recurrent Neural Networks", 2017, arXiv 1711.06788.
    """

    gates = ("latent",)
    products = (("update",),)
    parameters = {"weight_latent": Extra(("hidden_size", "hidden_size"))}
    weight_latent: Tensor

    def prepare(self, x: Gates, state: Any) -> Gates:
        z = tanh(x.latent)
        return x.replace(latent=z, update=F.linear(z, self.weight_latent))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        return self.State(h=lerp(x.latent, state.h, sigmoid(x.update + project.update(state.h))))
