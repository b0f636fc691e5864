"""Independently recurrent network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul

from lightning_bln.cells.cell import Extra
from lightning_bln.cells.gates import Gates
from lightning_bln.cells.rnn import NONLINEARITIES, RNN


class IndRNN(RNN):
    r"""Independently recurrent network, in which a unit sees no other's past.

    .. math::
        h_t = \phi(W x_t + u \circ h_{t-1} + b)

    Args:
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Source:
        Li et al., "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN", 2018,
        arXiv 1803.04831.
    """

    products = ()
    parameters = {"recurrent": Extra()}
    recurrent: Tensor

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = addcmul(x.hidden, self.recurrent, state.h)
        return self.State(h=NONLINEARITIES[self.nonlinearity](a))
