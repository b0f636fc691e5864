"""Barriers of generated kernels: a program that does not wait reads what is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from lightning_bln.kernels.triton._interpreter import Stuck, cooperative
from lightning_bln.recurrence.triton import kernels, run
from tests.on_triton.helpers import interpreted
from tests.on_triton.test_recurrent import compare, pair

pytestmark = interpreted

BARRIER = "        done += PROGRAMS\n        barrier(flag, done)\n"
CASES = [("ligru", None), ("ligru", "bln"), ("mgu", None), ("lstm", "bln"), ("mut3", "bln")]


@contextmanager
def source_changed(monkeypatch: pytest.MonkeyPatch, change: object) -> Iterator[None]:
    """Kernels whose source goes through a function."""
    load = kernels.load
    kernels.kernels_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "load", lambda source: load(change(source)))  # type: ignore[operator]
        yield
    kernels.kernels_of.cache_clear()


def is_right(cell: str, norm: str | None, seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a training step in one order of the programs is the reference's."""
    with monkeypatch.context() as patch:
        patch.setattr(run, "cooperative", partial(cooperative, seed, 20_000))
        try:
            compare(pair(cell, norm, units=40), torch.randn(4, 5, 3, dtype=torch.float64), 1e-10)
        except (AssertionError, Stuck):
            return False
    return True


@pytest.mark.parametrize(("cell", "norm"), CASES)
def test_every_barrier_is_needed(cell: str, norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []

    def seen(source: str) -> str:
        sources.append(source)
        return source

    with source_changed(monkeypatch, seen):
        assert all(is_right(cell, norm, seed, monkeypatch) for seed in range(3))
    (source,) = set(sources)
    number = source.count(BARRIER)
    assert number >= 2
    for left_out in range(number):

        def change(source: str, left_out: int = left_out) -> str:
            parts = source.split(BARRIER)
            return BARRIER.join(parts[: left_out + 1]) + BARRIER.join(["", *parts[left_out + 1 :]])[len(BARRIER) :]

        with source_changed(monkeypatch, change):
            assert not all(is_right(cell, norm, seed, monkeypatch) for seed in range(6)), left_out
