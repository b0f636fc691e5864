"""Gated recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class GRU(Cell):
    """Gated recurrent unit (Cho et al. 2014), the reset gate after the product, as in :class:`torch.nn.GRU`."""

    gates = ("reset", "update", "new")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        p = project(state.h)
        r, z = sigmoid(x.reset + p.reset), sigmoid(x.update + p.update)
        n = tanh(x.new + r * p.new)
        return self.State(h=(1 - z) * n + z * state.h)
