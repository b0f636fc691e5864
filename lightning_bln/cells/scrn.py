"""Structurally constrained network."""

from __future__ import annotations

from typing import Any

from torch import lerp, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class SCRN(Cell):
    r"""Structurally constrained network, whose output ``y`` sees a hidden state ``h`` and a slow context ``s``.

    .. math::
        s_t &= (1 - \alpha) B x_t + \alpha s_{t-1} \\
        h_t &= \sigma(P s_t + A x_t + R h_{t-1}) \\
        y_t &= f(U h_t + V s_t)

    In the paper :math:`f` is the softmax over the words; here it is tanh, as an input of further layers. The context is
    as large as the hidden state.

    Args:
        alpha: Share of the context that is kept over a step.

    Source:
        Mikolov et al., "Learning Longer Memory in Recurrent Neural Networks", 2015, arXiv 1412.7753.
    """

    gates = ("context", "hidden")
    states = ("y", "h", "s")
    products = (("hidden",), ("output",), ("context_hidden", "context_output"))
    zoned = ("h", "s")
    options = {"alpha": 0.95}
    alpha: float

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        s = lerp(x.context, state.s, self.alpha)
        p = project.context_hidden(s)
        h = sigmoid(x.hidden + project.hidden(state.h) + p.context_hidden)
        return self.State(y=tanh(project.output(h) + p.context_output), h=h, s=s)
