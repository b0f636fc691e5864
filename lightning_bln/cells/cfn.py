"""Chaos-free network."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class CFN(Cell):
    r"""Chaos-free network, whose state decays without input.

    .. math::
        \theta_t &= \sigma(U_\theta h_{t-1} + V_\theta x_t + b_\theta), \qquad
        \eta_t = \sigma(U_\eta h_{t-1} + V_\eta x_t + b_\eta) \\
        h_t &= \theta_t \circ \tanh(h_{t-1}) + \eta_t \circ \tanh(W x_t)

    Source:
        Laurent and von Brecht, "A recurrent neural network without chaos", 2017, arXiv 1612.06212.
    """

    gates = ("forget", "input", "hidden")
    products = (("forget", "input"),)

    def prepare(self, x: Gates, state: Any) -> Gates:
        return x.replace(hidden=tanh(x.hidden))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        theta, eta = sigmoid(a.forget), sigmoid(a.input)
        return self.State(h=addcmul(theta * tanh(state.h), eta, x.hidden))
