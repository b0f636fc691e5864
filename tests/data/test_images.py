"""Images: small files of every format, damaged ones, and the real data where it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bln.data import DataError, read_cifar10, read_idx, read_mnist

from .conftest import write_idx


def make_cifar(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (6, 3072), dtype=np.uint8), np.array([0, 9, 3, 4, 5, 1], np.uint8)
    folder.mkdir()
    for name, part in (("data_batch_1", slice(0, 2)), ("data_batch_2", slice(2, 4)), ("test_batch", slice(4, 6))):
        if kind == "bin":
            (folder / f"{name}.bin").write_bytes(np.hstack([labels[part, None], pixels[part]]).tobytes())
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": pixels[part], b"labels": labels[part].tolist()}, 2))
    return pixels.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10_batches(tmp_path: Path, kind: str) -> None:
    pixels, labels = make_cifar(tmp_path / f"cifar-10-batches-{kind}", kind)
    train, test = read_cifar10(tmp_path)
    np.testing.assert_array_equal(torch.cat([train.pixels, test.pixels]).numpy(), pixels)
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]).numpy(), labels)
    assert torch.equal(read_cifar10(tmp_path / f"cifar-10-batches-{kind}")[0].pixels, train.pixels)


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_broken_cifar10_is_named(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / f"cifar-10-batches-{kind}"
    make_cifar(folder, kind)
    path = folder / ("data_batch_2.bin" if kind == "bin" else "data_batch_2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{path.name}: truncated or corrupt") as caught:
        read_cifar10(tmp_path)
    assert "\n" not in str(caught.value)
    (folder / path.name.replace("data_batch_2", "test_batch")).unlink()
    path.unlink()
    with pytest.raises(DataError, match="test_batch"):
        read_cifar10(tmp_path)


class _Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("code in a data file ran",)


def test_python_batches_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, "py")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": _Evil(), b"labels": [1]}, 2))
    with pytest.raises(DataError, match=r"test_batch: truncated or corrupt \(asks for \w+\.print\)"):
        read_cifar10(tmp_path)
    assert capsys.readouterr().out == ""


def test_binary_labels_are_checked(tmp_path: Path) -> None:
    make_cifar(tmp_path / "cifar-10-batches-bin", "bin")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x63" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="label 99, classes are 0 to 9"):
        read_cifar10(tmp_path)


def test_real_cifar10(real_data: Path) -> None:
    train, test = read_cifar10(real_data)
    assert train.pixels.shape == test.pixels.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1_000] * 10


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx(tmp_path: Path, ending: str) -> None:
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    path = tmp_path / f"images-idx3-ubyte{ending}"
    write_idx(path, array)
    np.testing.assert_array_equal(read_idx(path).numpy(), array)
    raw = path.read_bytes()
    for broken in (raw[:-3], raw[:3], b"", b"\x00\x00\x0d\x01" + raw[4:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"images-idx3-ubyte.*truncated or corrupt"):
            read_idx(path)


def test_mnist_counts_must_agree(tmp_path: Path) -> None:
    for name, shape in (
        ("train-images-idx3-ubyte.gz", (3, 28, 28)),
        ("train-labels-idx1-ubyte", (2,)),
        ("t10k-images-idx3-ubyte", (1, 28, 28)),
        ("t10k-labels-idx1-ubyte.gz", (1,)),
    ):
        write_idx(tmp_path / name, np.zeros(shape))
    with pytest.raises(DataError, match="3 MNIST images but 2 labels"):
        read_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3))
    assert read_mnist(tmp_path)[0].pixels.shape == (3, 1, 28, 28)


def test_real_mnist(real_data: Path) -> None:
    train, test = read_mnist(real_data)
    assert (len(train.labels), len(test.labels)) == (60_000, 10_000)
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
