"""The paper's networks and norms: their sizes, their parts and their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_bln import Normalization, set_mode
from lightning_bln.models import PAPER_NORMS, PaperCNN, PaperLSTM, paper_norm


def test_parameters_number_as_in_the_paper() -> None:
    assert sum(parameter.numel() for parameter in PaperLSTM().parameters()) == 10_620_161
    assert sum(parameter.numel() for parameter in PaperCNN().parameters()) == 83_578


@pytest.mark.parametrize("norm", PAPER_NORMS)
def test_norms_start_as_compared(norm: str) -> None:
    x = torch.randn(7, 9, 16) * 3 + 1
    y = paper_norm(norm, 16)(x)
    over = {"layer": (2,), "layer-scaled": (2,), "batch": (0, 1)}
    if norm == "bln":
        layer, batch = ((x - x.mean(d, True)) / (x.var(d, False, True) + 1e-3).sqrt() for d in (2, 0))
        expected = ((1 / 7 - 1e-4) * layer + (1 - 1 / 7 - 1e-4) * batch) / 4
    else:
        mean, var = x.mean(over[norm], True), x.var(over[norm], False, True)
        expected = (x - mean) / (var + 1e-3).sqrt() / (4 if norm == "layer-scaled" else 1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_at_batch_size_one_bln_is_the_control() -> None:
    x = torch.randn(1, 9, 16)
    torch.testing.assert_close(paper_norm("bln", 16)(x), paper_norm("layer-scaled", 16)(x), atol=1e-4, rtol=0)


def test_batch_norm_runs_as_in_keras() -> None:
    layer = paper_norm("batch", 3)
    mean, var = torch.zeros(3), torch.ones(3)
    for _ in range(5):
        x = torch.randn(4, 6, 3) * 2 + 5
        layer(x)
        mean = 0.99 * mean + 0.01 * x.mean((0, 1))
        var = 0.99 * var + 0.01 * x.var((0, 1))
    layer.eval().mode = "ppcc"
    torch.testing.assert_close(layer(x), (x - mean) / (var + 1e-3).sqrt())


def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm='group'; use one of bln, batch, layer, layer-scaled"):
        paper_norm("group", 3)


@pytest.mark.parametrize("network", [lambda: PaperLSTM(vocabulary=30, embedding=6, hidden=8), PaperCNN])
def test_statistics_touch_nothing_before_the_first_norm(network: Callable[[], torch.nn.Module]) -> None:
    model: Any = network()
    names = [name for name, module in model.named_children() if isinstance(module, Normalization)]
    assert names == [f"norm{number + 1}" for number in range(len(names))]
    x = torch.randint(0, 30, (4, 5)) if isinstance(model, PaperLSTM) else torch.randn(4, 3, 32, 32)
    model(x)
    model.eval()
    set_mode(model, "cccc")
    assert torch.equal(model(x), model.head(model.features(x)))
