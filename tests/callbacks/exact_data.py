"""Batches of every form, loaders, and ways to log."""

from __future__ import annotations

import copy
import threading
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchmetrics as tm
import zoo
from exact_modules import Exact, Functional
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_bln import BLNGRU


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor
    name: str = "a"

    def to(self, device: Any) -> Record:
        return self


class Holder:
    """An object of somebody's own, with a tensor in it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.more = x, y, {"x": x}


class Locked(Holder):
    """It cannot be copied."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y)
        self.lock = threading.Lock()


class Encoding(UserDict):
    """As tokenizers give."""

    def to(self, device: Any) -> Encoding:
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def taken(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (dict, UserDict)):
        return batch["x"], batch["y"]
    if hasattr(batch, "x"):
        return batch.x, batch.y
    x, y = batch
    return (x[0]["x"] if isinstance(x, list) else x), y


class Any_(Exact):
    """Takes a batch of any form, and edits it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = taken(batch)
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = taken(batch)
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y))
        self.log("doubled", self(x.mul_(2)).square().mean(), batch_size=len(y))


class Reads(Any_):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = taken(batch)
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y))


class Edits(Any_):
    """Takes things out of its batch, and puts others in."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = batch.pop("x"), batch.pop("y")
        batch["hidden"] = self.hidden(x)
        batch["hidden"] += 1
        self.log("val_loss", F.cross_entropy(self.head(batch["hidden"]), y), batch_size=len(y))
        self.log("keys", float(len(batch)), batch_size=len(y))


class EditsLater(Edits):
    """Uses in the batch's end what its step put into the batch."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx)
        return {"hidden": batch["hidden"]}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("later", batch["hidden"].max() + outputs["hidden"].min(), batch_size=len(batch["hidden"]))


def loader(wrap: Callable[[Tensor, Tensor], Any], **options: Any) -> Callable[[], DataLoader]:
    def collate(items: list[Any]) -> Any:
        return wrap(*default_collate(items))

    return lambda: DataLoader(zoo.make_data(41, 2, shift=0.7), **{"batch_size": 20, "collate_fn": collate, **options})


def as_dict(x: Tensor, y: Tensor) -> Any:
    return {"x": x, "y": y, "texts": ["a"] * len(y)}


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dicts": as_dict,
    "lists": lambda x, y: [x, y],
    "nested": lambda x, y: ([{"x": x}, {"other": (y, "text")}], y),
    "named tuples": Pair,
    "dataclasses": Record,
    "objects": Holder,
    "encodings": lambda x, y: Encoding(x=x, y=y),
    "objects with slots": Slots,
    "one tensor twice": lambda x, y: {"x": x, "again": x, "y": y},
}
FORMS = {name: (Any_, loader(wrap)) for name, wrap in WRAPS.items()}
FORMS |= {
    "objects that cannot be copied": (Reads, loader(Locked)),
    "an edited dict": (Edits, loader(as_dict)),
    "a dict edited for later": (EditsLater, loader(as_dict)),
    "batches of one": (Any_, loader(as_dict, batch_size=1, sampler=range(5))),
    "one batch": (Any_, loader(as_dict, batch_size=64)),
}


class Two(Exact):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x, y = batch
        out = self(x)
        self.log("val_loss", F.cross_entropy(out, y), batch_size=len(y))
        if dataloader_idx == 1:
            self.log("second", out.max() if out.mean() > 0 else out.min(), add_dataloader_idx=False, batch_size=1)


class Both(Exact):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        (x, y), (other, _) = batch["a"], batch["b"]
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(y))
        self.log("other", torch.cdist(self(x), self(other)).mean(), batch_size=len(y))


def two() -> list[DataLoader]:
    return [zoo.val_data(), zoo.val_data(30, 3)]


def both() -> CombinedLoader:
    return CombinedLoader({"a": zoo.val_data(), "b": zoo.val_data(70, 3)}, "max_size_cycle")


class Padded(Exact):
    """Sequences of different lengths, padded, their lengths given."""

    def build(self) -> None:
        self.rnn = BLNGRU(zoo.FEATURES, 8, batch_first=True)

    def run(self, batch: Any) -> Tensor:
        x, lengths, y = batch
        out, _ = self.rnn(x)
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        pooled = (out * mask[..., None]).sum(1) / lengths[:, None]
        return F.cross_entropy(self.head(pooled), y) + F.cross_entropy(self.head(self.second(out[:, -1])), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.run(batch) + 0 * sum(one.sum() for one in self.parameters())

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.run(batch), batch_size=len(batch[2]))


def sequences() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (22,), generator=generator).tolist()
    items = [(torch.randn(length, zoo.FEATURES, generator=generator), length, length % 3) for length in lengths]

    def collate(chosen: list[Any]) -> Any:
        x = nn.utils.rnn.pad_sequence([one[0] for one in chosen], batch_first=True)
        return x, torch.tensor([one[1] for one in chosen]), torch.tensor([one[2] for one in chosen])

    return DataLoader(items, 8, collate_fn=collate)  # type: ignore[arg-type]


class Logs(Exact):
    """Logs in every way at once."""

    def build(self) -> None:
        task: dict[str, Any] = {"task": "multiclass", "num_classes": 3}
        self.accuracy = tm.Accuracy(**task)
        self.group = tm.MetricCollection({"f1": tm.F1Score(**task), "recall": tm.Recall(**task)}, prefix="group/")
        self.scores = nn.ModuleDict({"auroc": tm.AUROC(**task), "mean": tm.MeanMetric()})
        self.per_class = nn.ModuleList([tm.MeanMetric() for _ in range(3)])
        self.correlation = tm.PearsonCorrCoef()
        self.kept = tm.CatMetric()

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        out = self(x)
        loss = F.cross_entropy(out, y)
        self.accuracy(out, y)
        self.group.update(out, y)
        self.scores["auroc"].update(out, y)
        self.scores["mean"](loss, weight=len(y))
        for label, metric in enumerate(self.per_class):
            if (y == label).any():
                metric.update(out[y == label, label])
        self.correlation.update(out[:, 0], out[:, 1])
        self.kept.update(out[:, 0])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict(self.group, prog_bar=True)
        self.log_dict(dict(self.scores.items()))
        for label, metric in enumerate(self.per_class):
            self.log(f"class{label}", metric)
        self.log("maximum", loss, reduce_fx="max", prog_bar=True)
        self.log("least", loss, reduce_fx=torch.min)
        self.log("total", loss, reduce_fx="sum")
        self.log("whole", out.argmax(1).sum().float(), on_step=True)
        if i == 1:
            self.log("sometimes", loss)
        return {"val_loss": loss, "number": 3, "tensor": torch.tensor([2.5])}


class LogsIfSo(Exact):
    """Logs some values only where they are large."""

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        out = self(x)
        if out.mean() > -0.05:
            self.log("large", out.mean(), batch_size=len(y))
        return F.cross_entropy(out, y)


class LogsAtTheEnd(Exact):
    """Logs its monitor when the epoch ends, from what its steps returned."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.outs, self.labels = [], []

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        self.outs.append(self(x))
        self.labels.append(y)
        return {"other": self.outs[-1].mean()}

    def on_validation_epoch_end(self) -> None:
        out, y = torch.cat(self.outs), torch.cat(self.labels)
        self.log("end_loss", F.cross_entropy(out / out.abs().max(), y))
        self.log("end_hits", (out.argmax(1) == y).float().mean().item())
        self.outs.clear()
        self.labels.clear()


class Returns(Exact):
    """Uses the step's output in the batch's end."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"out": self(batch[0]), "y": batch[1], "deep": [{"x": batch[0]}]}

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = F.cross_entropy(outputs["out"], outputs["y"])
        self.log("val_loss", loss, batch_size=len(batch[0]))
        self.log("float", loss.item(), batch_size=len(batch[0]))


class ReturnsLoss(Exact):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss


class ReadsMetrics(Exact):
    """Looks at what it logged before."""

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        loss = F.cross_entropy(self(x), y)
        before = self.trainer.callback_metrics.get("step_loss", torch.zeros(()))
        self.log("step_loss", loss, on_step=True, on_epoch=False)
        return {"val_loss": loss, "progress": loss + 0 * before}


class Copies(Exact):
    """Keeps the best module so far."""

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        return F.cross_entropy(copy.deepcopy(self.second)(self.first(x)).mean(0)[None, :3], y[:1]) + self(x).mean()


LOGGING: dict[str, Any] = {
    "in every way": Logs,
    "in some modes only": LogsIfSo,
    "in the batch's end": Returns,
    "returned": ReturnsLoss,
    "read again": ReadsMetrics,
    "a copy of layers": Copies,
    "NaN in some modes": lambda: Functional(lambda net, x, y, i: net(x).mean().log() if i == 0 else net(x).mean()),
    "infinity": lambda: Functional(lambda net, x, y, i: 1 / (net(x).mean() > 0).float() + net(x).mean()),
    "integers": lambda: Functional(
        lambda net, x, y, i: {"val_loss": net(x).mean(), "hits": (net(x).argmax(1) == y).sum()}
    ),
    "booleans": lambda: Functional(lambda net, x, y, i: {"val_loss": net(x).mean(), "is": (net(x) > 0).any().float()}),
}
LOADERS: dict[str, Any] = {
    "two loaders": (Two, two, None, "val_loss/dataloader_idx_0"),
    "two loaders, by the second": (Two, two, None, "second"),
    "a combined loader": (Both, both, None, "val_loss"),
    "padded sequences": (Padded, sequences, sequences, "val_loss"),
    "workers": (Exact, lambda: zoo.val_data(num_workers=1), None, "val_loss"),
}
