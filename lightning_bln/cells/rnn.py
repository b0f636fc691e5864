"""Simple recurrent network."""

from __future__ import annotations

from typing import Any

import torch

from lightning_bln._checks import check_choice
from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates

NONLINEARITIES = {"tanh": torch.tanh, "relu": torch.relu}


class RNN(Cell):
    r"""Simple recurrent network.

    .. math::
        h_t = \phi(W x_t + U h_{t-1} + b)

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Source:
        Elman, "Finding Structure in Time", 1990.
    """

    gates = ("hidden",)
    options = {"nonlinearity": "tanh"}
    nonlinearity: str

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        check_choice("nonlinearity", self.nonlinearity, tuple(NONLINEARITIES))

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        return self.State(h=NONLINEARITIES[self.nonlinearity]((x + project(state.h)).hidden))
