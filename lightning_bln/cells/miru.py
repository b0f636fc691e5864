"""Minion recurrent units."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class MiRU1(Cell):
    r"""Minion recurrent unit with a fixed update gate.

    .. math::
        r_t &= \sigma(W_r x_t + U_r h_{t-1} + b_r), \qquad
        \tilde{h}_t = \tanh(W_h x_t + U_h (r_t \circ h_{t-1}) + b_h) \\
        h_t &= \lambda h_{t-1} + (1 - \lambda) \tilde{h}_t

    Args:
        update: The paper's :math:`\lambda`.

    Source:
        Zyarah and Kudithipudi, "Minion Gated Recurrent Unit for Continual Learning", 2025, arXiv 2503.06175.
    """

    gates = ("reset", "hidden")
    products = (("reset",), ("hidden",))
    options = {"update": 0.5}
    update: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        r = sigmoid(x.reset + project.reset(state.h))
        n = tanh(x.hidden + project.hidden(r * state.h))
        return self.State(h=lerp(n, state.h, self.update))


class MiRU2(Cell):
    r"""Minion recurrent unit with both gates fixed.

    .. math::
        \tilde{h}_t &= \tanh(W_h x_t + U_h (\theta h_{t-1}) + b_h) \\
        h_t &= \lambda h_{t-1} + (1 - \lambda) \tilde{h}_t

    Args:
        update: The paper's :math:`\lambda`.
        reset: The paper's :math:`\theta`.

    Source:
        Zyarah and Kudithipudi, "Minion Gated Recurrent Unit for Continual Learning", 2025, arXiv 2503.06175.
    """

    gates = ("hidden",)
    options = {"update": 0.5, "reset": 0.5}
    update: float
    reset: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        n = tanh((x + project(self.reset * state.h)).hidden)
        return self.State(h=lerp(n, state.h, self.update))
