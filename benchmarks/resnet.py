"""A small ResNet for images of 32 by 32 pixels, with any norm."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions, each with a norm, around which the input goes."""

    def __init__(self, inputs: int, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        stride = 1 if inputs == channels else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), norm(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), norm(channels),
        )  # fmt: skip
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def residual_network(norm: Callable[[int], nn.Module]) -> nn.Module:
    """A ResNet for small images: three stages of two blocks."""
    sizes = [16, 16, 16, 32, 32, 64, 64]
    stages = [Residual(inputs, channels, norm) for inputs, channels in itertools.pairwise(sizes)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm(16), nn.ReLU(), *stages,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
