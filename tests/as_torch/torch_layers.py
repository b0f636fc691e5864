"""Torch's own counterparts of the layers, as cases."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.as_torch.layers import EVAL, INPUTS, LENGTHS, SAMPLES, STEPS, TRAIN, UNITS, Case, partial_of


def block(convolution: type[nn.Module], norm: type[nn.Module], inputs: int, **factory: Any) -> nn.Module:
    """Convolution, activation and norm."""
    return nn.Sequential(convolution(inputs, 3, 2, **factory), nn.Tanh(), norm(3, **factory))


def cases(kind: str, make: Any, shapes: tuple[tuple[int, ...], ...], batch_axis: int, **options: Any) -> list[Case]:
    """A layer in training and in evaluation."""
    common = {"batch_axis": batch_axis, "time_axis": None, "norm": None, "few": True, **options}
    return [Case(kind, make, make, shapes, situation=situation, **common) for situation in (TRAIN, EVAL)]


def recurrent(kind: str, layer: type[nn.Module], states: int) -> list[Case]:
    make, after = partial_of(layer, INPUTS, UNITS), [(1, SAMPLES, UNITS)] * states
    return [
        *cases(kind, make, ((STEPS, SAMPLES, INPUTS), *after), 1, time_axis=0),
        *cases(kind, make, ((sum(LENGTHS), INPUTS), *after), 1, packed=True),
    ]


def cell(kind: str, layer: type[nn.Module], states: int) -> list[Case]:
    shapes = ((SAMPLES, INPUTS), *[(SAMPLES, UNITS)] * states)
    return cases(kind, partial_of(layer, INPUTS, UNITS), shapes, 0)


TORCH_LAYERS: dict[str, list[Case]] = {
    "BatchNorm1d": cases("BatchNorm1d", partial_of(block, nn.Conv1d, nn.BatchNorm1d, 2), ((4, 2, 3),), 0, time_axis=2),
    "BatchNorm2d": cases(
        "BatchNorm2d", partial_of(block, nn.Conv2d, nn.BatchNorm2d, 2), ((4, 2, 3, 3),), 0, time_axis=3
    ),
    "BatchNorm3d": cases(
        "BatchNorm3d", partial_of(block, nn.Conv3d, nn.BatchNorm3d, 1), ((3, 1, 3, 2, 3),), 0, time_axis=4
    ),
    "LSTM": recurrent("LSTM", nn.LSTM, 2),
    "GRU": recurrent("GRU", nn.GRU, 1),
    "RNN": recurrent("RNN", nn.RNN, 1),
    "LSTMCell": cell("LSTMCell", nn.LSTMCell, 2),
    "GRUCell": cell("GRUCell", nn.GRUCell, 1),
}
"""Batch norms stand behind a convolution."""
