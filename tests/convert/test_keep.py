"""Conversion by ``norm="keep"``: a model of torch goes on to compute what it did."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_bln import Normalization, recompute_population, to_bln

SHAPES = {
    nn.BatchNorm1d: [(6, 3), (6, 3, 4)],
    nn.BatchNorm2d: [(4, 3, 5, 2)],
    nn.BatchNorm3d: [(3, 3, 2, 3, 2)],
    nn.SyncBatchNorm: [(6, 3), (4, 3, 5, 2)],
}
IN_TRAINING = {kind: shapes for kind, shapes in SHAPES.items() if kind is not nn.SyncBatchNorm}  # which runs on GPUs


def inputs(shapes: dict[Any, list[tuple[int, ...]]]) -> list[tuple[Any, tuple[int, ...]]]:
    return [(kind, shape) for kind, found in shapes.items() for shape in found]


def trained(layer: Any) -> Any:
    """A norm that is not as it starts: statistics, a count and weights."""
    if layer.running_mean is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(7)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def kept(layer: nn.Module, **options: Any) -> Any:
    return to_bln(copy.deepcopy(layer), norm="keep", **options)


def first(output: Any) -> torch.Tensor:
    while isinstance(output, tuple):
        output = output[0]
    return output


def assert_same_step(one: nn.Module, other: nn.Module, x: torch.Tensor, **tolerance: float) -> None:
    """Both give the same output and gradients."""
    found = []
    for module in (one, other):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        first(output).square().sum().backward()
        found.append((output, leaf.grad, [parameter.grad for parameter in module.parameters()]))
    torch.testing.assert_close(*found, **tolerance)


@pytest.mark.parametrize(("kind", "shape"), inputs(SHAPES))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_batchnorm_evaluates_the_same_at_once(kind, shape, affine, is_fresh, dtype) -> None:
    plain = kind(3, affine=affine, eps=1e-4, dtype=dtype)
    plain = (plain if is_fresh else trained(plain)).eval()
    converted, x = kept(plain), 3 * torch.randn(shape, dtype=dtype) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = converted(x)
    # torch rounds a factor and a summand of each channel to half precision
    torch.testing.assert_close(found, plain(x), **({"atol": 0.02, "rtol": 0.01} if is_half(dtype) else {}))
    assert found.dtype == dtype
    if is_half(dtype):
        exact = copy.deepcopy(plain).double()(x.double())
        torch.testing.assert_close(found, exact.to(dtype))
    assert (converted.norm, converted.mode, converted.eps) == ("batch", "ppcc", 1e-4)


@pytest.mark.exact
@pytest.mark.parametrize(("kind", "shape"), inputs(IN_TRAINING))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0])
@pytest.mark.filterwarnings("ignore:the layer has been trained since")
def test_a_batchnorm_trains_the_same(kind, shape, affine, is_fresh, momentum) -> None:
    plain = kind(3, affine=affine, momentum=momentum, dtype=torch.float64)
    plain = plain if is_fresh else trained(plain)
    converted = kept(plain)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * (step + 1) + step
        assert_same_step(converted.train(), plain.train(), x)
        torch.testing.assert_close(converted.population.batch_mean[0], plain.running_mean)
        torch.testing.assert_close(converted.population.batch_var[0], plain.running_var)
        assert_same_step(converted.eval(), plain.eval(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", IN_TRAINING)
def test_a_batchnorm_in_half_precision_trains_the_same(kind, dtype) -> None:
    plain = trained(kind(3, dtype=dtype))
    converted, x = kept(plain), torch.randn(IN_TRAINING[kind][0], dtype=dtype)
    torch.testing.assert_close(converted(x), plain(x), atol=0.05, rtol=0.05)
    mean = converted.population.batch_mean[0].to(dtype)
    torch.testing.assert_close(mean, plain.running_mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x), atol=0.05, rtol=0.05)


def test_the_sums_of_a_large_batch_in_half_precision_stay_finite() -> None:
    plain = trained(nn.BatchNorm2d(3, dtype=torch.float16))
    converted, x = kept(plain), 4 * torch.randn(32, 3, 32, 32).half()
    converted(x)
    expected = 0.9 * plain.running_var + 0.1 * x.double().var((0, 2, 3))
    torch.testing.assert_close(converted.population.batch_var[0].double(), expected, atol=0.01, rtol=0.01)


def test_the_average_over_all_batches_stays_where_it_is_and_is_reported() -> None:
    plain = trained(nn.BatchNorm1d(3, momentum=None)).eval()
    converted, report = kept(plain, report=True)
    x = torch.randn(5, 3)
    torch.testing.assert_close(converted(x), plain(x))
    assert "momentum=None, the average over all batches" in str(report.incomplete)
    converted.train()(x)
    torch.testing.assert_close(converted.population.batch_mean[0], plain.running_mean)


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_a_batchnorm_without_running_statistics_goes_by_the_batch(kind) -> None:
    plain = trained(kind(3, track_running_stats=False, dtype=torch.float64))
    converted, x = kept(plain), torch.randn(IN_TRAINING[kind][0], dtype=torch.float64)
    assert converted.mode == "cccc"
    for training in (True, False):
        assert_same_step(converted.train(training), plain.train(training), x)


def test_a_batchnorm_that_has_been_told_not_to_track_evaluates_by_what_it_has() -> None:
    plain = trained(nn.BatchNorm1d(3))
    plain.track_running_stats = False
    converted, x = kept(plain), torch.randn(5, 3)
    torch.testing.assert_close(converted.train()(x), plain.train()(x))
    with pytest.warns(UserWarning, match="has been trained since"):
        torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_a_batchnorm_on_no_device_keeps_the_shapes() -> None:
    converted = to_bln(nn.BatchNorm2d(3, device="meta"), norm="keep")
    assert converted.population.batch_mean.shape == (1, 3)
    assert converted.population.batch_mean.is_meta


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_a_layernorm_computes_the_same(options, dtype, shape) -> None:
    plain = nn.LayerNorm(4, **options, dtype=dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    converted, x = kept(plain), torch.randn(shape, dtype=dtype)
    assert converted.norm == "layer"
    if is_half(dtype):  # torch sums gradients in another order
        return torch.testing.assert_close(converted(x), plain(x), atol=0.05, rtol=0.02)
    for training in (True, False):
        assert_same_step(converted.train(training), plain.train(training), x)


RECURRENT = [
    (kind, {"num_layers": layers, "bidirectional": both, "batch_first": first, **extra})
    for (kind, extra), (layers, both, first) in itertools.product(
        [
            (nn.LSTM, {}),
            (nn.LSTM, {"proj_size": 2}),
            (nn.LSTM, {"bias": False}),
            (nn.GRU, {}),
            (nn.RNN, {}),
            (nn.RNN, {"nonlinearity": "relu", "bias": False}),
        ],
        [(1, False, False), (1, True, True), (2, False, True), (2, True, False)],
    )
]
CELLS = [
    (nn.LSTMCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu"}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT + CELLS)
def test_a_recurrent_layer_computes_the_same(kind, options) -> None:
    plain = kind(3, 4, **options).double()
    converted = kept(plain)
    assert converted.norm is None
    assert converted.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn((5, 3) if kind.__name__.endswith("Cell") else (5, 2, 3), dtype=torch.float64)
    for training in (True, False):
        assert_same_step(converted.train(training), plain.train(training), x)


def test_images_channels_last_compute_the_same() -> None:
    plain = trained(nn.BatchNorm2d(3))
    converted, x = kept(plain), torch.randn(4, 3, 5, 2).to(memory_format=torch.channels_last)
    torch.testing.assert_close(converted(x), plain(x))
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_a_transformer_computes_the_same() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False).eval()
    converted, x = kept(plain), torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(converted(x), plain(x))


def test_what_is_converted_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.LSTM(3, 3))
    with torch.inference_mode():
        to_bln(model, norm="keep")
    first(model(torch.randn(5, 3))).sum().backward()
    assert not any(one.is_inference() for one in [*model.parameters(), *model.buffers()])


def test_statistics_made_in_inference_mode_become_a_population() -> None:
    with torch.inference_mode():
        plain = trained(nn.BatchNorm1d(3, affine=False))
    converted, x = to_bln(plain, norm="keep"), torch.randn(5, 3)
    assert not converted.population.batch_mean.is_inference()
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_a_population_can_be_computed_anew() -> None:
    model = to_bln(nn.Sequential(nn.BatchNorm1d(3)), norm="keep")
    x = torch.randn(9, 3) + 4
    recompute_population(model, [x])
    torch.testing.assert_close(model[0].population.batch_mean[0], x.mean(0))


MODELS = {
    "batch norms": lambda: nn.Sequential(nn.BatchNorm1d(4)),
    "layer norms": lambda: nn.Sequential(nn.LayerNorm(4)),
    "recurrent layers": lambda: nn.Sequential(nn.LSTM(4, 4)),
    "cells": lambda: nn.Sequential(nn.GRUCell(4, 4)),
    "both": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.LSTM(4, 4)),
    "neither": lambda: nn.Sequential(nn.Linear(4, 4)),
    "none that converts": lambda: nn.Sequential(nn.LayerNorm((4, 4))),
}


@pytest.mark.parametrize("norm", ["foo", "Keep", "", None, True, 1, ["keep"]])
@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_norm_is_refused_whatever_the_model(name, norm) -> None:
    model = MODELS[name]()
    before = [*model]
    with pytest.raises(ValueError, match=r"norm=.*must be one of 'keep', 'bln', 'layer', 'batch'"):
        to_bln(model, norm=norm)
    assert [*model] == before


def test_a_model_with_nothing_to_convert_says_so() -> None:
    model, report = to_bln(nn.Sequential(nn.Linear(3, 3)), norm="keep", report=True)
    assert str(report) == "nothing to convert"
    assert len(model) == 1


@pytest.mark.parametrize("layer", [nn.LayerNorm((4, 4)), nn.LazyBatchNorm1d(), nn.BatchNorm2d(4, momentum=1.5)])
def test_what_is_refused_changes_nothing(layer) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), layer)
    with pytest.raises(ValueError, match=f"1 is a {type(layer).__name__}"):
        to_bln(model, norm="keep")
    assert isinstance(model[0], nn.BatchNorm1d)


def test_options_reach_recurrent_layers() -> None:
    model = to_bln(nn.Sequential(nn.LSTM(3, 3), nn.BatchNorm1d(3)), norm="keep", backend="reference")
    assert model[0].backend == "reference"
    assert isinstance(model[1], Normalization)
    with pytest.raises(ValueError, match="zoneut"):
        to_bln(nn.Sequential(nn.LSTM(3, 3)), norm="keep", zoneut=0.1)


def test_a_plain_tensor_of_the_user_is_kept() -> None:
    layer: Any = nn.BatchNorm1d(3)
    layer.prototype = torch.arange(3.0)
    assert to_bln(layer, norm="keep").prototype is layer.prototype
