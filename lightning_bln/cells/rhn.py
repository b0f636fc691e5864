"""Recurrent highway network."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln._checks import check_int
from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class RHN(Cell):
    r"""Recurrent highway network, with several highway layers in each step.

    .. math::
        n_l &= \tanh([l = 1] W_n x_t + R_{n,l} s_{l-1} + b_{n,l}), \qquad
        z_l = \sigma([l = 1] W_z x_t + R_{z,l} s_{l-1} + b_{z,l}) \\
        s_l &= n_l \circ z_l + s_{l-1} \circ (1 - z_l), \qquad s_0 = h_{t-1}, \qquad h_t = s_L

    Transform and carry gates are coupled, as in all of the paper's experiments.

    Args:
        depth: The paper's :math:`L`.

    Source:
        Zilly et al., "Recurrent Highway Networks", 2017, arXiv 1607.03474.
    """

    gates = ("hidden", "transform")
    options = {"depth": 3}
    depth: int

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.depth = check_int("depth", self.depth, 1)
        deeper = tuple((f"hidden{layer}", f"transform{layer}") for layer in range(1, self.depth))
        self.products = (self.gates, *deeper)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        n, z = (x + project(state.h)).split().values()
        s = lerp(state.h, tanh(n), sigmoid(z))
        for hidden, _ in self.products[1:]:
            n, z = getattr(project, hidden)(s).split().values()
            s = lerp(s, tanh(n), sigmoid(z))
        return self.State(h=s)
