"""Conversion of plain torch modules to normalised ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bln import BLNLSTM, Normalization, from_torch, recompute_population, set_mode, to_bln


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=2),
        nn.GRU(3, 4, bias=False),
        nn.RNN(3, 4, nonlinearity="relu"),
    ],
)
def test_without_norm_a_converted_layer_computes_the_same(layer) -> None:
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(from_torch(layer, norm=None)(x), layer(x))


def test_with_norm_it_has_the_same_weights() -> None:
    layer = nn.LSTM(3, 4)
    converted = from_torch(layer, zoneout=0.1)
    assert isinstance(converted, BLNLSTM)
    assert converted.zoneout == 0.1
    for name, parameter in layer.named_parameters():
        assert torch.equal(getattr(converted, name), parameter)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_converted_norms_keep_weights_and_compute_the_same(norm) -> None:
    plain = nn.LayerNorm(6) if norm == "layer" else nn.BatchNorm2d(6)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    x = torch.randn(4, 5, 6) if norm == "layer" else torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(to_bln(plain, norm=norm)(x), plain(x))


def test_a_whole_model_converts_trains_and_evaluates() -> None:
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), nn.Linear(8, 2)
    )
    assert to_bln(model) is model
    assert [type(m) for m in model.modules() if isinstance(m, Normalization)] == [Normalization] * 2
    recompute_population(model, [torch.randn(7, 3)])
    set_mode(model, "pppp")
    assert model.eval()(torch.randn(1, 3)).isfinite().all()


def test_what_cannot_convert_is_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm((4, 4)))
    with pytest.raises(ValueError, match="1 is a LayerNorm over"):
        to_bln(model)
    assert isinstance(model[0], nn.BatchNorm1d)
    with pytest.raises(ValueError, match="layer=Linear, but only"):
        from_torch(nn.Linear(2, 2))
