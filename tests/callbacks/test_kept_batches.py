"""The samples that a population is computed over are read once a fit, unless the data may have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bln.callbacks import kept_batches


class Counted(Dataset[Any]):
    """Counts how often a sample is read."""

    def __init__(self) -> None:
        self.data, self.epoch = zoo.make_data(64, 1), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        READ.append(index)
        x, y = self.data[index]
        return x * (1 + self.epoch), y


READ: list[int] = []


def populations(model: Any) -> list[Tensor]:
    return [layer.population.batch_mean for layer in model.modules() if isinstance(layer, zoo.BatchLayerNorm)]


def fitted(data: Dataset[Any], *callbacks: Any, **options: Any) -> tuple[int, list[Tensor]]:
    """How many samples a fit of four epochs read, and the populations at its end."""
    torch.manual_seed(0)
    READ.clear()
    model, callback = zoo.Simple(), zoo.chooser(recompute_batches=None, **options)
    trainer = zoo.trainer(callback, *callbacks, max_epochs=4, num_sanity_val_steps=0)
    trainer.fit(model, DataLoader(data, 16), zoo.val_data())
    return len(READ), populations(model)


def test_samples_are_read_once_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    count, found = fitted(Counted())
    assert count == 64 * (4 + 1)
    monkeypatch.setattr(kept_batches, "BYTES", 0)
    count, expected = fitted(Counted())
    assert count == 64 * (4 + 4)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_less_than_the_bound_is_kept_and_the_rest_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = fitted(Counted())
    monkeypatch.setattr(kept_batches, "BYTES", 40 * (zoo.FEATURES * 4 + 8))
    count, found = fitted(Counted())
    assert count == 64 * (4 + 4)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_data_that_changes_is_read_anew() -> None:
    class Grows(zoo.pl.Callback):
        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            trainer.train_dataloader.dataset.epoch = trainer.current_epoch

    assert fitted(Counted(), Grows())[0] == 64 * (4 + 4)
