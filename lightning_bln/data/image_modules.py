"""Lightning data modules over images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_bln.data.batching import train_validation_split
from lightning_bln.data.data_module import DataModule
from lightning_bln.data.files import PathLike
from lightning_bln.data.images import Images, read_cifar10, read_mnist


class ImageData(DataModule):
    """Images and labels, with a seeded split of the training set into training and validation."""

    def __init__(
        self,
        data_dir: PathLike | None,
        download: bool,
        batch_size: int,
        validation: int | float,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.data_dir, self.download, self.validation = data_dir, download, validation

    def read(self, fetch: bool = False) -> tuple[Images, Images]:
        """Return training and test images."""
        raise NotImplementedError

    def transform(self, train: Images, test: Images) -> tuple[Tensor, Tensor]:
        """Return the network's inputs for training and test images."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        if self.download:
            self.read(fetch=True)

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        train, test = self.read()
        inputs, test_inputs = self.transform(train, test)
        kept, held_out = train_validation_split(len(train.labels), self.validation, self.seed)
        self.parts["train"] = TensorDataset(inputs[kept], train.labels[kept])
        self.parts["validation"] = TensorDataset(inputs[held_out], train.labels[held_out])
        self.parts["test"] = TensorDataset(test_inputs, test.labels)


class CIFAR10Data(ImageData):
    """CIFAR-10 from its binary or Python batches, each pixel and channel standardised over the training set.

    Batches are images ``(B, 3, 32, 32)`` and labels ``(B,)``, the input of :class:`~lightning_bln.models.PaperCIFAR10`.

    Args:
        data_dir: The folder that holds ``cifar-10-batches-bin`` or ``cifar-10-batches-py``.
        download: Whether to download the binary files if neither exists.
        batch_size: Samples per batch.
        validation: Size of the validation part of the training data, a count or a fraction.
        num_workers: Number of loader processes.
        seed: Seed of the split and of the order.
    """

    def __init__(
        self,
        data_dir: PathLike | None = None,
        *,
        download: bool = False,
        batch_size: int = 25,
        validation: int | float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(data_dir, download, batch_size, validation, num_workers, seed)

    def read(self, fetch: bool = False) -> tuple[Images, Images]:
        return read_cifar10(self.data_dir, fetch=fetch)

    def transform(self, train: Images, test: Images) -> tuple[Tensor, Tensor]:
        return standardise(train.pixels, test.pixels)


class MNISTData(ImageData):
    """MNIST from its idx files, as images or as sequences.

    Batches are ``(images, labels)``. Images have shape ``(B, 1, 28, 28)``, for ``"rows"`` ``(B, 28, 28)`` with one row
    per step, and for ``"pixels"`` ``(B, 784, 1)`` with one pixel per step; values lie in [0, 1].

    Args:
        data_dir: The folder that holds the four files or a folder ``mnist`` with them.
        sequence: ``"rows"``, ``"pixels"`` or ``None`` for images.
        permutation: Seed of one fixed permutation of all pixels (permuted MNIST); ``None`` for none.
        download: Whether to download missing files.
        batch_size: Samples per batch.
        validation: Size of the validation part of the training data, a count or a fraction.
        num_workers: Number of loader processes.
        seed: Seed of the split and of the order.
    """

    def __init__(
        self,
        data_dir: PathLike | None = None,
        *,
        sequence: Literal["rows", "pixels"] | None = None,
        permutation: int | None = None,
        download: bool = False,
        batch_size: int = 64,
        validation: int | float = 5_000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if sequence not in (None, "rows", "pixels"):
            raise ValueError(f"sequence={sequence!r}; use 'rows', 'pixels' or None")
        super().__init__(data_dir, download, batch_size, validation, num_workers, seed)
        self.sequence, self.permutation = sequence, permutation

    def read(self, fetch: bool = False) -> tuple[Images, Images]:
        return read_mnist(self.data_dir, fetch=fetch)

    def transform(self, train: Images, test: Images) -> tuple[Tensor, Tensor]:
        first, second = (self._arranged(images.pixels) for images in (train, test))
        return first, second

    def _arranged(self, pixels: Tensor) -> Tensor:
        flat = pixels.flatten(1).float() / 255.0
        if self.permutation is not None:
            generator = torch.Generator().manual_seed(self.permutation)
            flat = flat[:, torch.randperm(flat.shape[1], generator=generator)]
        if self.sequence == "pixels":
            return flat.unsqueeze(-1)
        return flat.view(-1, *pixels.shape[2 if self.sequence == "rows" else 1 :])


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise every feature by its mean and standard deviation over the training samples.

    Example:
        >>> standardise(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]]))
        (tensor([[-1.],
                [ 1.]]), tensor([[3.]]))
    """
    mean, std = train.float().mean(0), train.float().std(0, unbiased=False).clamp_min(1e-6)
    return (train.float() - mean) / std, (test.float() - mean) / std
