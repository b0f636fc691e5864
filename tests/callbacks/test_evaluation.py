"""The metrics of all modes, from one pass, equal those of 16 separate validations."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics as tm
import zoo
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_bln import set_mode


def test_everything_a_module_can_log_equals_separate_validations() -> None:
    model, callback = zoo.Rich(), zoo.chooser()
    zoo.fitted(model, callback, max_epochs=2)
    expected = zoo.oracle(model)
    zoo.assert_modes_differ(expected)
    zoo.assert_same_table(expected, callback)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_loaders(workers: int) -> None:
    def data() -> list[DataLoader]:
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        return [zoo.val_data(**options), zoo.val_data(30, 3, **options)]

    model, callback = zoo.Rich(), zoo.chooser("val_loss/dataloader_idx_1", log="all")
    trainer = zoo.fitted(model, callback, data=data())
    expected = zoo.oracle(model, data())
    zoo.assert_same_table(expected, callback)
    assert callback.result is not None
    for name, value in expected[str(callback.result.chosen)].items():
        assert abs(float(trainer.callback_metrics[name]) - value) <= 1e-6
    for mode, values in expected.items():
        shown = trainer.callback_metrics[f"bln/val_loss/dataloader_idx_1/{mode}"]
        assert float(shown) == pytest.approx(values["val_loss/dataloader_idx_1"], abs=1e-6)


def test_stochastic_steps_draw_what_a_separate_validation_draws() -> None:
    class SameSeed(pl.Callback):
        def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
            if args[2] == 0 and not trainer.sanity_checking:
                torch.manual_seed(5)

    model, callback = zoo.Rich(noise=0.5), zoo.chooser()
    zoo.fitted(model, SameSeed(), callback)
    zoo.assert_same_table(zoo.oracle(model, None, SameSeed()), callback)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "sequential"])
def test_combined_loaders(mode: str) -> None:
    class Both(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if mode == "sequential":
                return super().validation_step(batch, batch_idx)
            super().validation_step(batch["a"], batch_idx)
            self.log("other", self(batch["b"][0]).mean(), batch_size=7)

    def data() -> CombinedLoader:
        return CombinedLoader({"a": zoo.val_data(), "b": zoo.val_data(70, 3)}, mode)

    model = Both()
    callback = zoo.chooser("val_loss/dataloader_idx_0" if mode == "sequential" else "val_loss")
    zoo.fitted(model, callback, data=data())
    zoo.assert_same_table(zoo.oracle(model, data()), callback)


def test_data_without_a_length() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(zoo.make_data(41, 2, shift=0.7))

    model, callback = zoo.Rich(), zoo.chooser()
    zoo.fitted(model, callback, data=DataLoader(Stream(), batch_size=20))
    zoo.assert_same_table(zoo.oracle(model), callback)


def test_limited_validation() -> None:
    model, callback = zoo.Rich(), zoo.chooser()
    zoo.fitted(model, callback, limit_val_batches=2)
    zoo.assert_same_table(zoo.oracle(model, limit_val_batches=2), callback)


@pytest.mark.parametrize("edits", [False, True])
def test_a_step_that_pops_or_edits_its_batch(edits: bool) -> None:
    class Careless(zoo.Simple):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
            y = batch.pop("y")
            if edits:
                batch["x"].mul_(1.5)
            self.log("val_loss", F.cross_entropy(self(batch["x"]), y))

    def collate(samples: list) -> dict:
        return dict(zip(("x", "y"), default_collate(samples), strict=True))

    def data() -> DataLoader:
        return zoo.val_data(collate_fn=collate)

    model, callback = Careless(), zoo.chooser()
    zoo.trainer(callback).fit(model, zoo.train_data(collate_fn=collate), data())
    zoo.assert_same_table(zoo.oracle(model, data()), callback)


def test_state_reset_by_the_modules_own_hooks() -> None:
    class Resets(zoo.Simple):
        def on_validation_epoch_start(self) -> None:
            self.losses: list = []
            self.counts = {"steps": 0}

        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.counts["steps"] += 1

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.losses.append(F.cross_entropy(self(batch[0]), batch[1]))

        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", torch.stack(self.losses).mean())
            self.log("steps", float(self.counts["steps"]))

    model, callback = Resets(), zoo.chooser()
    trainer = zoo.fitted(model, callback, max_epochs=2)
    expected = zoo.oracle(model)
    zoo.assert_same_table(expected, callback)
    assert callback.result is not None
    chosen = expected[str(callback.result.chosen)]
    assert abs(float(trainer.callback_metrics["val_loss"]) - chosen["val_loss"]) <= 1e-6


def test_metrics_kept_for_each_loader() -> None:
    class PerLoader(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            make = lambda: tm.Accuracy(task="multiclass", num_classes=zoo.CLASSES)  # noqa: E731
            self.accuracies = torch.nn.ModuleList([make(), make()])
            self.shared = make()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            super().validation_step(batch, batch_idx)
            out = self(batch[0])
            for name, metric in (("own", self.accuracies[dataloader_idx]), ("shared", self.shared)):
                metric(out, batch[1])
                self.log(name, metric)

    def data() -> list[DataLoader]:
        return [zoo.val_data(), zoo.val_data(30, 3)]

    model, callback = PerLoader(), zoo.chooser("own/dataloader_idx_0", "max")
    zoo.fitted(model, callback, data=data(), max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model, data()), callback)


def losing_incumbent(model: zoo.Simple, data: Any = None) -> None:
    """Set the mode that will certainly not win, so that the choice has to change it."""
    scores = zoo.oracle(model, data)
    set_mode(model, max(scores, key=lambda mode: scores[mode]["val_loss"]))


def test_all_that_looks_at_the_trainer_sees_the_winner(tmp_path: Path) -> None:
    plateau: list[float] = []

    class Plateau(zoo.Rich):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            plateau.append(float(metric))

    class Sees(pl.Callback):
        loss: float

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.loss = float(trainer.callback_metrics["val_loss"])

        def on_validation_batch_end(self, *args: Any) -> None:
            self.log("foreign_batch", float(args[4]))

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.log("foreign_epoch", 3.0)

    # the losing incumbent is found on a twin with the same seed
    torch.manual_seed(1)
    twin = Plateau()
    zoo.fitted(twin, zoo.chooser(), num_sanity_val_steps=0)
    losing_incumbent(twin)
    torch.manual_seed(1)
    model, callback, sees = Plateau(), zoo.chooser(), Sees()
    set_mode(model, twin.net[1].mode)
    plateau.clear()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", filename="{val_loss:.6f}")
    stopping = EarlyStopping("val_loss")
    logger = CSVLogger(tmp_path)
    options: dict[str, Any] = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1}
    trainer = zoo.fitted(model, sees, callback, checkpoint, stopping, **options, num_sanity_val_steps=0)

    result = callback.result
    assert result is not None
    assert result.chosen != result.incumbent
    best = zoo.oracle(model)[str(result.chosen)]["val_loss"]
    assert abs(sees.loss - best) <= 1e-6
    assert plateau == [pytest.approx(best, abs=1e-6)]
    assert float(checkpoint.best_model_score) == pytest.approx(best, abs=1e-6)
    assert f"{best:.6f}" in checkpoint.best_model_path
    assert float(stopping.best_score) == pytest.approx(best, abs=1e-6)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_float")]
    assert [float(row["val_float"]) for row in rows] == [pytest.approx(best, abs=1e-6)]
    assert float(trainer.callback_metrics["foreign_epoch"]) == 3.0
    assert float(trainer.callback_metrics["foreign_batch"]) == pytest.approx(22 / 41, abs=1e-6)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    loaded = Plateau()
    loaded.load_state_dict(saved["state_dict"])
    assert loaded.net[1].mode == result.chosen


def test_validate_returns_the_winner() -> None:
    model = zoo.Rich()
    zoo.fitted(model, zoo.chooser())
    losing_incumbent(model)
    callback = zoo.chooser()
    trainer = zoo.trainer(callback)
    returned = trainer.validate(model, zoo.val_data(), verbose=False)[0]
    expected = zoo.oracle(model)
    zoo.assert_same_table(expected, callback)
    assert callback.result is not None
    assert callback.result.chosen == min(expected, key=lambda mode: expected[mode]["val_loss"])
    assert returned["val_f1"] == pytest.approx(expected[str(callback.result.chosen)]["val_f1"], abs=1e-6)
    assert returned["val_loss_epoch"] == pytest.approx(expected[str(callback.result.chosen)]["val_loss"], abs=1e-6)


def test_loggers_hear_only_the_incumbent_and_the_winner(tmp_path: Path) -> None:
    class Direct(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            super().validation_step(batch, batch_idx)
            self.logger.log_metrics({"direct": 1.0}, step=batch_idx)
            assert isinstance(self.logger, Logger)
            if type(self.logger) is not CSVLogger:
                silent: Any = self.logger
                silent.experiment.add_scalar("direct", 1.0, batch_idx)
                silent.experiment.config.update({"direct": 1.0})
                silent.experiment["direct"][0] = silent.run["direct"].append(1.0)
                silent[0].experiment.add_image("direct")

    logger, heard = CSVLogger(tmp_path), []
    log_metrics = logger.log_metrics
    logger.log_metrics = lambda metrics, step=None: (heard.append("direct" in metrics), log_metrics(metrics, step))  # type: ignore
    zoo.fitted(Direct(), zoo.chooser(), logger=logger, num_sanity_val_steps=0)
    assert sum(heard) == 3


def test_reading_callback_metrics_within_a_step_gives_the_modes_own() -> None:
    class Reads(zoo.Simple):
        def on_validation_epoch_end(self) -> None:
            self.log("read", self.trainer.callback_metrics["val_loss"] * 2)

    model, callback = Reads(), zoo.chooser("read")
    zoo.fitted(model, callback)
    assert callback.result is not None
    for values in callback.result.scores.values():
        assert values["read"] == pytest.approx(2 * values["val_loss"], abs=1e-6)


def test_all_modes_and_lightnings_own_step_share_one_forward() -> None:
    calls: list[int] = []

    class Counted(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(len(input))
            return super().forward(input)

    class PerBatch(pl.Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_validation_batch_start(self, *_: Any) -> None:
            calls.clear()

        def on_validation_batch_end(self, *_: Any) -> None:
            self.counts.append(len(calls))

    model, counter, callback = zoo.Simple(), PerBatch(), zoo.chooser()
    model.net[0] = Counted(model.net[0].in_features, model.net[0].out_features)
    zoo.fitted(model, counter, callback, num_sanity_val_steps=0)
    assert counter.counts[1:] == [1, 1]  # before the first one the population is computed
    assert all("forward" not in module.__dict__ for module in model.modules())
    zoo.assert_same_table(zoo.oracle(model), callback)
