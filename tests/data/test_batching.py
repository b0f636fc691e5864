"""Splits, buckets and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bln.data import LengthBuckets, pad_batch, pad_to_length, seeded_split


def test_split_is_seeded_disjoint_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = seeded_split(100, [60, 0.25], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(first), len(second)) == (60, 25)
    assert not set(first.tolist()) & set(second.tolist())
    assert torch.equal(first, seeded_split(100, [60, 0.25], seed=3)[0])
    assert not torch.equal(first, seeded_split(100, [60, 0.25], seed=4)[0])


@pytest.mark.parametrize("sizes", [[101], [0.6, 0.6], [-1, 5]])
def test_split_refuses_what_is_not_there(sizes: list[int | float]) -> None:
    with pytest.raises(ValueError, match="of 100 samples"):
        seeded_split(100, sizes, seed=0)


@given(
    lengths=st.lists(st.integers(0, 50), max_size=60),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    window=st.integers(1, 4),
)
def test_every_sample_is_in_one_batch(
    lengths: list[int], batch_size: int, shuffle: bool, drop_last: bool, window: int
) -> None:
    sampler = LengthBuckets(lengths, batch_size, shuffle=shuffle, drop_last=drop_last, window=window)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen))
    if drop_last:
        assert all(len(batch) == batch_size for batch in batches)
    else:
        assert sorted(seen) == list(range(len(lengths)))


def test_buckets_pad_less_and_follow_the_epoch() -> None:
    lengths = torch.randint(1, 400, (2_000,)).tolist()

    def padding(batches: LengthBuckets) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    bucketed, plain = LengthBuckets(lengths, 20), LengthBuckets(lengths, 20, window=1)
    assert padding(bucketed) < 0.15 * padding(plain)
    first = list(bucketed)
    assert first == list(bucketed)
    bucketed.set_epoch(1)
    assert first != list(bucketed)


def test_unshuffled_buckets_keep_the_order() -> None:
    assert list(LengthBuckets([5, 1, 3], 2, shuffle=False)) == [[0, 1], [2]]


def test_padding() -> None:
    tokens, lengths, labels = pad_batch([(torch.tensor([1, 2, 3]), 0), (torch.tensor([4]), 2)], padding=9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert (lengths.tolist(), labels.tolist()) == ([3, 1], [0, 2])


def test_padding_in_front_as_keras_does() -> None:
    assert pad_to_length([[1, 2, 3], [], [4, 5]], 2, padding=7).tolist() == [[2, 3], [7, 7], [4, 5]]
