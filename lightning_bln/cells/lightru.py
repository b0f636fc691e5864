"""Light recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class LightRU(Cell):
    r"""Light recurrent unit, with one gate and a candidate that sees the input alone.

    .. math::
        \tilde{h}_t &= \tanh(W_h x_t + b_h), \qquad f_t = \sigma(W_f x_t + U_f h_{t-1} + b_f) \\
        h_t &= (1 - f_t) \circ h_{t-1} + f_t \circ \tilde{h}_t

    Source:
        Ye et al., "Light Recurrent Unit: Towards an Interpretable Recurrent Neural Network for Modeling Long-Range
        Dependency", 2024, doi 10.3390/electronics13163204.
    """

    gates = ("hidden", "forget")
    products = (("forget",),)

    def prepare(self, x: Gates, state: Any) -> Gates:
        return x.replace(hidden=tanh(x.hidden))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        return self.State(h=lerp(state.h, x.hidden, sigmoid(x.forget + project.forget(state.h))))
