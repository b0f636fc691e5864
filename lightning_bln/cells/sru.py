"""Simple recurrent unit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul, lerp, sigmoid

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class SRU(Cell):
    r"""Simple recurrent unit, whose matrices act on the input alone.

    .. math::
        f_t &= \sigma(W_f x_t + v_f \circ c_{t-1} + b_f), \qquad r_t = \sigma(W_r x_t + v_r \circ c_{t-1} + b_r) \\
        c_t &= f_t \circ c_{t-1} + (1 - f_t) \circ W x_t \\
        h_t &= r_t \circ c_t + (1 - r_t) \circ W_s x_t

    :math:`W_s x_t` stands for the paper's :math:`x_t`, projected to the hidden size.

    Source:
        Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", 2018, arXiv 1709.02755.
    """

    gates = ("forget", "reset", "cell", "skip")
    states = ("h", "c")
    products = ()
    unbiased = ("cell", "skip")
    parameters = {"recurrent_forget": Extra(), "recurrent_reset": Extra()}
    recurrent_forget: Tensor
    recurrent_reset: Tensor
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        f = sigmoid(addcmul(x.forget, self.recurrent_forget, state.c))
        r = sigmoid(addcmul(x.reset, self.recurrent_reset, state.c))
        c = lerp(x.cell, state.c, f)
        return self.State(h=lerp(x.skip, self.norm_cell(c), r), c=c)
