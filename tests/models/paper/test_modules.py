"""The paper's networks: their size, their parts, and a few steps under a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import Normalization, set_mode
from lightning_bln.models import PAPER_NORMS, PaperCIFAR10, PaperCNN, PaperIMDB, PaperLSTM, paper_norm
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


def test_parameters_number_as_in_the_paper() -> None:
    assert sum(parameter.numel() for parameter in PaperLSTM().parameters()) == 10_620_161
    assert sum(parameter.numel() for parameter in PaperCNN().parameters()) == 83_578


@pytest.mark.parametrize("norm", PAPER_NORMS)
def test_norms_start_as_compared(norm: str) -> None:
    x = torch.randn(7, 9, 16) * 3 + 1
    y = paper_norm(norm, 16)(x)
    over = {"layer": (2,), "layer-scaled": (2,), "batch": (0, 1)}
    if norm == "bln":
        layer, batch = ((x - x.mean(d, True)) / (x.var(d, False, True) + 1e-3).sqrt() for d in (2, 0))
        expected = ((1 / 7 - 1e-4) * layer + (1 - 1 / 7 - 1e-4) * batch) / 4
    else:
        mean, var = x.mean(over[norm], True), x.var(over[norm], False, True)
        expected = (x - mean) / (var + 1e-3).sqrt() / (4 if norm == "layer-scaled" else 1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_at_batch_size_one_bln_is_the_control() -> None:
    x = torch.randn(1, 9, 16)
    torch.testing.assert_close(paper_norm("bln", 16)(x), paper_norm("layer-scaled", 16)(x), atol=1e-4, rtol=0)


def test_batch_norm_runs_as_in_keras() -> None:
    layer = paper_norm("batch", 3)
    mean, var = torch.zeros(3), torch.ones(3)
    for _ in range(5):
        x = torch.randn(4, 6, 3) * 2 + 5
        layer(x)
        mean = 0.99 * mean + 0.01 * x.mean((0, 1))
        var = 0.99 * var + 0.01 * x.var((0, 1))
    layer.eval().mode = "ppcc"
    torch.testing.assert_close(layer(x), (x - mean) / (var + 1e-3).sqrt())


def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm='group'; use one of bln, batch, layer, layer-scaled"):
        paper_norm("group", 3)


@pytest.mark.parametrize("network", [lambda: PaperLSTM(vocabulary=30, embedding=6, hidden=8), PaperCNN])
def test_statistics_touch_nothing_before_the_first_norm(network: Callable[[], torch.nn.Module]) -> None:
    model: Any = network()
    names = [name for name, module in model.named_children() if isinstance(module, Normalization)]
    assert names == [f"norm{number + 1}" for number in range(len(names))]
    x = torch.randint(0, 30, (4, 5)) if isinstance(model, PaperLSTM) else torch.randn(4, 3, 32, 32)
    model(x)
    model.eval()
    set_mode(model, "cccc")
    assert torch.equal(model(x), model.head(model.features(x)))


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
