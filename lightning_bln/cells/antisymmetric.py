"""Antisymmetric networks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, add, addcmul, eye, sigmoid, tanh

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates


class AntisymmetricRNN(Cell):
    r"""Antisymmetric RNN: Euler's method on a stable differential equation.

    .. math::
        h_t = h_{t-1} + \epsilon \tanh((W_h - W_h^T - \gamma I) h_{t-1} + V_h x_t + b_h)

    Args:
        epsilon: Step size.
        gamma: Diffusion.

    Source:
        Chang et al., "AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks", 2019, arXiv 1902.09689.
    """

    gates: ClassVar[tuple[str, ...]] = ("hidden",)
    options = {"epsilon": 1.0, "gamma": 0.0}
    epsilon: float
    gamma: float

    def act(self, weight: Tensor) -> Tensor:
        """The antisymmetric matrix that ``weight`` parametrises, less the diffusion."""
        return weight - weight.t() - self.gamma * eye(len(weight), dtype=weight.dtype, device=weight.device)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        return self.State(h=add(state.h, tanh((x + project(state.h)).hidden), alpha=self.epsilon))


class GatedAntisymmetricRNN(AntisymmetricRNN):
    r"""Antisymmetric RNN with an input gate that shares its recurrent product.

    .. math::
        z_t &= \sigma((W_h - W_h^T - \gamma I) h_{t-1} + V_z x_t + b_z) \\
        h_t &= h_{t-1} + \epsilon z_t \circ \tanh((W_h - W_h^T - \gamma I) h_{t-1} + V_h x_t + b_h)

    Args:
        epsilon: Step size.
        gamma: Diffusion.

    Source:
        Chang et al., "AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks", 2019, arXiv 1902.09689.
    """

    gates = ("input", "hidden")
    products = (("shared",),)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        p = project.shared(state.h)
        return self.State(h=addcmul(state.h, sigmoid(x.input + p), tanh(x.hidden + p), value=self.epsilon))
