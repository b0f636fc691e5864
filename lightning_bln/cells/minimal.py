"""Minimal versions of the GRU and the LSTM, for parallel training."""

from __future__ import annotations

from torch import Tensor, sigmoid, where
from torch.nn import functional as F

from lightning_bln.cells.cell import LinearCell
from lightning_bln.cells.gates import Gates


class MinGRU(LinearCell):
    r"""Minimal GRU, whose gate and candidate see the input alone.

    .. math::
        z_t &= \sigma(W_z x_t), \qquad \tilde{h}_t = W_h x_t \\
        h_t &= (1 - z_t) \circ h_{t-1} + z_t \circ \tilde{h}_t

    Args:
        positive: Whether :math:`\tilde{h}_t = g(W_h x_t)` with :math:`g(a) = a + 0.5` if :math:`a \geq 0`, else
            :math:`\sigma(a)`, as in the paper's logarithmic form.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.
    """

    gates = ("update", "hidden")
    options = {"positive": False}
    positive: bool

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        z = sigmoid(x.update)
        return 1 - z, z * candidate(x.hidden, self.positive)


class MinLSTM(LinearCell):
    r"""Minimal LSTM, whose gates and candidate see the input alone.

    .. math::
        f_t &= \sigma(W_f x_t), \qquad i_t = \sigma(W_i x_t), \qquad \tilde{h}_t = W_h x_t \\
        h_t &= \frac{f_t}{f_t + i_t} \circ h_{t-1} + \frac{i_t}{f_t + i_t} \circ \tilde{h}_t

    Args:
        positive: As for :class:`MinGRU`.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.
    """

    gates = ("forget", "input", "hidden")
    options = {"positive": False}
    positive: bool

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        f = sigmoid(F.logsigmoid(x.forget) - F.logsigmoid(x.input))
        return f, (1 - f) * candidate(x.hidden, self.positive)


def candidate(a: Tensor, positive: bool) -> Tensor:
    """The candidate state, unchanged or made positive."""
    return where(a >= 0, a + 0.5, sigmoid(a)) if positive else a
