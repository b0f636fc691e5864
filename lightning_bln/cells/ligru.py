"""Light gated recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import lerp, relu, sigmoid

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class LiGRU(Cell):
    r"""Light gated recurrent unit, with ReLU and without a reset gate.

    .. math::
        z_t &= \sigma(\mathrm{BN}(W_z x_t) + U_z h_{t-1}), \qquad
        \tilde{h}_t = \mathrm{ReLU}(\mathrm{BN}(W_h x_t) + U_h h_{t-1}) \\
        h_t &= z_t \circ h_{t-1} + (1 - z_t) \circ \tilde{h}_t

    The paper and SpeechBrain normalise the input's products alone, as
    ``Recurrent("ligru", ..., norm="batch", norm_hidden=False)`` does, with statistics of each step.

    Source:
        Ravanelli et al., "Light Gated Recurrent Units for Speech Recognition", 2018, arXiv 1803.10225.
    """

    gates = ("update", "hidden")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        return self.State(h=lerp(relu(a.hidden), state.h, sigmoid(a.update)))
