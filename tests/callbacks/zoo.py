"""Small LightningModules that log in every way there is, their data, and the oracle: 16 separate validations."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics as tm
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import ALL_MODES, BatchLayerNorm, set_mode
from lightning_bln.callbacks import BLNStatsCallback

FEATURES, CLASSES = 6, 3
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}


def make_data(samples: int, seed: int, shift: float = 0.0) -> TensorDataset:
    """Three classes by a fixed linear rule with noise; ``shift`` moves the inputs, so that modes differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, FEATURES, generator=generator) * 2 + shift
    rule = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(0))
    y = (x @ rule + torch.randn(samples, CLASSES, generator=generator)).argmax(-1)
    return TensorDataset(x, y)


def train_data(**options: Any) -> DataLoader:
    return DataLoader(make_data(64, 1), **{"batch_size": 16, "shuffle": True, **options})


def val_data(samples: int = 41, seed: int = 2, **options: Any) -> DataLoader:
    """The last batch holds one sample."""
    return DataLoader(make_data(samples, seed, shift=0.7), **{"batch_size": 20, **options})


class Simple(pl.LightningModule):
    """A perceptron with two BLN layers that logs its validation loss."""

    def __init__(self, hidden: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, hidden),
            BatchLayerNorm(hidden, scale=False),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            BatchLayerNorm(hidden, scale=False),
            nn.ReLU(),
            nn.Linear(hidden, CLASSES),
        )
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class ByHand(Simple):
    """Optimises by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Meter:
    """A running average as people write them."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


class Counting(nn.Module):
    """A child with state of its own, plain and buffered."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number
        self.seen: list[Any] = []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.number(x.mean()))
        self.total += x.detach().mean()
        return x


class Rich(Simple):
    """Every way to log and to accumulate at once; without ``numbers`` all that differs between modes stays a tensor."""

    def __init__(self, noise: float = 0.0, numbers: bool = True) -> None:
        super().__init__()
        self.noise = noise
        self.number: Any = float if numbers else Tensor.detach
        task: dict[str, Any] = {"task": "multiclass", "num_classes": CLASSES}
        self.val_acc = tm.Accuracy(**task)
        self.val_f1 = tm.F1Score(**task, average="macro")
        self.val_mean = tm.MeanMetric()
        self.grouped = tm.MetricCollection(
            {"precision": tm.Precision(**task, average="macro"), "recall": tm.Recall(**task, average="macro")},
            prefix="grouped_",
        )
        self.extremes = tm.wrappers.MinMaxMetric(tm.MeanMetric())
        self.running = tm.wrappers.Running(tm.MeanMetric(), window=2)
        self.hidden_metrics = {"mean": tm.MeanMetric()}
        self.child = Counting(self.number)
        self.meter = Meter()
        self.outputs: list[Tensor] = []
        self.sums: dict[str, Any] = {"correct": 0, "nested": {"loss": torch.zeros(())}}
        self.register_buffer("total", torch.zeros(()))
        self.plain_total = torch.zeros(())

    def on_validation_epoch_start(self) -> None:
        self.log("started", 1.0)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = batch
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        out = self.child(self(x))
        loss = F.cross_entropy(out, y)
        self.log("val_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("val_float", self.number(loss))
        self.log("val_max", loss, reduce_fx="max")
        self.log("val_min", loss, reduce_fx=torch.min)
        self.log("val_sum", loss, reduce_fx="sum")
        self.log("val_sized", loss, batch_size=3)
        self.val_acc(out, y)
        self.log("val_acc", self.val_acc, on_step=True, on_epoch=True)
        self.val_f1.update(out, y)
        self.log("val_f1", self.val_f1)
        self.grouped(out, y)
        self.log_dict(self.grouped)
        self.running(loss)
        self.log("running", self.running)
        self.val_mean.update(loss)
        self.extremes.update(loss)
        self.hidden_metrics["mean"].update(loss)
        self.log_dict({"group/double": loss * 2, "group/hit": (out.argmax(-1) == y).float().mean()})
        self.outputs.append(out.argmax(-1))
        self.sums["correct"] += self.number((out.argmax(-1) == y).sum())
        self.sums["nested"]["loss"] += loss
        self.total += loss
        self.plain_total += loss
        self.meter.add(self.number(loss))
        self.last_loss = loss
        return {"loss": loss, "out": out}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("from_batch_end", outputs["loss"])

    def on_validation_epoch_end(self) -> None:
        self.log("end_predictions", torch.cat(self.outputs).float().mean())
        self.log("end_correct", 1.0 * self.sums["correct"])
        self.log("end_nested", self.sums["nested"]["loss"])
        self.log("end_total", self.total.clone())
        self.log("end_plain", self.plain_total.clone())
        self.log("end_meter", self.meter.total / self.meter.count)
        self.log("end_child", self.child.total + sum(self.child.seen))
        self.log("end_last", self.last_loss)
        self.log("end_mean", self.val_mean.compute())
        self.log("end_hidden", self.hidden_metrics["mean"].compute())
        self.log("end_extreme", self.extremes.compute()["raw"])
        self.val_mean.reset()
        self.extremes.reset()
        self.hidden_metrics["mean"].reset()
        self.outputs.clear()
        self.child.seen = []
        self.child.total.zero_()
        self.meter = Meter()
        self.sums = {"correct": 0, "nested": {"loss": torch.zeros(())}}
        self.total.zero_()
        self.plain_total = torch.zeros(())


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    return pl.Trainer(**{**SILENT, "max_epochs": 1, "callbacks": list(callbacks), **options})


def chooser(monitor: str = "val_loss", direction: Any = None, **options: Any) -> BLNStatsCallback:
    """The callback without its guard, which has tests of its own."""
    return BLNStatsCallback(monitor, direction, **{"guard": "off", "verbose": False, "recompute_batches": 2, **options})


def fitted(model: pl.LightningModule, *callbacks: Any, data: Any = None, **options: Any) -> pl.Trainer:
    """A Trainer that has fitted ``model``."""
    made = trainer(*callbacks, **options)
    made.fit(model, train_data(), val_data() if data is None else data)
    return made


def oracle(model: pl.LightningModule, data: Any = None, *callbacks: Any, **options: Any) -> dict[str, dict[str, float]]:
    """What 16 separate validations of a copy of ``model`` log."""
    model = copy.deepcopy(model)
    found = {}
    for mode in ALL_MODES:
        set_mode(model, mode)
        run = trainer(*callbacks, **options)
        run.validate(model, val_data() if data is None else data, verbose=False)
        found[mode] = {name: float(value) for name, value in run.callback_metrics.items()}
    return found


def assert_same_table(expected: dict[str, dict[str, float]], callback: BLNStatsCallback, atol: float = 1e-6) -> None:
    """The callback's table has the same names and the same values.

    Names that begin with ``end_`` are logged by a hook for the end of the epoch, which runs for each mode only where
    the monitor is among them.
    """
    assert callback.result is not None
    if not callback.monitor.startswith("end_"):
        expected = {
            mode: {n: v for n, v in values.items() if not n.startswith("end_")} for mode, values in expected.items()
        }
    assert set(callback.result.scores) == set(expected)
    for mode, values in expected.items():
        found = callback.result.scores[mode]
        assert set(found) == set(values), f"{mode}: {set(found) ^ set(values)}"
        for name, value in values.items():
            assert abs(found[name] - value) <= atol * max(1.0, abs(value)), (
                f"{name} of {mode}: {found[name]} is not {value}"
            )


def assert_modes_differ(expected: dict[str, dict[str, float]], name: str = "val_loss") -> None:
    """A table in which all modes agree would prove nothing."""
    assert len({round(values[name], 6) for values in expected.values()}) >= 8


IS_OLDEST = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 4)
"""Whether these are the oldest versions declared, beside which lightning is 2.3."""
