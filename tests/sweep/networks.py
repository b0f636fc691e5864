"""Small networks that share their forwards in different ways, and data for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln import BLNLSTM, BatchLayerNorm, recompute_population


class Residual(nn.Module):
    """Adds its input to its layer's output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = BLNLSTM(5, 6, batch_first=True, num_layers=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (h, _) = self.layer(x)
        return self.head(out[:, -1]), h


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(5, scale=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 0.1 * torch.randn_like(x))


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchLayerNorm(5, scale=False)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        self.seen.append(y)
        return y


MODELS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 5), BatchLayerNorm(5), nn.Tanh(), BatchLayerNorm(5, scale=False)),
        (5,),
        True,
    ),
    "residual": (lambda: nn.Sequential(Residual(BatchLayerNorm(5)), Residual(BatchLayerNorm(5))), (5,), True),
    "recurrent": (Recurrent, (4, 5), True),
    "one layer": (lambda: BatchLayerNorm(5, scale=False), (5,), True),
    "random": (Noisy, (5,), False),
    "stateful": (Remembers, (5,), False),
}
"""For each network how to make it, the shape of a sample, and whether modes share a forward, which then is pure."""


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def prepared(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], bool]:
    """A network with a population, three batches, and whether it shares."""
    make, shape, shares = MODELS[name]
    model = make()
    batches = [(torch.randn(size, *shape) + 0.5, torch.randint(3, (size,))) for size in (8, 8, 3)]
    recompute_population(model, [torch.randn(8, *shape)])
    return model, batches, shares
