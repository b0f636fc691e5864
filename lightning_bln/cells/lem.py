"""Long expressive memory."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class LEM(Cell):
    r"""Long expressive memory, with two learned time steps.

    .. math::
        \Delta t_t &= \Delta t\, \sigma(W_1 h_{t-1} + V_1 x_t + b_1), \qquad
        \overline{\Delta t}_t = \Delta t\, \sigma(W_2 h_{t-1} + V_2 x_t + b_2) \\
        z_t &= (1 - \Delta t_t) \circ z_{t-1} + \Delta t_t \circ \tanh(W_z h_{t-1} + V_z x_t + b_z) \\
        h_t &= (1 - \overline{\Delta t}_t) \circ h_{t-1}
        + \overline{\Delta t}_t \circ \tanh(W_y z_t + V_y x_t + b_y)

    The paper writes :math:`y` for the output ``h``.

    Args:
        dt: Upper bound of both time steps.

    Source:
        Rusch et al., "Long Expressive Memory for Sequence Modeling", 2022, arXiv 2110.04744.
    """

    gates = ("output_time", "memory_time", "memory", "output")
    states = ("h", "z")
    products = (("output_time", "memory_time", "memory"), ("output",))
    options = {"dt": 1.0}
    dt: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        z = lerp(state.z, tanh(a.memory), self.dt * sigmoid(a.memory_time))
        time = self.dt * sigmoid(a.output_time)
        return self.State(h=lerp(state.h, tanh(x.output + project.output(z)), time), z=z)
