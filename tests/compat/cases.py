"""Models of which files are kept: built by public names alone, so that any version can build them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    ConvBLN2d,
    Recurrent,
    recompute_population,
    set_mode,
)
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.cells import BLNLSTMCell

MODES = ("cccc", "ppcc", "pppp", "pcpc")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: BatchLayerNorm(4), (5, 4)),
    "sequence-paper": (lambda: BatchLayerNorm(4, population="paper"), (5, 3, 4)),
    "shared-momentum": (lambda: BatchLayerNorm(4, positions="shared", momentum=0.1, channel_dim=1), (5, 4, 3)),
    "conv": (lambda: ConvBLN2d(2, 3, 3), (4, 2, 6, 6)),
    "lstm": (lambda: BLNLSTM(3, 4, num_layers=2, bidirectional=True), (6, 5, 3)),
    "lstm-joint": (lambda: BLNLSTM(3, 4, gate_statistics="joint", time_statistics="shared"), (6, 5, 3)),
    "lstm-projected": (lambda: BLNLSTM(3, 4, proj_size=2), (6, 5, 3)),
    "gru": (lambda: BLNGRU(3, 4, batch_first=True), (5, 6, 3)),
    "rnn-batch": (lambda: BLNRNN(3, 4, norm="batch", nonlinearity="relu"), (6, 5, 3)),
    "plain": (lambda: BLNLSTM(3, 4, norm=None), (6, 5, 3)),
    "mgu": (lambda: Recurrent("mgu", 3, 4), (6, 5, 3)),
    "lem": (lambda: Recurrent("lem", 3, 4, norm="layer"), (6, 5, 3)),
    "sru": (lambda: Recurrent("sru", 3, 4), (6, 5, 3)),
    "cell": (lambda: BLNLSTMCell(3, 4), (5, 3)),
}
"""Each layer's constructor and the shape of its input."""


def fitted(name: str) -> tuple[nn.Module, Tensor]:
    """A layer with a population, in evaluation, and an input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    if any(hasattr(part, "population") for part in layer.modules()):
        recompute_population(layer, [torch.randn(shape) for _ in range(3)])
        set_mode(layer, "pcpp")
    return layer.eval(), torch.randn(shape)


def predictions(layer: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What a layer returns in its own mode and in each of :data:`MODES`, flat."""
    found = {}
    has_modes = any(hasattr(part, "population") for part in layer.modules())
    with torch.no_grad():
        for mode in ("own", *(MODES if has_modes else ())):
            if mode != "own":
                set_mode(layer, mode)
            found[mode] = flat(layer(x))
    return found


def flat(value: Tensor | tuple) -> list[Tensor]:
    """The tensors of a nested output."""
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in flat(part)]


class Network(LightningModule):
    """A small recurrent classifier with a norm on top."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.norm, self.head = BLNLSTM(3, 8, batch_first=True), BatchLayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.recurrent(x)[0][:, -1]))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data() -> DataLoader:
    """Sequences whose mean tells their class, in an order of their own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, 3, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2)) > 0).long()), batch_size=8)


def fit(
    folder: Path, epochs: int, checkpoint: Path | None = None, **options: Any
) -> tuple[Network, BLNStatsCallback, Trainer]:
    """Train a :class:`Network` up to an epoch, from the start or from a checkpoint."""
    torch.manual_seed(0)
    network, callback = Network(), BLNStatsCallback(verbose=False, log="all", **options)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[callback],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(network, data(), data(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return network, callback, trainer
