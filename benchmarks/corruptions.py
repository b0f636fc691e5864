"""Eight changes of images, as a camera, the weather or a file format makes them, from ``(N, 3, H, W)`` in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise."""
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def blur(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur with a deviation of one pixel."""
    line = torch.exp(-0.5 * torch.arange(-3.0, 4.0).square())
    line = (line / line.sum()).expand(3, 1, 1, 7)
    rows = F.conv2d(F.pad(x, (3, 3, 0, 0), mode="reflect"), line, groups=3)
    return F.conv2d(F.pad(rows, (0, 0, 3, 3), mode="reflect"), line.transpose(2, 3), groups=3)


def contrast(x: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the contrast."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (x - mean)


def brightness(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brighter by three tenths of the range."""
    return x + 0.3


def haze(x: Tensor, generator: torch.Generator) -> Tensor:
    """White haze, thicker in some places than in others."""
    coarse = torch.rand(len(x), 1, 4, 4, generator=generator)
    thickness = 0.4 + 0.4 * F.interpolate(coarse, x.shape[2:], mode="bilinear", align_corners=False)
    return x * (1 - thickness) + 0.9 * thickness


def pixelate(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half the resolution."""
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="nearest")


def saturation(x: Tensor, generator: torch.Generator) -> Tensor:
    """Colours two and a half times as far from grey, as an over-saturated picture has."""
    grey = x.mean(1, keepdim=True)
    return grey + 2.5 * (x - grey)


def quantisation(x: Tensor, generator: torch.Generator) -> Tensor:
    """Cosine coefficients of blocks of 8 by 8 rounded, the coarser the higher their frequency, as JPEG does."""
    k = torch.arange(8.0)
    basis = torch.cos(math.pi * (2 * k + 1) * k[:, None] / 16) * torch.where(k == 0, 0.5**0.5, 1.0)[:, None] / 2
    n, channels, height, width = x.shape
    blocks = x.view(n, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    step = 0.1 * (1 + k + k[:, None])
    coefficients = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(x.shape)


CORRUPTIONS: dict[str, Corruption] = {
    one.__name__: one for one in (noise, blur, contrast, brightness, haze, pixelate, saturation, quantisation)
}


def corrupted(x: Tensor, name: str, seed: int) -> Tensor:
    """Images changed by one of :data:`CORRUPTIONS`, the same for the same seed."""
    return CORRUPTIONS[name](x, torch.Generator().manual_seed(seed)).clamp(0, 1)
