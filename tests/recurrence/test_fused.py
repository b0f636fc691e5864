"""Layers on the fused backend: what they take, and what they draw."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bln import BLNLSTM
from tests.kernels.helpers import LAYERS, assert_close, built, evaluate, flat, pair, states_of

pytestmark = built


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_and_batch_first_inputs(kind) -> None:
    oracle, layer = pair(kind, 3, 5, batch_first=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64).transpose(0, 2).contiguous().transpose(0, 2)
    hx = states_of(oracle, 6)
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), 1e-10)


def test_autocast_computes_in_float32() -> None:
    layer = BLNLSTM(3, 5, backend="cpu")
    x = torch.randn(6, 4, 3).bfloat16()
    expected = layer(x.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
    assert torch.equal(output, expected)
    output.sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


def test_dropouts_draw_from_torchs_generator() -> None:
    layer = BLNLSTM(3, 5, recurrent_dropout=0.5, zoneout=0.5, backend="cpu")
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(layer(torch.ones(4, 2, 3))[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], layer(torch.ones(4, 2, 3))[0])


def test_the_state_dict_of_nn_lstm_runs_compiled() -> None:
    torch_layer = nn.LSTM(6, 20, num_layers=2, bidirectional=True)
    layer = BLNLSTM(6, 20, num_layers=2, bidirectional=True, norm=None, backend="cpu")
    layer.load_state_dict(torch_layer.state_dict())
    x = torch.randn(7, 4, 6)
    for found, expected in zip(flat(layer(x)), flat(torch_layer(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
