"""Convolution blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bln import BatchLayerNorm, ConvBLN1d, ConvBLN2d, ConvBLN3d, recompute_population

BLOCKS = {1: ConvBLN1d, 2: ConvBLN2d, 3: ConvBLN3d}


@pytest.mark.parametrize("axes", BLOCKS)
@pytest.mark.parametrize("order", ["conv-act-norm", "conv-norm-act"])
@pytest.mark.parametrize("positions", ["separate", "shared"])
def test_the_block_is_its_parts_in_order(axes, order, positions) -> None:
    block = BLOCKS[axes](2, 4, 3, activation=nn.ReLU, order=order, positions=positions)
    x = torch.randn(3, 2, *[6] * axes)
    norm = BatchLayerNorm(4, channel_dim=1, positions=positions)
    parts = (torch.relu, norm) if order == "conv-act-norm" else (norm, torch.relu)
    expected = block.conv(x)
    for part in parts:
        expected = part(expected)
    torch.testing.assert_close(block(x), expected)


def test_statistics_are_those_of_channels_last() -> None:
    block = ConvBLN2d(2, 4, 3, activation=None)
    x = torch.randn(3, 2, 6, 6)
    last = BatchLayerNorm(4)
    torch.testing.assert_close(block(x), last(block.conv(x).movedim(1, -1)).movedim(-1, 1))


def test_any_callable_activates() -> None:
    for activation in (nn.GELU, nn.PReLU(), torch.sin, None):
        assert ConvBLN2d(2, 4, 3, activation=activation)(torch.randn(3, 2, 6, 6)).shape == (3, 4, 4, 4)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_with_separate_positions_refuse_images_of_another_size(axis, training) -> None:
    for axes in range(max(2, axis - 1), 4):
        block, shape = BLOCKS[axes](2, 4, 3), [3, 2, *[6] * axes]
        recompute_population(block, [torch.randn(shape)])
        shape[axis] += 1
        with pytest.raises(ValueError, match="images keep their size"):
            block.train(training)(torch.randn(shape))


def test_sequences_of_any_length_go_through_a_block() -> None:
    block = ConvBLN1d(2, 4, 3)
    recompute_population(block, [torch.randn(3, 2, 6)])
    block.train()(torch.randn(3, 2, 9))
    assert block.eval()(torch.randn(1, 2, 12)).shape == (1, 4, 10)


def test_shared_positions_evaluate_images_of_another_size() -> None:
    block = ConvBLN2d(2, 4, 3, positions="shared")
    recompute_population(block, [torch.randn(3, 2, 6, 6)])
    assert block.eval()(torch.randn(1, 2, 11, 9)).shape == (1, 4, 9, 7)


@pytest.mark.parametrize(
    ("options", "x", "words"),
    [
        ({"order": "norm-conv"}, None, "order='norm-conv'"),
        ({"activation": "relu"}, None, "activation='relu'"),
        ({}, torch.randn(2, 6, 6), "x has 3 axes"),
        ({}, torch.randn(3, 3, 6, 6), "in_channels=2"),
    ],
)
def test_bad_input_is_named(options, x, words) -> None:
    with pytest.raises(ValueError, match="but") as caught:
        ConvBLN2d(2, 4, 3, **options)(x)
    assert words in str(caught.value)
