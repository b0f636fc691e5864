"""Data modules over images: their shapes, and one permutation for all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bln.data import CIFAR10Data, MNISTData, read_mnist

from .conftest import write_idx


def make_mnist(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("t10k", 5)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", rng.integers(0, 10, count))


@pytest.mark.parametrize(
    ("sequence", "shape"), [(None, (4, 1, 28, 28)), ("rows", (4, 28, 28)), ("pixels", (4, 784, 1))]
)
def test_mnist_shapes(tmp_path: Path, sequence: str | None, shape: tuple[int, ...]) -> None:
    make_mnist(tmp_path)
    data = MNISTData(tmp_path, sequence=sequence, batch_size=4, validation=4)  # type: ignore[arg-type]
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == shape
    assert labels.shape == (4,)
    assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0


def test_permuted_mnist_has_one_permutation(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    plain, mixed = (MNISTData(tmp_path, sequence="pixels", permutation=p, validation=4) for p in (None, 3))
    plain.setup()
    mixed.setup()
    raw = read_mnist(tmp_path)[1].pixels.flatten(1)[:, :, None] / 255
    (before, _), (after, _) = next(iter(plain.test_dataloader())), next(iter(mixed.test_dataloader()))
    assert torch.equal(before, raw)
    order = torch.randperm(784, generator=torch.Generator().manual_seed(3))
    assert torch.equal(after, before[:, order])


def test_cifar10_is_standardised(real_data: Path) -> None:
    data = CIFAR10Data(real_data, validation=1_000)
    data.setup()
    inputs = torch.cat([data.parts[part].tensors[0] for part in ("train", "validation")])  # type: ignore[attr-defined]
    assert inputs.shape == (10_000, 3, 32, 32)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(3, 32, 32), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std(0, unbiased=False), torch.ones(3, 32, 32), atol=1e-4, rtol=0)
