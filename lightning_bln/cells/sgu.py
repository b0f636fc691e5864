"""Simple gated units."""

from __future__ import annotations

from typing import Any

from torch import Tensor, lerp, sigmoid, tanh
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class SGU(Cell):
    r"""Simple gated unit, whose input gates the state multiplicatively.

    .. math::
        x_g &= W_x x_t + b_g, \qquad z_g = \tanh(W_g (x_g \circ h_{t-1})) \\
        z_{out} &= \mathrm{softplus}(z_g \circ h_{t-1}), \qquad
        z_t = \mathrm{hardsigmoid}(W_z x_t + U_z h_{t-1} + b_z) \\
        h_t &= (1 - z_t) \circ h_{t-1} + z_t \circ z_{out}

    Source:
        Gao and Glowacka, "Deep Gate Recurrent Neural Network", 2016, arXiv 1604.02910.
    """

    gates = ("gate", "update")
    products = (("gate",), ("update",))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        z_g = tanh(project.gate(x.gate * state.h))
        z = F.hardsigmoid(x.update + project.update(state.h))
        return self.State(h=lerp(state.h, self.out(z_g * state.h), z))

    def out(self, gated: Tensor) -> Tensor:
        """:math:`z_{out}`."""
        return F.softplus(gated)


class DSGU(SGU):
    r"""Deep simple gated unit: :class:`SGU` with a further layer before the output.

    .. math::
        z_{out} = \sigma(W_{go} (z_g \circ h_{t-1}))

    Source:
        Gao and Glowacka, "Deep Gate Recurrent Neural Network", 2016, arXiv 1604.02910.
    """

    parameters = {"weight_out": Extra(("hidden_size", "hidden_size"))}
    weight_out: Tensor

    def out(self, gated: Tensor) -> Tensor:
        """:math:`z_{out}`."""
        return sigmoid(F.linear(gated, self.weight_out).to(gated.dtype))
