"""Recurrent additive network."""

from __future__ import annotations

from typing import Any

from torch import addcmul, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class RAN(Cell):
    r"""Recurrent additive network, whose state is a weighted sum of inputs.

    .. math::
        \tilde{c}_t &= W_c x_t, \qquad i_t = \sigma(W_i x_t + U_i h_{t-1} + b_i), \qquad
        f_t = \sigma(W_f x_t + U_f h_{t-1} + b_f) \\
        c_t &= i_t \circ \tilde{c}_t + f_t \circ c_{t-1}, \qquad h_t = \tanh(c_t)

    Source:
        Lee et al., "Recurrent Additive Networks", 2017, arXiv 1705.07393.
    """

    gates = ("input", "forget", "content")
    states = ("h", "c")
    products = (("input", "forget"),)
    unbiased = ("content",)
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        c = addcmul(sigmoid(a.input) * x.content, sigmoid(a.forget), state.c)
        return self.State(h=tanh(self.norm_cell(c)), c=c)
