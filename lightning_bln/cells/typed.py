"""Strongly-typed and quasi-recurrent networks, whose gates see the input alone."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, cat, sigmoid, tanh

from lightning_bln.cells.cell import LinearCell
from lightning_bln.cells.gates import Gates


class TRNN(LinearCell):
    r"""Strongly-typed RNN.

    .. math::
        z_t &= W x_t, \qquad f_t = \sigma(V x_t + b) \\
        h_t &= f_t \circ h_{t-1} + (1 - f_t) \circ z_t

    Source:
        Balduzzi and Ghifary, "Strongly-Typed Recurrent Neural Networks", 2016, arXiv 1602.02218.
    """

    gates = ("hidden", "forget")

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        f = sigmoid(x.forget)
        return f, (1 - f) * x.hidden


class TwoInputs(LinearCell):
    """Linear cell whose gates see two inputs, this step's and the one before.

    The state ``before`` holds the share of each gate that comes from the input before.
    """

    gates = ("hidden", "forget", "output", "hidden_before", "forget_before", "output_before")
    states: ClassVar[tuple[str, ...]] = ("h", "before")
    unbiased = ("hidden_before", "forget_before", "output_before")
    zoned: ClassVar[tuple[str, ...]] = ("h",)

    def state_size(self, state: str, hidden_size: int) -> int:
        return 3 * hidden_size if state == "before" else hidden_size

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        return super().step(self.with_before(x, state.before), state, project)

    def whole(self, x: Gates, state: Any) -> Gates:
        return self.with_before(x, cat([state.before[None], self.before(x)[:-1]]))

    def with_before(self, x: Gates, before: Tensor) -> Gates:
        """The gates with their shares of the input before."""
        size = x.hidden.shape[-1]
        hidden, others = before[..., :size], before[..., size:]
        forget, output = others[..., :size], others[..., size:]
        return x.replace(hidden=x.hidden + hidden, forget=x.forget + forget, output=x.output + output)

    def before(self, x: Gates) -> Tensor:
        """The share of the next step's gates that comes from this step's input."""
        return cat([x.hidden_before, x.forget_before, x.output_before], -1)


class TGRU(TwoInputs):
    r"""Strongly-typed GRU.

    .. math::
        z_t &= V_z x_{t-1} + W_z x_t + b_z, \qquad f_t = \sigma(V_f x_{t-1} + W_f x_t + b_f), \qquad
        o_t = \tanh(V_o x_{t-1} + W_o x_t + b_o) \\
        h_t &= f_t \circ h_{t-1} + z_t \circ o_t

    Source:
        Balduzzi and Ghifary, "Strongly-Typed Recurrent Neural Networks", 2016, arXiv 1602.02218.
    """

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        return sigmoid(x.forget), x.hidden * tanh(x.output)

    def readout(self, x: Gates, s: Tensor) -> Any:
        return self.State(h=s, before=self.before(x))


class TLSTM(TwoInputs):
    r"""Strongly-typed LSTM.

    .. math::
        z_t &= V_z x_{t-1} + W_z x_t + b_z, \qquad f_t = \sigma(V_f x_{t-1} + W_f x_t + b_f), \qquad
        o_t = \tanh(V_o x_{t-1} + W_o x_t + b_o) \\
        c_t &= f_t \circ c_{t-1} + (1 - f_t) \circ z_t, \qquad h_t = c_t \circ o_t

    Source:
        Balduzzi and Ghifary, "Strongly-Typed Recurrent Neural Networks", 2016, arXiv 1602.02218.
    """

    states = ("h", "c", "before")
    linear = "c"
    zoned = ("h", "c")
    has_norm_cell = True

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        f = sigmoid(x.forget)
        return f, (1 - f) * x.hidden

    def readout(self, x: Gates, s: Tensor) -> Any:
        return self.State(h=self.norm_cell(s) * tanh(x.output), c=s, before=self.before(x))


class QRNN(TLSTM):
    r"""Quasi-recurrent network with fo-pooling: convolutions of width two over time in place of recurrent products.

    .. math::
        z_t &= \tanh(V_z x_{t-1} + W_z x_t + b_z), \qquad f_t, o_t = \sigma(V x_{t-1} + W x_t + b) \\
        c_t &= f_t \circ c_{t-1} + (1 - f_t) \circ z_t, \qquad h_t = o_t \circ c_t

    Source:
        Bradbury et al., "Quasi-Recurrent Neural Networks", 2017, arXiv 1611.01576.
    """

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        f = sigmoid(x.forget)
        return f, (1 - f) * tanh(x.hidden)

    def readout(self, x: Gates, s: Tensor) -> Any:
        return self.State(h=self.norm_cell(s) * sigmoid(x.output), c=s, before=self.before(x))
