"""Order of samples: whether neighbours are more alike than samples in random order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.joining import flatten

FEWEST = 32
"""Rows below which the score is not computed: it is not near its normal distribution."""
WINDOW = 16
"""Largest distance of neighbours; with fewer than 256 rows a sixteenth of them."""


def serial_score(rows: Tensor) -> float:
    r"""Standard score of the likeness of neighbouring rows, near a standard normal one where their order is random.

    With :math:`k` columns of mean 0 and variance 1, :math:`T = \sum z_i \cdot z_j` over the :math:`p` pairs of rows at
    most 16 apart has, over random orders of :math:`n` rows, mean :math:`-pk / (n - 1)` and about the variance
    :math:`p \lVert R \rVert_F^2`, :math:`R` being the correlation of the columns (Wald and Wolfowitz 1943, for one
    column and successive rows). Runs of one class make it large, whichever the classes are and however the samples are
    cut into batches.

    Args:
        rows: Numbers of each sample, ``(N, K)``.

    Returns:
        The score; 0 where there are fewer than 32 rows, or nothing varies.

    Example:
        >>> rows = torch.arange(100.0)[:, None]
        >>> round(serial_score(rows), 1), abs(serial_score(rows[torch.randperm(100)])) < 5
        (22.6, True)
    """
    rows = rows.double()
    rows = rows[:, rows.isfinite().all(0)]
    rows = rows - rows.mean(0)
    deviation = rows.square().mean(0).sqrt()
    varies = deviation > 1e-6 * deviation.max() if deviation.numel() else deviation > 0
    n, k = len(rows), int(varies.sum())
    if n < FEWEST or not k:
        return 0.0
    z = rows[:, varies] / deviation[varies]
    gram = z.T @ z if k < n else z @ z.T  # of the same norm
    distances = range(1, min(WINDOW, n // WINDOW) + 1)
    pairs = sum(n - distance for distance in distances)
    total = sum(float((z[:-distance] * z[distance:]).sum()) for distance in distances)
    return (total + pairs * k / (n - 1)) / math.sqrt(pairs * float((gram / n).square().sum()))


def rows_of(output: Any, samples: int) -> Tensor | None:
    """A row of numbers for each sample of what a model returned; ``None`` where it is open which are a sample's.

    Maps are averaged. An output of three axes may have time first, and is not taken.
    """
    leaves = [leaf for leaf in flatten(output)[0] if isinstance(leaf, Tensor)]
    if not leaves or leaves[0].ndim in (0, 3) or len(leaves[0]) != samples:
        return None
    rows = leaves[0].detach()
    if rows.is_floating_point():
        return rows[:, None] if rows.ndim == 1 else rows.flatten(2).mean(2) if rows.ndim > 2 else rows
    return rows[:, None] if rows.ndim == 1 else None


def labels_of(batch: Any, samples: int) -> Tensor | None:
    """Labels in a batch: its second entry, if that is a tensor with an integer for each sample."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        return None
    labels = batch[1]
    whole = not (labels.is_floating_point() or labels.is_complex())
    return labels if whole and labels.shape == (samples,) else None


def joined_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Rows of all batches in order, classes as indicators; ``None`` where a batch has none or others than the first."""
    found = [part.cpu() for part in parts if part is not None]
    if len(found) < len(parts) or not found or len({(one.shape[1:], one.dtype) for one in found}) > 1:
        return None
    rows = torch.cat(found)
    return rows if rows.is_floating_point() else indicators(rows[:, 0])


def indicators(labels: Tensor) -> Tensor:
    """Labels as rows with a one in the column of their class.

    Example:
        >>> indicators(torch.tensor([7, 3, 7]))
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]])
    """
    classes, index = labels.unique(return_inverse=True)
    return F.one_hot(index, len(classes)).float()
