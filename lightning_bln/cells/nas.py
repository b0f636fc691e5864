"""Neural architecture search cell."""

from __future__ import annotations

from typing import Any

from torch import relu, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class NAS(Cell):
    r"""Cell found by neural architecture search for language modelling.

    .. math::
        a &= W x_t + U h_{t-1} + b \\
        l_1 &= \tanh(\sigma(a_0) \circ \mathrm{ReLU}(a_1)), \qquad
        l_2 = \tanh(\sigma(a_2) + \mathrm{ReLU}((W_3 x_t + b_3) \circ U_3 h_{t-1})) \\
        l_3 &= \tanh(\tanh(a_4) \circ \sigma(a_5)), \qquad l_4 = \sigma(\tanh(a_6) + \sigma(a_7)) \\
        c_t &= \tanh(l_1 + c_{t-1}) \circ l_2, \qquad h_t = \tanh(c_t \circ \tanh(l_3 + l_4))

    The product in :math:`l_2` is that of the authors' code (``NASCell`` of TensorFlow).

    Source:
        Zoph and Le, "Neural Architecture Search with Reinforcement Learning", 2017, arXiv 1611.01578.
    """

    gates = ("a0", "a1", "a2", "a4", "a5", "a6", "a7", "a3")
    products = (("a0", "a1", "a2", "a4", "a5", "a6", "a7"), ("a3",))
    states = ("h", "c")
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        l1 = tanh(sigmoid(a.a0) * relu(a.a1))
        l2 = tanh(sigmoid(a.a2) + relu(x.a3 * project.a3(state.h)))
        l3 = tanh(tanh(a.a4) * sigmoid(a.a5))
        l4 = sigmoid(tanh(a.a6) + sigmoid(a.a7))
        c = tanh(l1 + state.c) * l2
        return self.State(h=tanh(self.norm_cell(c) * tanh(l3 + l4)), c=c)
