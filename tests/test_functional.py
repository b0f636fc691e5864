"""The equation as a function."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_bln import ALL_MODES, batch_layer_norm
from lightning_bln.equation import Statistics, batch_statistics, feature_statistics

NAMES = Statistics._fields


def given_of(mode: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Some population, for the statistics whose letter is ``p``."""
    places = x.shape[1:-1]
    shapes = ((*places, x.shape[-1]), (*places, x.shape[-1]), (*places, 1), (*places, 1))
    values = (torch.rand(shape, dtype=x.dtype) + 0.5 for shape in shapes)
    return {name: value for name, value, letter in zip(NAMES, values, mode, strict=True) if letter == "p"}


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4)])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_gradients_are_those_of_finite_differences(mode, shape, norm) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    given = given_of(mode, x)
    assert torch.autograd.gradcheck(lambda x, w, b: batch_layer_norm(x, w, b, **given, norm=norm), (x, weight, bias))


def test_masked_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: batch_layer_norm(x, mask=mask)[mask], (x,))


def test_halves_are_torchs_layer_and_batch_norm() -> None:
    x = torch.randn(6, 8)
    options = {"scale": False, "eps": 1e-5}
    layer = batch_layer_norm(x, norm="layer", **options)
    batch = batch_layer_norm(x, norm="batch", **options)
    torch.testing.assert_close(layer, F.layer_norm(x, (8,)))
    torch.testing.assert_close(batch, F.batch_norm(x, None, None, training=True))
    whole = batch_layer_norm(x, delta=0.0, **options)
    torch.testing.assert_close(whole, layer / 6 + batch * 5 / 6)


@pytest.mark.parametrize(("batch_dim", "channel_dim"), [(0, 1), (1, 0), (2, 3), (-1, 0), (3, -2)])
def test_any_axes_may_hold_batch_and_features(batch_dim, channel_dim) -> None:
    x = torch.randn(2, 3, 4, 5)
    moved = x.movedim((batch_dim, channel_dim), (0, -1))
    expected = batch_layer_norm(moved).movedim((0, -1), (batch_dim, channel_dim))
    assert torch.equal(batch_layer_norm(x, batch_dim=batch_dim, channel_dim=channel_dim), expected)


def test_shared_positions_are_batch_norms() -> None:
    x = torch.randn(4, 5, 6, 7)
    options = {"channel_dim": 1, "norm": "batch", "scale": False, "eps": 1e-5}
    y = batch_layer_norm(x, positions="shared", **options)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))


def test_a_mask_leaves_padding_out() -> None:
    x = torch.randn(4, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    y = batch_layer_norm(x.masked_fill(~mask[..., None], float("nan")), mask=mask)
    for position, running in enumerate((4, 3, 1)):
        alone = batch_layer_norm(x[:running, position])
        torch.testing.assert_close(y[:running, position], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_take_statistics_in_float32(dtype) -> None:
    x = (torch.randn(64, 32) * 30 + 100).to(dtype)
    y = batch_layer_norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), batch_layer_norm(x.float()), rtol=1e-2, atol=1e-3)


def test_statistics_are_biased_and_keep_their_axes() -> None:
    x = torch.randn(4, 3, 5)
    mean, var = batch_statistics(x, (0,))
    torch.testing.assert_close(var, x.var(0, correction=0, keepdim=True))
    assert mean.shape == (1, 3, 5)
    assert feature_statistics(x)[1].shape == (4, 3, 1)


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (torch.randn(3), {}, ValueError, "x has shape (3,)"),
        (torch.randn(0, 3), {}, ValueError, "empty batch"),
        (torch.ones(2, 3, dtype=torch.long), {}, TypeError, "torch.int64"),
        (torch.randn(2, 3), {"weight": torch.ones(4)}, ValueError, "weight has shape (4,)"),
        (torch.randn(2, 3), {"channel_dim": 0}, ValueError, "the same axis"),
        (torch.randn(2, 3), {"channel_dim": 2}, ValueError, "channel_dim=2"),
        (torch.randn(2, 3), {"positions": "all"}, ValueError, "positions='all'"),
        (torch.randn(2, 3), {"norm": "group"}, ValueError, "norm='group'"),
        (torch.randn(2, 4, 3), {"mask": torch.ones(2, 3).bool()}, ValueError, "mask has shape (2, 3)"),
    ],
)
def test_bad_input_is_named(x, options, error, words) -> None:
    with pytest.raises(error) as caught:
        batch_layer_norm(x, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
