"""The layer as a module: training, modes, saving."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_bln import (
    ALL_MODES,
    BatchLayerNorm,
    Normalization,
    Recurrent,
    batch_layer_norm,
    freeze_population,
    recompute_population,
)


def fitted(**options: object) -> BatchLayerNorm:
    layer = BatchLayerNorm(5, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    recompute_population(layer, [torch.randn(4, 3, 5, dtype=torch.float64) + 1 for _ in range(4)])
    return layer.eval()


def test_the_sixteen_modes_differ_and_four_ignore_the_batch() -> None:
    layer, x = fitted(), torch.randn(6, 3, 5, dtype=torch.float64)
    outputs = []
    for mode in ALL_MODES:
        layer.mode = mode
        y = layer(x)
        split = torch.cat([layer(part) for part in x.split([1, 3, 2])])
        extended = layer(torch.cat([x, torch.randn(2, 3, 5, dtype=torch.float64)]))[:6]
        order = torch.randperm(6)
        torch.testing.assert_close(layer(x[order]), y[order])
        assert torch.allclose(split, y) == torch.allclose(extended, y) == mode.is_batch_independent
        outputs.append(y)
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-4


def test_cccc_is_training_at_the_trained_batch_size() -> None:
    layer = fitted()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    layer.mode = "cccc"
    torch.testing.assert_close(layer(x), batch_layer_norm(x, layer.weight, layer.bias))


@pytest.mark.parametrize("mode", ALL_MODES)
def test_batch_size_one_trains_and_evaluates(mode) -> None:
    layer = BatchLayerNorm(5)
    y = layer(torch.randn(1, 5))
    y.square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    freeze_population(layer)
    layer.eval().mode = mode
    assert layer(torch.randn(1, 5)).isfinite().all()


def test_without_a_population_the_current_input_serves_and_says_so_once() -> None:
    layer = BatchLayerNorm(5).eval()
    x = torch.randn(4, 5)
    with pytest.warns(UserWarning, match="mode='ppcc' needs a population"):
        y = layer(x)
    torch.testing.assert_close(y, batch_layer_norm(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        other = BatchLayerNorm(5).eval()
        other.mode = "cccc"
        other(x)


def test_a_saved_layer_predicts_the_same_wherever_it_is_loaded(tmp_path) -> None:
    layer = fitted()
    layer.mode = "pcpc"
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = BatchLayerNorm(5, dtype=torch.float64).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    assert other.mode == "pcpc"
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_autocast_and_compile_agree_with_eager() -> None:
    net = nn.Sequential(nn.Linear(5, 5), BatchLayerNorm(5))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).isfinite().all()
    recompute_population(net, [x])
    net.eval()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.randn(4, 6), ValueError, "num_features=5, but the input's feature axis (dim -1) has 6"),
        (torch.randn(5), ValueError, "x has shape (5,)"),
        (torch.randn(0, 5), ValueError, "empty batch"),
        (torch.randn(4, 5).double(), TypeError, "x has dtype torch.float64"),
        (torch.ones(4, 5, dtype=torch.int32), TypeError, "torch.int32"),
    ],
)
def test_bad_input_is_named_and_nothing_is_gathered(x, error, words) -> None:
    layer = BatchLayerNorm(5)
    with pytest.raises(error) as caught:
        layer(x)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not layer.population.is_gathering


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_features": 0}, "num_features=0"),
        ({"positions": "both"}, "positions='both'"),
        ({"population": "mean"}, "population='mean'"),
        ({"momentum": 1.5}, "momentum=1.5"),
        ({"norm": "group"}, "norm='group'"),
    ],
)
def test_bad_options_are_named(options, words) -> None:
    with pytest.raises(ValueError, match="but") as caught:
        Normalization(**{"num_features": 5, **options})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda norm: Normalization(3, norm=norm), torch.randn(1, 3)),
        (lambda norm: Normalization(3, norm=norm), torch.randn(1, 4, 3)),
        (lambda norm: Recurrent("gru", 3, 4, norm=norm), torch.randn(5, 1, 3)),
        (lambda norm: Recurrent("mgu", 3, 4, norm=norm), torch.randn(5, 1, 3)),
    ],
)
def test_batch_norm_warns_once_of_a_batch_of_one(layer, x) -> None:
    one = layer("batch")
    with pytest.warns(UserWarning, match="a batch of one"):
        one(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(x)
        layer("bln")(x)
        layer("layer")(x)
        layer("batch")(torch.cat([x, x], 0 if x.ndim < 3 or x.shape[0] == 1 else 1))


def test_batch_norm_over_positions_takes_one_sample() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Normalization(3, norm="batch", positions="shared")(torch.randn(1, 4, 3))


def test_reset_parameters_empties_the_population() -> None:
    for layer in (Normalization(3), Recurrent("gru", 3, 4)):
        layer(torch.randn(4, 5, 3))
        freeze_population(layer)
        layer.reset_parameters()
        assert not any(buffer.numel() for buffer in layer.buffers())


def test_a_forward_pass_without_memory_gathers_nothing() -> None:
    layer = Recurrent("gru", 3, 4, device="meta")
    layer(torch.randn(5, 2, 3, device="meta"))
    layer.to_empty(device="cpu").reset_parameters()
    layer(torch.randn(5, 2, 3))
    freeze_population(layer)
    assert layer.eval()(torch.randn(5, 2, 3))[0].isfinite().all()
