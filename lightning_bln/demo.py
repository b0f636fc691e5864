"""The main use on real data: a BLN-LSTM reads handwritten digits row by row, and the callback chooses its mode."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.modes import StatisticsMode, using_mode
from lightning_bln.recurrent import BLNLSTM

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
"""Arguments of a Trainer that only evaluates."""


class DigitRows(L.LightningDataModule):
    """The 1,797 scanned digits that scikit-learn bundles (Alpaydin and Kaynak 1998): 8 rows of 8 pixels each.

    Args:
        batch_size: Images per batch.
        seed: Seed of the split into 1,197 training, 300 validation and 300 test images, stratified by digit.
    """

    def __init__(self, batch_size: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def setup(self, stage: str | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        rows = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16.0
        labels = torch.tensor(targets, dtype=torch.long)
        rest, test = train_test_split(range(len(labels)), test_size=300, random_state=self.seed, stratify=labels)
        train, val = train_test_split(rest, test_size=300, random_state=self.seed, stratify=labels[rest])
        self.splits = {
            name: TensorDataset(rows[i], labels[i])
            for name, i in zip(("train", "val", "test"), (train, val, test), strict=True)
        }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["val"], batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.splits["test"], batch_size=self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def sorted_by_class(self, split: str) -> DataLoader:
        """Loader of a split's images ordered by digit."""
        rows, labels = self.splits[split].tensors
        order = labels.argsort(stable=True)
        return DataLoader(TensorDataset(rows[order], labels[order]), self.batch_size)


class RowClassifier(L.LightningModule):
    """A normalised LSTM over rows of pixels and a linear layer on its last state.

    Args:
        hidden_size: Units of the LSTM.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        lr: Adam's learning rate.
    """

    def __init__(self, hidden_size: int = 64, norm: str | None = "bln", lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lstm = BLNLSTM(8, hidden_size, batch_first=True, norm=norm)
        self.head = nn.Linear(hidden_size, 10)
        self.val_acc, self.test_acc = MulticlassAccuracy(10, average="micro"), MulticlassAccuracy(10, average="micro")
        self.lr = lr

    def forward(self, rows: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(rows)
        return self.head(h_n[-1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_loss", F.cross_entropy(logits, batch[1]), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_acc(self(batch[0]), batch[1])
        self.log("test_acc", self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def demo(output: Path = Path("runs/demo"), epochs: int = 8, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train, choose the statistics mode on validation data, and compare modes on test data in two orders.

    Args:
        output: Folder for the heat map, the scores and the checkpoint.
        epochs: Epochs of training.
        seed: Seed of split, weights and shuffling.

    Returns:
        For each compared mode, the test accuracy on data as loaded and on data sorted by class.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # lightning 2.6 on torch 2.13
    torch.set_num_threads(1)  # so small a network is not faster with more, and slower on a busy machine
    torch.manual_seed(seed)
    data, model = DigitRows(seed=seed), RowClassifier()
    statistics = BLNStatsCallback(monitor="val_loss", save_dir=output)
    checkpoint = ModelCheckpoint(output, filename="digits", enable_version_counter=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[statistics, checkpoint],
        accelerator="cpu",
        enable_model_summary=False,
        log_every_n_steps=10,
        logger=CSVLogger(output, name=None, version=""),
    )
    trainer.fit(model, datamodule=data)

    saved = RowClassifier.load_from_checkpoint(checkpoint.best_model_path)  # with its mode
    chosen = saved.lstm.mode
    assert chosen is not None
    tester = L.Trainer(**QUIET)
    loaders = {"as loaded": data.test_dataloader(), "sorted by class": data.sorted_by_class("test")}
    accuracies: dict[str, dict[str, float]] = {}
    for mode in dict.fromkeys([chosen, StatisticsMode("cccc"), StatisticsMode("pppp")]):
        with using_mode(saved, mode):
            accuracies[mode] = {
                name: tester.test(saved, loader, verbose=False)[0]["test_acc"] for name, loader in loaders.items()
            }
    show(accuracies, chosen)
    console = Console(soft_wrap=True)
    console.print(f"guard       validation data sorted by class: {guards_note(saved, data.sorted_by_class('val'))}")
    console.print(f"heat map    {output / 'bln_sweep.png'}")
    console.print(f"checkpoint  {output / Path(checkpoint.best_model_path).name}")
    return accuracies


def guards_note(model: RowClassifier, loader: DataLoader) -> str | None:
    """The guard's note on mode ``cccc`` for a loader's batches, which it compares with regrouped ones."""
    guarded = BLNStatsCallback(candidates=["cccc"], guard="warn", log=False)
    trainer = L.Trainer(**QUIET, callbacks=[guarded])
    with using_mode(model, "cccc"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the note is returned instead
        trainer.validate(model, loader, verbose=False)
    assert guarded.result is not None
    return guarded.result.note


def show(accuracies: dict[str, dict[str, float]], chosen: str) -> None:
    """Print the test accuracies, the chosen mode first."""
    table = Table(title="Test accuracy by statistics mode")
    table.add_column("mode")
    for name in accuracies[chosen]:
        table.add_column(name, justify="right")
    table.add_column("")
    for mode, values in accuracies.items():
        table.add_row(mode, *(f"{value:.4f}" for value in values.values()), "chosen" if mode == chosen else "")
    Console().print(table)
