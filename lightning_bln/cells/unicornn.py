"""Undamped oscillatory network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class UnICORNN(Cell):
    r"""Undamped independent controlled oscillatory network; ``z`` is the velocity of ``h``.

    .. math::
        z_t &= z_{t-1} - \Delta t\, \sigma(c) \circ (\tanh(w \circ h_{t-1} + V x_t + b) + \alpha h_{t-1}) \\
        h_t &= h_{t-1} + \Delta t\, \sigma(c) \circ z_t

    Args:
        dt: Time step.
        alpha: Strength of the linear restoring force.

    Source:
        Rusch and Mishra, "UnICORNN: A recurrent model for learning very long time dependencies", 2021,
        arXiv 2103.05487.
    """

    gates = ("hidden",)
    states = ("h", "z")
    products = ()
    parameters = {"recurrent": Extra(), "control": Extra(read=sigmoid)}
    options = {"dt": 0.1, "alpha": 0.0}
    recurrent: Tensor
    control: Tensor
    dt: float
    alpha: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        force = tanh(addcmul(x.hidden, self.recurrent, state.h))
        if self.alpha:
            force = force + self.alpha * state.h
        z = addcmul(state.z, self.control, force, value=-self.dt)
        return self.State(h=addcmul(state.h, self.control, z, value=self.dt), z=z)
