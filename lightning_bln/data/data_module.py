"""Base class of the data modules: a loader for each part."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lightning_bln.data.files import DataError


class DataModule(LightningDataModule):
    """Loaders over ``self.parts``, which ``setup`` fills with data sets for ``train``, ``validation`` and ``test``.

    A data set is anything that a ``DataLoader`` takes, lists included.
    """

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, but a batch holds at least 1 sample")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.parts: dict[str, Any] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, part: str) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return self._make_loader(part, batch_size=self.batch_size, shuffle=part == "train", generator=generator)

    def _make_loader(self, part: str, **options: Any) -> DataLoader[Any]:
        if part not in self.parts:
            raise DataError(f"{type(self).__name__}: no {part} data; call setup() first, or give it a {part} file")
        workers = self.num_workers
        return DataLoader(self.parts[part], num_workers=workers, persistent_workers=workers > 0, **options)
