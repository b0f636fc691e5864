"""Scores of neighbouring samples' likeness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_bln.sample_order import indicators, labels_of, rows_of, serial_score


def by_hand(rows: Tensor, window: int) -> float:
    """The score by loops."""
    z = ((rows - rows.mean(0)) / rows.std(0, unbiased=False)).double()
    n, k = z.shape
    pairs = [(i, j) for i in range(n) for j in range(i + 1, min(i + window + 1, n))]
    total = sum(float(z[i] @ z[j]) for i, j in pairs)
    norm = float((z.T @ z / n).square().sum())
    return (total + len(pairs) * k / (n - 1)) / (len(pairs) * norm) ** 0.5


@pytest.mark.parametrize(("n", "k", "window"), [(40, 3, 2), (40, 60, 2), (300, 3, 16)])
def test_the_score_is_its_formula(n, k, window) -> None:
    torch.manual_seed(0)
    rows = torch.randn(n, k).cumsum(0) if k == 3 else torch.randn(n, k)
    assert serial_score(rows) == pytest.approx(by_hand(rows, window), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["normal", "skewed", "classes"])
@pytest.mark.parametrize("n", [32, 128, 512])
def test_scores_of_random_orders_are_small(n, kind) -> None:
    torch.manual_seed(0)
    rows = torch.randn(n, 5)
    rows = {"normal": rows, "skewed": rows.exp(), "classes": indicators(rows.argmax(1))}[kind]
    scores = torch.tensor([serial_score(rows[torch.randperm(n)]) for _ in range(200)])
    assert scores.max() < 5
    assert abs(scores.mean()) < 0.3


def test_rows_without_variation_or_numbers_score_nothing() -> None:
    assert serial_score(torch.ones(100, 3)) == 0
    assert serial_score(torch.full((100, 3), torch.nan)) == 0
    assert serial_score(torch.randn(31, 3)) == 0
    assert serial_score(torch.randn(100, 0)) == 0


def test_rows_are_taken_where_it_is_clear_which_belong_to_a_sample() -> None:
    maps = torch.randn(4, 3, 2, 2)
    rows = rows_of((maps, None), 4)
    assert rows is not None
    torch.testing.assert_close(rows, maps.mean((2, 3)))
    shapes = {(4,): (4, 1), (4, 3): (4, 3)}
    for shape, expected in shapes.items():
        assert rows_of({"y": torch.randn(shape)}, 4).shape == expected
    for other in (torch.randn(4, 5, 3), torch.randn(5, 3), torch.tensor(1.0), None, "text"):
        assert rows_of(other, 4) is None


def test_labels_are_a_second_entry_of_integers() -> None:
    x, y = torch.randn(4, 2), torch.arange(4)
    assert labels_of((x, y), 4) is y
    for batch in (x, (x,), (x, y.float()), (x, y[:2]), {"y": y}, (x, torch.zeros(4, 2).long())):
        assert labels_of(batch, 4) is None
