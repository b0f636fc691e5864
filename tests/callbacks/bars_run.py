"""Started by test_terminal.py: fits and validates in which the callback says all that it can, under a progress bar."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import lightning.pytorch as pl
import torch
import zoo
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_bln.callbacks.display import SweepBar
from lightning_bln.callbacks.messages import Messages


class Says(zoo.Simple):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = super().validation_step(batch[:2], batch_idx)
        self.log("val_in_bar", loss, prog_bar=True)
        self.log_dict({f"another_metric_{number}": loss for number in range(9)})
        float(loss)  # so that modes go one after the other


class Interrupts(pl.Callback):
    """Says a word where bars of training, validation and sweep are on the screen, and longer than it."""

    def __init__(self) -> None:
        self.messages = Messages(verbose=True)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.messages.info(trainer, "In training.")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.messages.info(trainer, "In validation.")


def named(samples: list) -> Any:
    x, y = default_collate(samples)
    return x, y, ["a name"] * len(y)


def sorted_by_class(**options: Any) -> DataLoader:
    x, y = zoo.make_data(41, 2, shift=0.7).tensors
    order = torch.argsort(y, stable=True)
    return DataLoader(TensorDataset(x[order], y[order]), batch_size=20, **options)


def main(bar: str) -> None:
    SweepBar.INTERVAL = 0.0  # redraw always
    torch.manual_seed(0)
    callback = zoo.chooser(
        direction="max",  # modes that read the batch have the worst loss on sorted data, so that the guard speaks
        guard="strict",
        candidates=["cccc", "pccc", "ppcc"],
        verbose=True,
        save_dir="/dev/null/folder",
    )
    shown = {"tqdm": TQDMProgressBar, "rich": RichProgressBar}[bar](refresh_rate=1)
    trainer = zoo.trainer(shown, Interrupts(), callback, enable_progress_bar=True, max_epochs=2)
    model = Says()
    trainer.validate(model, sorted_by_class(), verbose=False)  # there is no population yet
    trainer.fit(model, zoo.train_data(), sorted_by_class())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, zoo.train_data(), sorted_by_class(collate_fn=named))  # resumes, and cannot regroup


if __name__ == "__main__":
    main(sys.argv[1])
