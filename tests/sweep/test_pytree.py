"""Comparison of nested values."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_bln.sweep.pytree import is_close

LARGE = torch.tensor([1.0, 100.0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_entries_are_compared_beside_others_that_are_not(value) -> None:
    one = torch.cat([torch.tensor([value]), LARGE])
    assert is_close(one, one.clone())
    assert is_close(one, one + torch.tensor([0.0, 0.0, 1e-6]))
    assert not is_close(one, one + torch.tensor([0.0, 0.1, 0.0]))


def test_entries_that_are_not_finite_have_their_places() -> None:
    one = torch.tensor([math.nan, 1.0, math.inf])
    for other in ([1.0, math.nan, math.inf], [math.nan, 1.0, -math.inf], [math.inf, 1.0, math.inf], [0.0, 1.0, 2.0]):
        assert not is_close(one, torch.tensor(other))
        assert not is_close(torch.tensor(other), one)
    assert is_close(torch.tensor([math.nan]), torch.tensor([math.nan]))
