"""Moments merge exactly, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_bln import Moments

numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
samples = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6)
batches = st.lists(samples, min_size=1, max_size=5)


def moments_of(rows: list[tuple[float, float]]) -> Moments:
    return Moments.of(torch.tensor(rows, dtype=torch.float64)[:, None])


def assert_same(a: Moments, b: Moments) -> None:
    assert torch.equal(a.count, b.count)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-9, atol=1e-6)


@given(samples, samples, samples)
@settings(max_examples=50, deadline=None)
def test_merging_is_associative(a, b, c) -> None:
    a, b, c = map(moments_of, (a, b, c))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(batches, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_order_does_not_matter_and_it_is_the_concatenation(rows, random) -> None:
    total = moments_of([row for batch in rows for row in batch])
    random.shuffle(rows)
    merged = moments_of(rows[0])
    for batch in rows[1:]:
        merged = merged.merge(moments_of(batch))
    assert_same(merged, total)


@given(batches)
@settings(max_examples=50, deadline=None)
def test_merging_positions_is_the_concatenation(rows) -> None:
    parts = [moments_of(batch) for batch in rows]
    stacked = Moments(*(torch.cat([getattr(part, name) for part in parts]) for name in Moments._fields))
    assert_same(
        Moments(*(part[None] for part in stacked.merge_positions())),
        moments_of([row for batch in rows for row in batch]),
    )


def test_variance_survives_a_large_mean() -> None:
    x = torch.randn(4000, 1, 1, dtype=torch.float64) + 1e8
    merged = Moments.of(x[:100])
    for part in x[100:].split(100):
        merged = merged.merge(Moments.of(part))
    torch.testing.assert_close(merged.var(), x.var(0), rtol=1e-6, atol=0)
    sums = (x.square().mean() - x.mean().square()) * 4000 / 3999
    assert abs(sums / x.var() - 1) > 1e-3  # what sums of squares would have kept of it


def test_moments_that_saw_fewer_positions_merge_after_growing() -> None:
    short, long = Moments.of(torch.randn(3, 2, 4)), Moments.of(torch.randn(5, 6, 4))
    merged = short.grown(6).merge(long)
    assert merged.count.tolist() == [8, 8, 5, 5, 5, 5]
    torch.testing.assert_close(merged.mean[2:], long.mean[2:])


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="samples come first"):
        Moments.of(torch.zeros(0, 2, 3))
