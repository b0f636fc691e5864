"""Cost of the 16-mode sweep in validation passes, and of the callback in whole fits: ``make bench-sweep``.

Every second validation of a fit sweeps and the others do not, so that both meet the same machine. The guard is off; if
the best mode uses the current batch, it would add up to two passes over 1,024 samples. Training uses three times as
many samples as validation, up to 40 batches; ``outside`` is the callback's share of an epoch outside its passes.

Whole fits take turns with and without the callback, which has its defaults: three epochs, three times as many training
samples as validation samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from benchmarks.resnet import residual_network
from lightning_bln import BLNLSTM, BatchLayerNorm
from lightning_bln.callbacks import BLNStatsCallback, freezing

LOAD_SECONDS = 0.002
RESULTS = Path(__file__).parent / "results" / "sweep.json"


class Stopwatch:
    """Seconds of wall time, or for a busy machine, of this process's CPU time plus its waiting for data."""

    def __init__(self) -> None:
        self.now = time.perf_counter
        self.waited = 0.0

    def count_cpu(self) -> None:
        self.now = time.process_time

    def __call__(self) -> float:
        return self.now() + (self.waited if self.now is time.process_time else 0.0)


CLOCK = Stopwatch()


class Classifier(pl.LightningModule):
    """A network with a common validation step: a loss and an accuracy."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        self.log("val_loss", F.cross_entropy(out, batch[1]))
        self.accuracy(out, batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Last(nn.Module):
    """A recurrent layer's output at the last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


class All(nn.Module):
    """A recurrent layer's output at every step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Slow(Dataset):
    """A data set whose samples take two milliseconds each."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        time.sleep(LOAD_SECONDS)
        CLOCK.waited += LOAD_SECONDS
        return self.data[index]


def noise(samples: int, *shape: int, classes: int) -> TensorDataset:
    return TensorDataset(torch.randn(samples, *shape), torch.randint(classes, (samples,)))


def demo() -> tuple[Classifier, Dataset, int]:
    """An in-cell BLN-LSTM on 8 x 8 digits, one row per step; 360 samples in batches of 32."""
    network = nn.Sequential(Last(BLNLSTM(8, 64, batch_first=True)), nn.Linear(64, 10))
    return Classifier(network, 10), noise(360, 8, 8, classes=10), 32


def imdb() -> tuple[Classifier, Dataset, int]:
    """The paper's IMDB network: 80 tokens, two LSTMs, BLN between layers; 1,000 samples in batches of 25."""
    network = nn.Sequential(
        nn.Embedding(20000, 512),
        All(nn.LSTM(512, 128, batch_first=True)),
        BatchLayerNorm(128),
        Last(nn.LSTM(128, 64, batch_first=True)),
        BatchLayerNorm(64),
        nn.Linear(64, 32),
        nn.Tanh(),
        BatchLayerNorm(32),
        nn.Linear(32, 2),
    )
    data = TensorDataset(torch.randint(20000, (1000, 80)), torch.randint(2, (1000,)))
    return Classifier(network, 2), data, 25


def cnn() -> tuple[Classifier, Dataset, int]:
    """The paper's CNN for CIFAR-10; 1,000 samples in batches of 25."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        BatchLayerNorm(6, channel_dim=1),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        BatchLayerNorm(16, channel_dim=1),
        nn.Flatten(),
        nn.Linear(576, 120),
        nn.Tanh(),
        BatchLayerNorm(120),
        nn.Linear(120, 84),
        nn.Tanh(),
        BatchLayerNorm(84),
        nn.Linear(84, 10),
    )
    return Classifier(network, 10), noise(1000, 3, 32, 32, classes=10), 25


def loader_bound() -> tuple[Classifier, Dataset, int]:
    """A small perceptron on data that takes 2 ms per sample to load; 320 samples in batches of 32."""
    network = nn.Sequential(nn.Linear(16, 64), BatchLayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    return Classifier(network, 10), Slow(noise(320, 16, classes=10)), 32


CASES: dict[str, tuple[Callable[[], tuple[Classifier, Dataset, int]], float]] = {
    "demo": (demo, 2.5),
    "imdb": (imdb, 3.0),
    "cnn": (cnn, 3.0),
    "loader-bound": (loader_bound, 1.1),
}


def batch_norms() -> tuple[Classifier, Dataset, int]:
    """A ResNet of three blocks with torch's BatchNorm2d; 1,000 samples in batches of 25."""
    return Classifier(residual_network(nn.BatchNorm2d, (16, 16, 32, 64)), 10), noise(1000, 3, 32, 32, classes=10), 25


FITS: dict[str, tuple[Callable[[], tuple[Classifier, Dataset, int]], dict[str, Any], float]] = {
    "cnn": (cnn, {}, 1.8),
    "loader-bound": (loader_bound, {}, 1.3),
    "batch norms": (batch_norms, {}, math.nan),
    "batch norms, compare=False": (batch_norms, {"compare": False}, math.nan),
}
"""Models, options of the callback, and goals, of which there may be none."""


class Timed(BLNStatsCallback):
    """The callback, with the seconds spent in its hooks outside the passes over data.

    A pass lasts until the validation ends, scores and choice included; recomputing the population is a pass too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.outside = self.recomputing = 0.0

    @property
    def state_key(self) -> str:
        return "Timed"

    @contextmanager
    def timed(self) -> Iterator[None]:
        began, before = CLOCK(), self.recomputing
        yield
        self.outside += CLOCK() - began - (self.recomputing - before)

    def on_train_batch_start(self, *args: Any) -> None:
        with self.timed():
            super().on_train_batch_start(*args)

    def on_validation_start(self, *args: Any) -> None:
        with self.timed():
            super().on_validation_start(*args)

    @contextmanager
    def counting_recomputation(self) -> Iterator[None]:
        own = freezing.recompute

        def recompute(*args: Any, **options: Any) -> Any:
            began = CLOCK()
            try:
                return own(*args, **options)
            finally:
                self.recomputing += CLOCK() - began

        freezing.recompute = recompute
        try:
            yield
        finally:
            freezing.recompute = own


class Clock(pl.Callback):
    """Seconds from each validation's first batch to its end without the recomputation, and of each epoch."""

    def __init__(self, ours: Timed) -> None:
        self.ours = ours
        self.passes: list[float] = []
        self.epochs: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.epoch_began = CLOCK()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.epochs.append(CLOCK() - self.epoch_began)

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self.began = CLOCK() - self.ours.recomputing

    def on_validation_end(self, *_: Any) -> None:
        self.passes.append(CLOCK() - self.ours.recomputing - self.began)


def trainer_of(callbacks: list[Any], epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=40,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


def measure_fits(
    make: Callable[[], tuple[Classifier, Dataset, int]], options: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Seconds of a fit with and without the callback, in turn."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for has_callback in (False, True):
            torch.manual_seed(0)
            model, data, batch_size = make()
            training, loader = DataLoader(ConcatDataset([data] * 3), batch_size), DataLoader(data, batch_size)
            trainer = trainer_of([BLNStatsCallback(verbose=False, **options)] if has_callback else [], epochs=3)
            began = CLOCK()
            trainer.fit(model, training, loader)
            times[has_callback].append(CLOCK() - began)
    ratios = [b / a for a, b in zip(times[False], times[True], strict=True)]
    plain, ours = statistics.median(times[False]), statistics.median(times[True])
    return {"plain_s": plain, "ratio": ours / plain, "spread": [min(ratios), max(ratios)]}


def measure(make: Callable[[], tuple[Classifier, Dataset, int]], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, data, batch_size = make()
    ours = Timed(guard="off", verbose=False, recompute_batches=1, every_n_epochs=2)
    clock = Clock(ours)
    trainer = trainer_of([clock, ours], 2 * rounds + 2)
    training, loader = DataLoader(ConcatDataset([data] * 3), batch_size), DataLoader(data, batch_size)
    shared: list[Any] = []
    ours.on_fit_end = lambda *_: shared.append(ours._shared)  # type: ignore[method-assign]
    with ours.counting_recomputation():
        trainer.fit(model, training, loader)
    plain, swept = clock.passes[2::2], clock.passes[3::2]
    ratios = [b / a for a, b in zip(plain, swept, strict=True)]
    return {
        "plain_ms": 1e3 * statistics.median(plain),
        "passes": statistics.median(swept) / statistics.median(plain),
        "spread": [min(ratios), max(ratios)],
        "first_sweep_passes": clock.passes[1] / statistics.median(plain),
        "outside_share": ours.outside / sum(clock.epochs),
        "outside_ms_per_epoch": 1e3 * ours.outside / len(clock.epochs),
        "shares_forward": bool(shared[0] and shared[0].is_active),
        "chunk": shared[0].chunk if shared[0] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="count CPU time, on one thread: for a machine in use")
    options = parser.parse_args()
    if options.cpu:
        torch.set_num_threads(1)
        CLOCK.count_cpu()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    print(
        f"{'case':13} {'plain pass':>11} {'16 modes cost':>14} {'min..max':>14} {'first':>7} {'bar':>5} "
        f"{'outside':>8}  shared"
    )
    for name in options.cases:
        make, bar = CASES[name]
        found[name] = one = measure(make, options.rounds) | {"bar": bar}
        print(
            f"{name:13} {one['plain_ms']:8.1f} ms {one['passes']:7.2f} passes "
            f"{one['spread'][0]:6.2f}..{one['spread'][1]:6.2f} {one['first_sweep_passes']:7.2f} {bar:5.1f} "
            f"{100 * one['outside_share']:6.2f} %  "
            f"{'in chunks of ' + str(one['chunk']) if one['shares_forward'] else 'no'}"
            f"{'' if one['passes'] <= bar else '  MISSES THE BAR'}",
            flush=True,
        )
    fits: dict[str, Any] = {}
    for name, (make, arguments, bar) in FITS.items():
        fits[name] = one = measure_fits(make, arguments, max(3, options.rounds // 2))
        fits[name] |= {} if math.isnan(bar) else {"bar": bar}
        goal = "" if math.isnan(bar) else f", goal {bar}{'' if one['ratio'] <= bar else '  MISSED'}"
        print(
            f"whole fit, {name:26} {one['plain_s']:6.2f} s without, {one['ratio']:5.2f} times as long with it "
            f"({one['spread'][0]:.2f}..{one['spread'][1]:.2f}){goal}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    about = {
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "threads": torch.get_num_threads(),
        "clock": "cpu" if options.cpu else "wall",
        "machine": platform.machine(),
        "rounds": options.rounds,
    }
    RESULTS.write_text(json.dumps({"about": about, "cases": found, "fits": fits}, indent=2) + "\n")


if __name__ == "__main__":
    main()
