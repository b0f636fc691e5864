"""The paper's experiments under a Trainer and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln.models import PAPER_NORMS, PaperCIFAR10, PaperIMDB
from lightning_bln.models.paper.modules import AUTHORS_THRESHOLD


def small_imdb(norm: str = "bln", **options: Any) -> PaperIMDB:
    return PaperIMDB(norm, vocabulary=30, embedding=6, hidden=8, **options)


def tokens_loader(count: int = 20) -> DataLoader[Any]:
    tokens = torch.randint(0, 30, (count, 5))
    return DataLoader(TensorDataset(tokens, tokens[:, 0] % 2), batch_size=5)


def quiet(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("norm", PAPER_NORMS)
def test_imdb_module_trains_and_is_restored(tmp_path: Path, norm: str) -> None:
    model = small_imdb(norm, learning_rate=0.01)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = quiet(tmp_path, max_epochs=4, callbacks=[best])
    trainer.fit(model, tokens_loader(), tokens_loader())
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_acc", "val_acc_authors"} <= set(metrics)
    assert all(torch.isfinite(value) for value in metrics.values())
    restored = PaperIMDB.load_from_checkpoint(best.best_model_path, map_location="cpu").eval()
    assert restored.hparams["norm"] == norm
    tested = quiet(tmp_path).test(restored, tokens_loader(), verbose=False)[0]
    assert set(tested) == {"test_loss", "test_acc", "test_acc_authors"}


def test_checkpoint_holds_rows_that_were_not_seen_last(tmp_path: Path) -> None:
    def trained(sparse: bool) -> tuple[PaperIMDB, Path]:
        torch.manual_seed(1)
        model = small_imdb(dropout=0.0, recurrent_dropout=0.0, sparse=sparse)
        trainer = quiet(tmp_path / str(sparse), max_epochs=2, enable_checkpointing=False)
        torch.manual_seed(2)
        trainer.fit(model, tokens_loader())
        trainer.save_checkpoint(tmp_path / f"{sparse}.ckpt")
        return model, tmp_path / f"{sparse}.ckpt"

    weights = []
    for sparse in (True, False):
        _, path = trained(sparse)
        weights.append(PaperIMDB.load_from_checkpoint(path).network.embedding.weight)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)


def test_authors_accuracy_counts_logits_above_one_half() -> None:
    model = small_imdb()
    logits, labels = torch.tensor([0.4, 0.6, -1.0]), torch.tensor([1, 1, 0])
    metrics = model.metrics["val_metrics"]
    metrics.update(model.predictions(logits), labels)
    values = metrics.compute()
    assert float(values["val_acc"]) == 1.0
    assert float(values["val_acc_authors"]) == pytest.approx(2 / 3)
    assert pytest.approx(0.6224593) == AUTHORS_THRESHOLD


@pytest.mark.parametrize("norm", ["bln", "batch"])
def test_cifar_module_trains(tmp_path: Path, norm: str) -> None:
    data = TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 10)
    trainer = quiet(tmp_path, max_epochs=3, enable_checkpointing=False)
    trainer.fit(PaperCIFAR10(norm, learning_rate=0.01), DataLoader(data, 5), DataLoader(data, 5))
    assert float(trainer.callback_metrics["train_loss"]) < 2.3
    assert 0.0 <= float(trainer.callback_metrics["val_acc"]) <= 1.0


def test_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    from lightning_bln.data import MNISTData
    from lightning_bln.models import SequenceClassifier

    cli = LightningCLI(
        SequenceClassifier,
        MNISTData,
        run=False,
        save_config_callback=None,
        args=["--model.input_size=28", "--model.classes=10", "--model.norm=layer", "--data.sequence=rows"],
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    )
    assert cli.model.hparams["norm"] == "layer"
    assert cli.datamodule.sequence == "rows"
    paper = LightningCLI(
        PaperIMDB,
        run=False,
        save_config_callback=None,
        args=["--model.norm=batch", "--model.vocabulary=50", "--model.embedding=4"],
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu"},
    )
    assert paper.model.hparams["vocabulary"] == 50
