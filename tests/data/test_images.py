"""Images: small files of every format, damaged ones, and the real data where it is."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_bln.data import DataError, read_cifar10, read_idx, read_mnist
from lightning_bln.data.images import MNIST

from ..damage import OTHER_FORMATS, assert_names, flipped, little_memory, outcome, truncated
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


def read_images(folder: Path, kind: str) -> tuple[torch.Tensor, ...]:
    train, test = read_mnist(folder) if kind in ("idx", "gz") else read_cifar10(folder)
    return train.labels, test.labels


def make_images(folder: Path, kind: str) -> Path:
    """A small data set, and of its files the one to damage."""
    if kind in ("bin", "py"):
        make_cifar(folder / f"cifar-10-batches-{kind}", kind)
        return folder / f"cifar-10-batches-{kind}" / ("data_batch_1.bin" if kind == "bin" else "data_batch_1")
    ending = ".gz" if kind == "gz" else ""
    for name in MNIST:
        shape = (4, 28, 28) if "images" in name else (4,)
        write_idx(folder / f"{name}{ending}", np.random.default_rng(0).integers(0, 9, shape))
    return folder / f"train-images-idx3-ubyte{ending}"


@pytest.mark.parametrize("kind", ["bin", "py", "idx", "gz"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_damage_of_every_kind_is_one_line_that_names_the_file(tmp_path: Path, kind: str, damage: str) -> None:
    path = make_images(tmp_path, kind)
    raw = path.read_bytes()
    kinds = {"truncated": truncated(raw), "flipped": flipped(raw, 150), "other": OTHER_FORMATS.values()}
    refused = 0
    for changed in kinds[damage]:
        path.write_bytes(changed)
        with little_memory():
            found, message = outcome(lambda: torch.cat(read_images(tmp_path, kind)), DataError)
        if found is None:
            assert_names(message, tmp_path)
            refused += 1
        else:  # pixels may be of any value, and a file of fewer records is whole
            assert damage == "flipped" or (kind == "bin" and len(changed) % 3073 == 0)
            assert 0 <= int(found.min()) <= int(found.max()) <= 9
    assert refused or (kind, damage) == ("bin", "flipped")


@pytest.mark.parametrize(
    "shape", [(65536,) * 4, (2**32 - 1, 2**32 - 1), (2**31,), (2**16, 2**16), (0, 2**32 - 1), (1,) * 255, ()]
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_header_that_promises_too_much_costs_no_memory(
    tmp_path: Path, shape: tuple[int, ...], packed: bool
) -> None:
    raw = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + b"few bytes"
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with little_memory(), pytest.raises(DataError, match=r"ubyte: truncated or corrupt \(.+\); fetch it again"):
        read_idx(path)


def test_a_compressed_file_of_more_than_its_header_says_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    head = gzip.compress(struct.pack(">HBBI", 0, 8, 1, 10))
    path.write_bytes(head + gzip.compress(bytes(2**24)) * 300)
    with little_memory(), pytest.raises(DataError, match="header says 10 bytes, more follow"):
        read_idx(path)


@pytest.mark.parametrize("labels", [[10, 1], [-1, 1], ["a", 1], [None, 1], [1.5, 1], [2**70, 1], [1], [], (1, 2), None])
def test_labels_of_python_batches_are_checked(tmp_path: Path, labels: object) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, "py")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}, 2))
    with pytest.raises(DataError, match=r"test_batch: truncated or corrupt \(.*label"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("content", [{}, [], 7, {b"data": [1], b"labels": [1]}, {b"data": np.zeros((2, 7), np.uint8)}])
def test_python_batches_of_another_content_are_named(tmp_path: Path, content: object) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    make_cifar(folder, "py")
    (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match="test_batch: truncated or corrupt"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("train-labels-idx1-ubyte", np.array([1, 2, 3, 10]), "label 10, classes are 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.array([255, 2, 3, 4]), "label 255, classes are 0 to 9"),
        ("t10k-labels-idx1-ubyte", np.zeros((4, 1)), "2 axes, where 1 belong"),
        ("train-images-idx3-ubyte", np.zeros((4, 784)), "2 axes, where 3 belong"),
    ],
)
def test_mnist_files_of_another_content_are_named(tmp_path: Path, name: str, array: np.ndarray, reason: str) -> None:
    make_images(tmp_path, "idx")
    write_idx(tmp_path / name, array)
    with pytest.raises(DataError, match=rf"{name}: truncated or corrupt \({reason}\)"):
        read_mnist(tmp_path)
