"""Delayed gated recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import addcmul, cat, lerp, sigmoid, tanh

from lightning_bln._checks import check_int
from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class TauGRU(Cell):
    r"""Gated unit with weighted feedback from ``delay`` steps before, which the state ``past`` holds.

    .. math::
        u_n &= \tanh(W_1 h_n + U_1 x_n), \qquad z_n = \tanh(W_2 h_{n - \tau} + U_2 x_n) \\
        g_n &= \sigma(W_3 h_n + U_3 x_n), \qquad a_n = \sigma(W_4 h_n + U_4 x_n) \\
        h_{n + 1} &= (1 - g_n) \circ h_n + g_n \circ (u_n + a_n \circ z_n)

    Args:
        delay: The paper's :math:`\tau`, in steps.

    Source:
        Erichson et al., "Gated Recurrent Neural Networks with Weighted Time-Delay Feedback", 2022, arXiv 2212.00228.
    """

    gates = ("update", "gate", "weight", "delayed")
    states = ("h", "past")
    products = (("update", "gate", "weight"), ("delayed",))
    zoned = ("h",)
    options = {"delay": 1}
    delay: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.delay = check_int("delay", self.delay, 1)

    def state_size(self, state: str, hidden_size: int) -> int:
        return hidden_size * self.delay if state == "past" else hidden_size

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        h, size = state.h, state.h.shape[-1]
        a = x + project(h)
        u = tanh(a.update)
        z = tanh(x.delayed + project.delayed(state.past[..., :size]))
        g, weight = sigmoid(a.gate), sigmoid(a.weight)
        past = cat([state.past[..., size:], h], -1) if self.delay > 1 else h
        return self.State(h=lerp(h, addcmul(u, weight, z), g), past=past)
