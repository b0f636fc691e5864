"""Readers of CIFAR-10 and MNIST in their published formats."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bln.data.files import (
    DataError,
    PathLike,
    Remote,
    damaged,
    data_dir,
    download,
    locate,
    read_bytes,
    reading,
)

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
    arrays = []
    for name, remote in MNIST.items():
        packed = f"{name}.gz"
        arrays.append(read_idx(locate(root, (packed, name), "MNIST", remote, packed if fetch else None)))
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
    raw = read_bytes(path)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08" or len(raw) < 4 + 4 * raw[3]:
        raise damaged(path, "not an idx file of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", raw[3], 4))
    start = 4 + 4 * raw[3]
    if len(raw) - start != int(np.prod(shape)):
        raise damaged(path, f"header says {int(np.prod(shape))} bytes, {len(raw) - start} follow")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


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


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of the dicts, lists and numpy arrays in CIFAR's files, which refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if not is_array and (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        if not hasattr(np, "core"):
            module = module.replace("numpy.core", np.ndarray.__module__ + "._core")
        return super().find_class(module, name)


def _python_batch(path: Path) -> Images:
    with reading(path):
        try:
            with path.open("rb") as stream:
                batch = _ArraysOnly(stream, encoding="bytes").load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise damaged(path, error) from error
        pixels = torch.from_numpy(np.array(batch[b"data"], np.uint8)).view(-1, 3, 32, 32)
        labels = torch.tensor(batch[b"labels"], dtype=torch.long)
    if len(pixels) != len(labels):
        raise damaged(path, f"{len(pixels)} images, {len(labels)} labels")
    return Images(pixels, labels)
