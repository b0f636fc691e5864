"""Batches of a new domain, read as a prediction reads them, and the calibration on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_bln._scoped import setting
from lightning_bln.calibration import Calibration, calibrate, keeping, spread
from lightning_bln.callbacks import _lightning
from lightning_bln.recomputation import holding

Split = Literal["train", "validation", "test", "predict"]
LOADERS = {"train": "train_dataloader", "validation": "val_dataloader"}
"""Names of the hooks that give a split's data; those of others begin with the split's name."""
STAGES = {"train": "fit", "validation": "fit", "test": "test"}


class Calibrating(L.Callback):
    """Callback that takes the batches of a prediction in place of the module, and calibrates it at the end.

    Args:
        module: The module.
        samples: As of :func:`~lightning_bln.calibrate`.
    """

    def __init__(self, module: L.LightningModule, samples: int) -> None:
        self.samples, self.batches = samples, list[Any]()
        self.calibration: Calibration | None = None
        step = module.predict_step
        indexed = (0,) if _lightning.takes_batch_idx(step) else ()
        own = is_overridden("predict_step", module)  # else the module is called with all that a batch holds
        self.predict = (lambda batch: step(batch, *indexed)) if own else None

    def taking(self, module: L.LightningModule) -> AbstractContextManager[None]:
        """Context in which the module's step only keeps batches."""

        def keep(batch: Any, *indices: int) -> Tensor:
            return torch.tensor(len([*keeping([batch], self.batches)]))

        return setting([module], predict_step=keep)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate, while the module is still on the Trainer's device."""
        with torch.inference_mode(False):
            batches = [*keeping(self.batches, [])]  # those of the loop may be inference tensors
            vars(pl_module).pop("predict_step")
            self.calibration = calibrate(pl_module, batches, predict=self.predict, samples=self.samples)


class First:
    """The first batches of a loader that hold as many samples."""

    def __init__(self, loader: Any, samples: int) -> None:
        self.loader, self.samples = spread(loader, samples), samples

    def __iter__(self) -> Iterator[Any]:
        return holding(self.loader, self.samples)


def few(loaders: Any, samples: int) -> Any:
    """Loaders, of which no more is read than samples are needed."""
    every = [*loaders.values()] if isinstance(loaders, dict) else loaders
    if not isinstance(every, (list, tuple)):
        return First(every, samples)
    return [First(one, math.ceil(samples / len(every))) for one in every]


def reading(owner: Any, split: Split, samples: int) -> AbstractContextManager[None]:
    """Context in which ``owner``, a module or datamodule, gives samples of a split to be predicted.

    Raises:
        ValueError: It has no such data.
    """
    name = LOADERS.get(split, f"{split}_dataloader")
    if not is_overridden(name, owner):
        raise ValueError(
            f"{type(owner).__name__} has no {name}; name data of the new domain in --config, or the split to read: "
            "--split train, validation, test or predict"
        )
    load = getattr(owner, name)

    def loaders() -> Any:
        if split in STAGES and isinstance(owner, L.LightningDataModule):
            owner.setup(STAGES[split])
        return few(load(), samples)

    return setting([owner], predict_dataloader=loaders)
