"""Scalar LSTM."""

from __future__ import annotations

from typing import Any

from torch import addcmul, exp, maximum, sigmoid, tanh, where
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class SLSTM(Cell):
    r"""Scalar LSTM of the xLSTM, with exponential gates, a normaliser ``n`` and a stabiliser ``m``.

    .. math::
        m_t &= \max(\log \sigma(\tilde{f}_t) + m_{t-1}, \tilde{i}_t), \qquad
        i_t = \exp(\tilde{i}_t - m_t), \qquad f_t = \exp(\log \sigma(\tilde{f}_t) + m_{t-1} - m_t) \\
        c_t &= f_t \circ c_{t-1} + i_t \circ \tanh(\tilde{z}_t), \qquad n_t = f_t \circ n_{t-1} + i_t \\
        h_t &= \sigma(\tilde{o}_t) \circ c_t / n_t

    with :math:`\tilde{z}, \tilde{i}, \tilde{f}, \tilde{o} = W x_t + R h_{t-1} + b`. There is one head, so that
    :math:`R` is dense. The norm of the cell state acts on :math:`c_t / n_t`.

    Source:
        Beck et al., "xLSTM: Extended Long Short-Term Memory", 2024, arXiv 2405.04517.
    """

    gates = ("cell", "input", "forget", "output")
    states = ("h", "c", "n", "m")
    zoned = ("h",)
    has_norm_cell = True

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        log_f = F.logsigmoid(a.forget) + state.m
        m = where(state.n == 0, a.input, maximum(log_f, a.input))  # at the first step there is no past to stabilise
        i, f = exp(a.input - m), exp((log_f - m).clamp(max=0))
        c, n = addcmul(f * state.c, i, tanh(a.cell)), addcmul(i, f, state.n)
        return self.State(h=sigmoid(a.output) * self.norm_cell(c / n), c=c, n=n, m=m)
