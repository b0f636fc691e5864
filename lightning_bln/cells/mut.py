"""Evolved cells."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class MUT1(Cell):
    r"""First of three cells found by a search over architectures.

    .. math::
        z_t &= \sigma(W_z x_t + b_z), \qquad r_t = \sigma(W_r x_t + U_r h_{t-1} + b_r) \\
        h_t &= \tanh(U_h (r_t \circ h_{t-1}) + \tanh(x_t) + b_h) \circ z_t + h_{t-1} \circ (1 - z_t)

    :math:`x_t` without a matrix is the input projected to the hidden size.

    Source:
        Jozefowicz et al., "An Empirical Exploration of Recurrent Network Architectures", 2015.
    """

    gates = ("update", "reset", "hidden")
    products = (("reset",), ("hidden",))

    def prepare(self, x: Gates, state: Any) -> Gates:
        return x.replace(update=sigmoid(x.update), hidden=tanh(x.hidden))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        r = sigmoid(x.reset + project.reset(state.h))
        return self.State(h=lerp(state.h, tanh(x.hidden + project.hidden(r * state.h)), x.update))


class MUT2(Cell):
    r"""Second of three cells found by a search over architectures.

    .. math::
        z_t &= \sigma(W_z x_t + U_z h_{t-1} + b_z), \qquad r_t = \sigma(x_t + U_r h_{t-1} + b_r) \\
        h_t &= \tanh(U_h (r_t \circ h_{t-1}) + W_h x_t + b_h) \circ z_t + h_{t-1} \circ (1 - z_t)

    :math:`x_t` without a matrix is the input projected to the hidden size.

    Source:
        Jozefowicz et al., "An Empirical Exploration of Recurrent Network Architectures", 2015.
    """

    gates = ("update", "reset", "hidden")
    products = (("update", "reset"), ("hidden",))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        z, r = sigmoid(a.update), sigmoid(a.reset)
        return self.State(h=lerp(state.h, tanh(x.hidden + project.hidden(r * state.h)), z))


class MUT3(Cell):
    r"""Third of three cells found by a search over architectures.

    .. math::
        z_t &= \sigma(W_z x_t + U_z \tanh(h_{t-1}) + b_z), \qquad r_t = \sigma(W_r x_t + U_r h_{t-1} + b_r) \\
        h_t &= \tanh(U_h (r_t \circ h_{t-1}) + W_h x_t + b_h) \circ z_t + h_{t-1} \circ (1 - z_t)

    Source:
        Jozefowicz et al., "An Empirical Exploration of Recurrent Network Architectures", 2015.
    """

    gates = ("update", "reset", "hidden")
    products = (("update",), ("reset",), ("hidden",))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        z = sigmoid(x.update + project.update(tanh(state.h)))
        r = sigmoid(x.reset + project.reset(state.h))
        return self.State(h=lerp(state.h, tanh(x.hidden + project.hidden(r * state.h)), z))
