"""Coupled oscillatory network."""

from __future__ import annotations

from typing import Any

from torch import add, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class CoRNN(Cell):
    r"""Coupled oscillatory network, damped and driven; ``c`` is the velocity of ``h``.

    .. math::
        c_t &= c_{t-1} + \Delta t (\tanh(W h_{t-1} + \mathcal{W} c_{t-1} + V x_t + b)
        - \gamma h_{t-1} - \epsilon c_{t-1}) \\
        h_t &= h_{t-1} + \Delta t c_t

    Args:
        dt: Time step.
        gamma: Oscillation frequency.
        epsilon: Damping.

    Source:
        Rusch and Mishra, "Coupled Oscillatory Recurrent Neural Network (coRNN)", 2021, arXiv 2010.00951.
    """

    gates = ("hidden",)
    states = ("h", "c")
    products = (("hidden",), ("velocity",))
    options = {"dt": 0.1, "gamma": 1.0, "epsilon": 1.0}
    dt: float
    gamma: float
    epsilon: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        h, c = state
        force = tanh(x.hidden + project.hidden(h) + project.velocity(c))
        c = add(add((1 - self.dt * self.epsilon) * c, force, alpha=self.dt), h, alpha=-self.dt * self.gamma)
        return self.State(h=add(h, c, alpha=self.dt), c=c)
