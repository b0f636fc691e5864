"""Readers of CIFAR-10 and MNIST in their published formats."""

from __future__ import annotations

import math
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bln._files import one_line
from lightning_bln.data.files import (
    DataError,
    PathLike,
    Remote,
    damaged,
    data_dir,
    download,
    locate,
    read_sized,
    reading,
)
from lightning_bln.data.pickled import read_arrays

CIFAR10 = Remote("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530")
_MNIST_MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST = {
    name: Remote(f"{_MNIST_MIRROR}{name}.gz", checksum)
    for name, checksum in (
        ("train-images-idx3-ubyte", "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels-idx1-ubyte", "md5:d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images-idx3-ubyte", "md5:9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels-idx1-ubyte", "md5:ec29112dd5afa0611ce80d1b7f02629c"),
    )
}
_RECORD = 1 + 3 * 32 * 32


class Images(NamedTuple):
    """Images, uint8 ``(N, channels, height, width)``, and their class indices, int64 ``(N,)``."""

    pixels: Tensor
    labels: Tensor


def read_cifar10(directory: PathLike | None = None, *, fetch: bool = False) -> tuple[Images, Images]:
    """Read CIFAR-10 (Krizhevsky 2009): binary records (``cifar-10-batches-bin``) or Python batches (``...-py``).

    Args:
        directory: The folder that holds either folder, or is one of them.
        fetch: Whether to download and unpack the binary archive if neither exists.

    Returns:
        Training images, from as many ``data_batch_*`` files as exist, and test images.

    Raises:
        DataError: Neither exists, or a file is damaged.
    """
    root = data_dir(directory)
    names = ("cifar-10-batches-bin", "cifar-10-batches-py")
    if root.name in names:
        root = root.parent
    if fetch and not any((root / name).exists() for name in names):
        archive = download(CIFAR10, root / "cifar-10-binary.tar.gz")
        with reading(archive), tarfile.open(archive) as packed:
            packed.extractall(root, filter="data")
    folder = locate(root, names, "CIFAR-10", CIFAR10, details=" (162 MB) and unpack it")
    read, ending = (_binary_batch, ".bin") if folder.name.endswith("bin") else (_python_batch, "")
    train = sorted(path for path in folder.glob(f"data_batch_*{ending}") if path.suffix == ending)
    if not train:
        raise DataError(f"{folder}: holds no data_batch_1{ending}; unpack {CIFAR10.url} again")
    parts = [read(path) for path in train]
    joined = Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))
    return joined, read(folder / f"test_batch{ending}")


def read_mnist(directory: PathLike | None = None, *, fetch: bool = False) -> tuple[Images, Images]:
    """Read MNIST (LeCun et al. 1998) from its four idx files, compressed by gzip or not.

    Args:
        directory: The folder that holds them or a folder ``mnist`` with them.
        fetch: Whether to download missing files.

    Raises:
        DataError: A file is missing or damaged, or images and labels differ in number.
    """
    root = data_dir(directory)
    root = root / "mnist" if (root / "mnist").is_dir() else root
    found = {}
    for name, remote in MNIST.items():
        packed = f"{name}.gz"
        path = locate(root, (packed, name), "MNIST", remote, packed if fetch else None)
        found[name] = read_idx(path)
        axes = 3 if "images" in name else 1
        if found[name].ndim != axes:
            raise damaged(path, f"{found[name].ndim} axes, where {axes} belong")
        if axes == 1 and len(found[name]) and int(found[name].max()) > 9:
            raise damaged(path, f"label {int(found[name].max())}, classes are 0 to 9")
    arrays = [*found.values()]
    splits = [Images(arrays[i].unsqueeze(1), arrays[i + 1].long()) for i in (0, 2)]
    for split in splits:
        if len(split.pixels) != len(split.labels):
            raise DataError(
                f"{root}: {len(split.pixels)} MNIST images but {len(split.labels)} labels; fetch them again"
            )
    return splits[0], splits[1]


def read_idx(path: PathLike) -> Tensor:
    """Read one idx file of unsigned bytes, compressed by gzip or not.

    Raises:
        DataError: The header is not idx, or the file is shorter or longer than the header says.
    """
    path = Path(path)
    shape: tuple[int, ...] = ()

    def sizes(raw: bytes) -> tuple[int, int]:
        nonlocal shape
        if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
            raise damaged(path, "not an idx file of unsigned bytes")
        shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", raw[3], 4))
        return 4 + 4 * raw[3], math.prod(shape)  # not numpy's, whose integers overflow

    raw = read_sized(path, 4 + 4 * 255, sizes)
    with reading(path):
        return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


def _binary_batch(path: Path) -> Images:
    with reading(path):
        raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % _RECORD:
        raise damaged(path, f"{len(raw)} bytes are no multiple of {_RECORD}, the size of a record")
    records = torch.from_numpy(raw).view(-1, _RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise damaged(path, f"label {int(labels.max())}, classes are 0 to 9")
    return Images(records[:, 1:].reshape(-1, 3, 32, 32), labels)


def _python_batch(path: Path) -> Images:
    with reading(path):
        batch = read_arrays(path.read_bytes(), path)
    data, labels = (batch.get(key) if isinstance(batch, dict) else None for key in (b"data", b"labels"))
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _RECORD - 1:
        raise damaged(path, f"no array of images of {_RECORD - 1} bytes under b'data'")
    if not isinstance(labels, list) or len(labels) != len(data) or not labels:
        raise damaged(path, f"no list of as many labels as the {len(data)} images under b'labels'")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label <= 9]
    if wrong:
        raise damaged(path, f"label {one_line(repr(wrong[0]))[:20]}, classes are 0 to 9")
    return Images(torch.from_numpy(data.copy()).view(-1, 3, 32, 32), torch.tensor(labels))
