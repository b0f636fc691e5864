"""A layer of plain tensors in place of a norm whose statistics are all given."""

# without postponed annotations, which torch.jit.script does not resolve

from typing import Any

from torch import Tensor, nn

from lightning_bln.recurrence.frozen_norm import at_least_float


class Affine(nn.Module):
    r"""A factor and a summand for each feature: a norm whose statistics are all given.

    .. math::
        y = \mathrm{weight} \cdot x + \mathrm{bias}

    Args:
        weight: Factors, ``(features,)``.
        bias: Summands, ``(features,)``.
        channel_dim: The feature axis.

    Shape:
        Any with a feature axis; the output has the input's shape and dtype.

    Example:
        >>> import torch
        >>> layer = Affine(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]))
        >>> layer(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 6.]])
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, channel_dim: int = -1) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.channel_dim = channel_dim

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.weight, self.bias = at_least_float(self.weight), at_least_float(self.bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``."""
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        return (x * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, channel_dim={self.channel_dim}"
