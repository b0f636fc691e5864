"""Variants of the LSTM."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul, lerp, sigmoid, tanh
from torch.nn import functional as F

from lightning_bln.cells.cell import Extra
from lightning_bln.cells.gates import Gates
from lightning_bln.cells.lstm import LSTM


class OriginalLSTM(LSTM):
    r"""Original LSTM, without a forget gate.

    .. math::
        i, o &= \sigma(W x_t + U h_{t-1} + b), \qquad g = \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        c_t &= c_{t-1} + i \circ g, \qquad h_t = o \circ \tanh(c_t)

    Source:
        Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
    """

    gates = ("input", "cell", "output")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        c = addcmul(state.c, sigmoid(a.input), tanh(a.cell))
        return self.State(h=sigmoid(a.output) * tanh(self.norm_cell(c)), c=c)


class CoupledLSTM(LSTM):
    r"""LSTM with coupled input and forget gates (CIFG).

    .. math::
        f, o &= \sigma(W x_t + U h_{t-1} + b), \qquad g = \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        c_t &= f \circ c_{t-1} + (1 - f) \circ g, \qquad h_t = o \circ \tanh(c_t)

    Source:
        Greff et al., "LSTM: A Search Space Odyssey", 2017, arXiv 1503.04069.
    """

    gates = ("forget", "cell", "output")

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        c = lerp(tanh(a.cell), state.c, sigmoid(a.forget))
        return self.State(h=sigmoid(a.output) * tanh(self.norm_cell(c)), c=c)


class PeepholeLSTM(LSTM):
    r"""LSTM with peepholes: the gates see the cell state.

    .. math::
        i &= \sigma(W_i x_t + U_i h_{t-1} + p_i \circ c_{t-1} + b_i), \qquad
        f = \sigma(W_f x_t + U_f h_{t-1} + p_f \circ c_{t-1} + b_f) \\
        c_t &= f \circ c_{t-1} + i \circ \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        o &= \sigma(W_o x_t + U_o h_{t-1} + p_o \circ c_t + b_o), \qquad h_t = o \circ \tanh(c_t)

    Source:
        Gers et al., "Learning Precise Timing with LSTM Recurrent Networks", 2002.
    """

    parameters = {"peephole_input": Extra(), "peephole_forget": Extra(), "peephole_output": Extra()}
    peephole_input: Tensor
    peephole_forget: Tensor
    peephole_output: Tensor

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a = x + project(state.h)
        i = sigmoid(addcmul(a.input, self.peephole_input, state.c))
        f = sigmoid(addcmul(a.forget, self.peephole_forget, state.c))
        c = addcmul(f * state.c, i, tanh(a.cell))
        o = sigmoid(addcmul(a.output, self.peephole_output, c))
        return self.State(h=o * self.out(tanh(self.norm_cell(c)), x), c=c)

    def out(self, squashed: Tensor, x: Gates) -> Tensor:
        r"""The output before its gate, from :math:`\tanh(c_t)`."""
        return squashed


class ResLSTM(PeepholeLSTM):
    r"""Residual LSTM, with a shortcut from its input to its output.

    .. math::
        i &= \sigma(W_i x_t + U_i h_{t-1} + p_i \circ c_{t-1} + b_i), \qquad
        f = \sigma(W_f x_t + U_f h_{t-1} + p_f \circ c_{t-1} + b_f) \\
        c_t &= f \circ c_{t-1} + i \circ \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        o &= \sigma(W_o x_t + U_o h_{t-1} + p_o \circ c_t + b_o) \\
        h_t &= o \circ (W_p \tanh(c_t) + W_r x_t)

    Source:
        Kim et al., "Residual LSTM: Design of a Deep Recurrent Architecture for Distant Speech Recognition", 2017,
        arXiv 1701.03360.
    """

    gates = ("input", "forget", "cell", "output", "residual")
    products = PeepholeLSTM.products
    unbiased = ("residual",)
    parameters = {**PeepholeLSTM.parameters, "weight_projection": Extra(("hidden_size", "hidden_size"))}
    weight_projection: Tensor
    has_projection = False

    def out(self, squashed: Tensor, x: Gates) -> Tensor:
        return F.linear(squashed, self.weight_projection) + x.residual


class WMCLSTM(LSTM):
    r"""LSTM with working memory connections from the cell state to its gates.

    .. math::
        i &= \sigma(W_i x_t + U_i h_{t-1} + \tanh(M_i c_{t-1}) + b_i), \qquad
        f = \sigma(W_f x_t + U_f h_{t-1} + \tanh(M_f c_{t-1}) + b_f) \\
        c_t &= f \circ c_{t-1} + i \circ \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        o &= \sigma(W_o x_t + U_o h_{t-1} + \tanh(M_o c_t) + b_o), \qquad h_t = o \circ \tanh(c_t)

    Source:
        Landi et al., "Working Memory Connections for LSTM", 2021, arXiv 2109.00020.
    """

    products = (LSTM.gates, ("memory_input", "memory_forget"), ("memory_output",))
    has_projection = False

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        a, m = x + project(state.h), project.memory_input(state.c)
        i = sigmoid(a.input + tanh(m.memory_input))
        f = sigmoid(a.forget + tanh(m.memory_forget))
        c = addcmul(f * state.c, i, tanh(a.cell))
        o = sigmoid(a.output + tanh(project.memory_output(c)))
        return self.State(h=o * tanh(self.norm_cell(c)), c=c)
