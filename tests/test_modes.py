"""Statistics modes as values and on models, one at a time and fanned out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bln import (
    ALL_MODES,
    BATCH_INDEPENDENT_MODES,
    BLNLSTM,
    BatchLayerNorm,
    StatisticsMode,
    fan_out,
    recompute_population,
    set_mode,
    using_mode,
)


def test_there_are_sixteen_and_four_ignore_the_batch() -> None:
    assert len(set(ALL_MODES)) == 16
    assert set(BATCH_INDEPENDENT_MODES) == {"pppp", "pppc", "ppcp", "ppcc"}


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_mode_is_its_four_letters(mode) -> None:
    assert str(mode) == mode
    assert type(str(mode)) is str
    assert StatisticsMode(str(mode)) == mode
    assert mode.uses_population == tuple(letter == "p" for letter in str(mode))


@pytest.mark.parametrize("letters", ["", "ppp", "ppppp", "ppxc", "PPCC", 1011, None])
def test_unknown_modes_are_named(letters) -> None:
    with pytest.raises(ValueError, match="four letters") as caught:
        StatisticsMode(letters)
    assert f"mode={letters!r}" in str(caught.value)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4), nn.ReLU(), BatchLayerNorm(4))


def test_set_mode_reaches_every_layer_or_none() -> None:
    net = nn.Sequential(model(), BLNLSTM(4, 5))
    set_mode(net, "pccp")
    assert net[0][1].mode == net[0][3].mode == net[1].mode == "pccp"
    with pytest.raises(ValueError, match="mode='nope'"):
        set_mode(net, "nope")
    assert net[1].mode == "pccp"
    with pytest.raises(ValueError, match="model=Linear has no layer"):
        set_mode(nn.Linear(2, 2), "pppp")


def test_using_mode_gives_each_layer_its_own_back_even_after_an_error() -> None:
    net = model()
    net[1].mode = "cccc"
    with using_mode(net, "pppp"):
        assert net[1].mode == net[3].mode == "pppp"
    with pytest.raises(ValueError, match="x has shape"), using_mode(net, "pppp"):
        net[1](torch.zeros(4))
    assert (net[1].mode, net[3].mode) == ("cccc", "ppcc")


@pytest.mark.parametrize("positions", ["separate", "shared"])
def test_fan_out_equals_one_run_for_each_mode(positions) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        BatchLayerNorm(3, channel_dim=1, positions=positions),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 5),
        BatchLayerNorm(5),
    )
    recompute_population(net, [torch.randn(7, 2, 6, 6) for _ in range(3)])
    net.eval()
    x = torch.randn(4, 2, 6, 6)
    with fan_out(net, ALL_MODES):
        y = net(x)
    assert y.shape == (64, 5)
    for i, mode in enumerate(ALL_MODES):
        with using_mode(net, mode):
            torch.testing.assert_close(y[4 * i : 4 * i + 4], net(x))
