"""Modes said to fold are those in which fold leaves no layer with a mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_bln import ALL_MODES, BLNLSTM, BatchLayerNorm, Normalization, fold, recompute_population, set_mode
from lightning_bln.equal_modes import foldable_modes
from lightning_bln.modes import mode_layers


def perceptron(*norms: str) -> nn.Module:
    return nn.Sequential(*(part for one in norms for part in (nn.Linear(4, 4), Normalization(4, norm=one), nn.Tanh())))


def lstm(norm: str) -> nn.Module:
    return BLNLSTM(4, 3, norm=norm, time_statistics="shared", norm_cell=False, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "bln": (lambda: nn.Sequential(nn.Linear(4, 4), BatchLayerNorm(4)), (4,), 1),
    "batch": (lambda: perceptron("batch", "batch"), (4,), 4),
    "layer": (lambda: perceptron("layer"), (4,), 4),
    "batch and layer": (lambda: perceptron("batch", "layer"), (4,), 1),
    "batch and bln": (lambda: perceptron("batch", "bln"), (4,), 1),
    "lstm of bln": (lambda: lstm("bln"), (5, 4), 1),
    "lstm of batch norms": (lambda: lstm("batch"), (5, 4), 4),
    "lstm of layer norms": (lambda: lstm("layer"), (5, 4), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_in_a_mode_that_folds_no_layer_with_a_mode_stays(name: str) -> None:
    make, shape, number = MODELS[name]
    model = make()
    recompute_population(model, [torch.randn(8, *shape) for _ in range(2)])
    expected = []
    for mode in ALL_MODES:
        set_mode(model, mode)
        if not mode_layers(fold(model)):
            expected.append(mode)
    assert foldable_modes(mode_layers(model)) == tuple(expected)
    assert len(expected) == number
    assert expected[0] == "pppp"


def test_where_no_letter_is_read_any_mode_folds() -> None:
    assert foldable_modes([]) == ALL_MODES
    assert foldable_modes([], ["cccc"]) == ("cccc",)
