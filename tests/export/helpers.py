"""Layers with a population, and the axes of their inputs that programs leave open."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BatchLayerNorm,
    ConvBLN1d,
    ConvBLN2d,
    ConvBLN3d,
    Recurrent,
    freeze_population,
    set_mode,
)
from lightning_bln._torch import CAN_EXPORT_LOOPS
from lightning_bln.cells import BLNLSTMCell

exports = pytest.mark.skipif(not CAN_EXPORT_LOOPS, reason="programs with open axes are tested from torch 2.13 on")

MODES = ("pppp", "ppcc", "cccc")
SIZES = ((1, 9), (3, 5), (17, 4))
"""Samples and steps to run programs at; the population has seen 6 steps."""


class Layer(NamedTuple):
    """A layer and its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int | str, ...]
    """Of the input, ``"samples"`` and ``"steps"`` for axes that stay open."""

    def example(self, samples: int, steps: int) -> Tensor:
        sizes = {"samples": samples, "steps": steps}
        return torch.randn([sizes[n] if isinstance(n, str) else n for n in self.shape])

    def axes(self) -> dict[int, Any]:
        lowest = {"samples": 1, "steps": 4 if len(self.shape) > 3 else 1}  # torch takes no image of one row for another
        named = {axis: name for axis, name in enumerate(self.shape) if isinstance(name, str)}
        return {axis: torch.export.Dim(name, min=lowest[name], max=64) for axis, name in named.items()}

    def made(self, mode: str = "ppcc") -> nn.Module:
        """The layer with a population, in evaluation."""
        layer = self.build()
        return evaluating(layer, [self.example(8, 6) for _ in range(2)], mode)


def evaluating(layer: nn.Module, batches: Iterable[Tensor], mode: str = "ppcc") -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for x in batches:
            layer(x)
    freeze_population(layer)
    set_mode(layer.eval(), mode)
    return layer


def flat(found: Any) -> list[Tensor]:
    """Tensors of a layer's result, in order."""
    return [found] if isinstance(found, Tensor) else [value for part in found for value in flat(part)]


BOTH = ("samples", "steps", 4)
ARRAYS = {
    "separate": Layer(lambda: BatchLayerNorm(4), BOTH),
    "shared": Layer(lambda: BatchLayerNorm(4, positions="shared"), BOTH),
    "image": Layer(lambda: BatchLayerNorm(4, channel_dim=1), ("samples", 4, 6, 5)),
    "image-shared": Layer(lambda: BatchLayerNorm(4, channel_dim=1, positions="shared"), ("samples", 4, "steps", 5)),
    "conv1d": Layer(lambda: ConvBLN1d(3, 4, 3, padding=1), ("samples", 3, "steps")),
    "conv2d": Layer(lambda: ConvBLN2d(3, 4, 3, positions="shared"), ("samples", 3, "steps", 6)),
    "conv3d": Layer(lambda: ConvBLN3d(3, 4, 3, positions="shared"), ("samples", 3, "steps", 5, 4)),
    "cell": Layer(lambda: BLNLSTMCell(4, 5), ("samples", 4)),
}

SEQUENCES = {
    "lstm": Layer(lambda: BLNLSTM(4, 5), ("steps", "samples", 4)),
    "gru": Layer(lambda: BLNGRU(4, 5, norm="layer", gate_statistics="joint", batch_first=True), BOTH),
    "deep": Layer(
        lambda: BLNLSTM(4, 5, 2, bidirectional=True, proj_size=3, zoneout=0.1, time_statistics="shared"),
        ("steps", "samples", 4),
    ),
    "batch": Layer(lambda: Recurrent("rnn", 4, 5, norm="batch", backend="reference"), ("steps", "samples", 4)),
    "fastgrnn": Layer(lambda: Recurrent("fastgrnn", 4, 5), ("steps", "samples", 4)),
    "mingru": Layer(lambda: Recurrent("mingru", 4, 5), ("steps", "samples", 4)),
    "lem": Layer(lambda: Recurrent("lem", 4, 5), ("steps", "samples", 4)),
    "slstm": Layer(lambda: Recurrent("slstm", 4, 5), ("steps", "samples", 4)),
}

CASES = [
    *[("separate", mode) for mode in MODES],
    *[(name, "ppcc") for name in ARRAYS if name != "separate"],
    *[(name, "cccc") for name in ("shared", "conv2d", "cell")],
    *[("lstm", mode) for mode in MODES],
    *[(name, "ppcc") for name in SEQUENCES if name != "lstm"],
]
LAYERS = ARRAYS | SEQUENCES
