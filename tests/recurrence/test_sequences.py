"""A packed batch whose parts contradict each other is refused by name before anything reads its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_bln import BLNLSTM, Recurrent
from lightning_bln.recurrence.sequences import Form, check_packed


def packed(lengths: list[int], is_sorted: bool = False) -> PackedSequence:
    return pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=is_sorted)


def with_sizes(*sizes: int, **options: Any) -> Callable[[PackedSequence], PackedSequence]:
    return lambda x: x._replace(batch_sizes=torch.tensor(sizes, **options))


def with_order(name: str, *order: int, **options: Any) -> Callable[[PackedSequence], PackedSequence]:
    return lambda x: x._replace(**{name: torch.tensor(order, **options)})


WRONG = {
    "a list": (lambda x: x._replace(batch_sizes=[3, 2, 1]), "packed.batch_sizes is a list, but a tensor is needed"),
    "no axis": (
        lambda x: x._replace(batch_sizes=torch.tensor(6)),
        r"has shape \(\) and dtype torch.int64",
    ),
    "one step of all": (with_sizes(6), r"packed.sorted_indices has shape \(3,\) .* for each of 6 sequences"),
    "two axes": (lambda x: x._replace(batch_sizes=x.batch_sizes[None]), r"shape \(1, 3\) and dtype torch.int64 on cpu"),
    "floats": (lambda x: x._replace(batch_sizes=x.batch_sizes.float()), r"shape \(3,\) and dtype torch.float32"),
    "narrow integers": (with_sizes(3, 2, 1, dtype=torch.int32), "dtype torch.int32"),
    "another device": (lambda x: x._replace(batch_sizes=x.batch_sizes.to("meta")), "on meta, but one axis"),
    "no steps": (with_sizes(dtype=torch.int64), r"packed.batch_sizes=\[\], but"),
    "an empty step": (with_sizes(3, 3, 0), r"packed.batch_sizes=\[3, 3, 0\], but"),
    "a negative step": (with_sizes(4, 3, -1), "are at least one"),
    "a rise": (with_sizes(2, 3, 1), "never become more"),
    "modes repeated": (with_sizes(3, 2, 1, 3, 2, 1), "never become more"),
    "too few rows": (lambda x: x._replace(data=x.data[:-1]), r"packed.data has 5 rows, but .* has a sum of 6"),
    "too many rows": (lambda x: x._replace(data=x.data.repeat(2, 1)), "packed.data has 12 rows"),
    "too many sequences": (with_sizes(60, 20, 10), "packed.data has 6 rows"),
    "a short order": (with_order("sorted_indices", 1, 0), r"packed.sorted_indices has shape \(2,\)"),
    "a long inverse": (with_order("unsorted_indices", 1, 0, 2, 3), r"packed.unsorted_indices has shape \(4,\)"),
    "a float order": (with_order("sorted_indices", 1.0, 0.0, 2.0), "dtype torch.float32"),
    "out of range": (with_order("sorted_indices", 1, 0, 3), r"packed.sorted_indices=\[1, 0, 3\], but each of 0 to 2"),
    "below zero": (with_order("unsorted_indices", 1, 0, -1), "each of 0 to 2 is needed once"),
    "one twice": (with_order("unsorted_indices", 1, 0, 0), "each of 0 to 2 is needed once"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("norm", ["bln", None])
def test_what_is_wrong_in_a_packed_batch_is_named(name: str, backend: str, norm: str | None) -> None:
    change, words = WRONG[name]
    layer = Recurrent("lstm", 4, 3, norm=norm, backend=backend)
    with pytest.raises(ValueError, match=words):
        layer(change(packed([2, 3, 1])))


@settings(max_examples=50, deadline=None, database=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), is_sorted=st.booleans())
def test_what_torch_packs_is_accepted_and_padded_back(lengths: list[int], is_sorted: bool) -> None:
    x = packed(sorted(lengths, reverse=True) if is_sorted else lengths, is_sorted)
    check_packed(x)
    check_packed(PackedSequence(x.data, x.batch_sizes))
    form = Form.of(x, batch_first=False)
    assert form.x.shape == (max(lengths), len(lengths), 4)
    assert (form.sizes is None) == (len(set(lengths)) == 1)
    output, _ = form.restore(form.x, [(torch.zeros(len(lengths), 3),)])
    torch.testing.assert_close(output.data, x.data, rtol=0, atol=0)


def test_indices_of_32_bits_are_an_order_too() -> None:
    x = packed([2, 3, 1])
    layer = BLNLSTM(4, 3)
    narrow = x._replace(sorted_indices=x.sorted_indices.int(), unsorted_indices=x.unsorted_indices.int())
    torch.testing.assert_close(layer(narrow)[1], layer(x)[1], rtol=0, atol=0)


def test_the_form_of_a_packed_batch_compiles() -> None:
    x = packed([2, 3, 1])

    def form(x: PackedSequence) -> torch.Tensor:
        return Form.of(x, batch_first=False).x

    torch.testing.assert_close(torch.compile(form, backend="eager")(x), form(x), rtol=0, atol=0)
