"""Bistable cells."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul, lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell, Extra
from lightning_bln.cells.gates import Gates


class BR(Cell):
    r"""Bistable recurrent cell, in which each unit has a memory of its own.

    .. math::
        a_t &= 1 + \tanh(U_a x_t + w_a \circ h_{t-1}) \\
        c_t &= \sigma(U_c x_t + w_c \circ h_{t-1}) \\
        h_t &= c_t \circ h_{t-1} + (1 - c_t) \circ \tanh(U x_t + a_t \circ h_{t-1})

    Source:
        Vecoven et al., "A bio-inspired bistable recurrent cell allows for long-lasting memory", 2021,
        doi 10.1371/journal.pone.0252676.
    """

    gates = ("modulation", "update", "hidden")
    products = ()
    parameters = {"weight_modulation": Extra(), "weight_update": Extra()}
    weight_modulation: Tensor
    weight_update: Tensor

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = 1 + tanh(addcmul(x.modulation, self.weight_modulation, state.h))
        c = sigmoid(addcmul(x.update, self.weight_update, state.h))
        return self.State(h=lerp(tanh(addcmul(x.hidden, a, state.h)), state.h, c))


class NBR(Cell):
    r"""Recurrently neuromodulated bistable cell: :class:`BR` with matrices in place of its two vectors.

    .. math::
        a_t &= 1 + \tanh(U_a x_t + W_a h_{t-1}) \\
        c_t &= \sigma(U_c x_t + W_c h_{t-1}) \\
        h_t &= c_t \circ h_{t-1} + (1 - c_t) \circ \tanh(U x_t + a_t \circ h_{t-1})

    Source:
        Vecoven et al., "A bio-inspired bistable recurrent cell allows for long-lasting memory", 2021,
        doi 10.1371/journal.pone.0252676.
    """

    gates = ("modulation", "update", "hidden")
    products = (("modulation", "update"),)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        gates = x + project(state.h)
        a, c = 1 + tanh(gates.modulation), sigmoid(gates.update)
        return self.State(h=lerp(tanh(addcmul(x.hidden, a, state.h)), state.h, c))
