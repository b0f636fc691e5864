"""A checkpoint's model exported: its forward as validation calls it, and the validation of the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bln._scoped import setting
from lightning_bln._torch import altered, tree_flatten
from lightning_bln.cli.fitting import fitting
from lightning_bln.exporting import Call, Exported, ExportError, export
from lightning_bln.exporting.calls import has_samples
from lightning_bln.exporting.export import check_path
from lightning_bln.exporting.formats import Format, format_of
from lightning_bln.joining import owned, samples_along, serves_items
from lightning_bln.modes import mode_layers

PLAIN_TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
}
"""Arguments of a Trainer that computes what the file will: on one CPU."""

Metrics = dict[str, float]
Validate = Callable[[L.LightningModule], Metrics]
"""A function that validates a module on the batches that are kept, and returns what it logs."""


class Calls(L.Callback):
    """Callback that keeps what validation calls ``forward`` with.

    Args:
        model: The module.
    """

    def __init__(self, model: L.LightningModule) -> None:
        self.forward, self.calls, self.inputs, self.samples = model.forward, list[Call](), list[Call](), 1

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *indices: int) -> None:
        """Keep the batch's first entry, and count its samples by the labels, if it has some."""
        self.samples = samples_in(batch)
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        self.inputs.append(counted(Call((owned(first),), samples=self.samples)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``."""
        args, kwargs = owned((args, kwargs))
        self.calls.append(counted(Call(args, kwargs, self.samples)))
        return self.forward(*args, **kwargs)


def counted(call: Call) -> Call:
    """A call whose number of samples is that of the batch, if an axis has this size."""
    return call if has_samples(call) else call._replace(samples=None)


def samples_in(batch: Any) -> int:
    """Samples of a batch, by a tensor with one number for each, or else by the first tensor."""
    leaves = tree_flatten(batch)[0]
    numbers = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 1]
    return numbers[-1] if numbers else samples_along(batch)


class Kept:
    """Batches of a loader, the first and the last of them, read once.

    Args:
        loader: The loader.
        batches: How many batches.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches, self.read = ends(loader, batches), batches, list[Any]()

    def __len__(self) -> int:
        return min(self.batches, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        if not self.read:
            with torch.random.fork_rng(devices=[]):  # a second validation does not read, nor draw numbers for it
                self.read = [*islice(self.loader, self.batches)]
        return (owned(batch) for batch in self.read)


def ends(loader: Any, batches: int) -> Any:
    """A loader of the first batches and of the last one, which may be smaller, where a loader tells them beforehand."""
    try:
        is_longer = isinstance(loader, DataLoader) and serves_items(loader) and len(loader) > batches
    except TypeError:  # an IterableDataset has no length
        is_longer = False
    if not is_longer:
        return loader
    every = [*loader.batch_sampler]
    return altered(loader, batch_sampler=[*every[: batches - 1], every[-1]])


def kept(loaders: Any, batches: int) -> Any:
    """Loaders, each with its first batches and the last."""
    if isinstance(loaders, dict):
        return {name: Kept(one, batches) for name, one in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [Kept(one, batches) for one in loaders]
    return Kept(loaders, batches)


class Validation:
    """Validation of a module on the same batches, however often.

    Args:
        trainer: A Trainer on one CPU.
        owner: The module or datamodule that has the data, or the loaders.
        batches: How many batches of each loader.
    """

    def __init__(self, trainer: L.Trainer, owner: Any, batches: int) -> None:
        self.trainer, self.owner, self.batches = trainer, owner, batches
        self.loaders: Any = None
        self.is_owner = isinstance(owner, (L.LightningModule, L.LightningDataModule))
        if self.is_owner and not is_overridden("val_dataloader", owner):
            raise ExportError(
                f"{type(owner).__name__} has no val_dataloader, on whose batches a file is compared; name data that "
                "has one in --config"
            )
        self.load = owner.val_dataloader if self.is_owner else lambda: owner

    def read(self) -> Any:
        """The loaders, made once."""
        if self.loaders is None:
            with torch.random.fork_rng(devices=[]):
                self.loaders = kept(self.load(), self.batches)
        return self.loaders

    def __call__(self, module: L.LightningModule, **options: Any) -> Metrics:
        """Validate a module, and return what it logs."""
        is_data = isinstance(self.owner, L.LightningDataModule)
        place: AbstractContextManager[Any] = setting(
            [self.owner if is_data else module] if self.is_owner else [], val_dataloader=self.read
        )
        loaders = None if self.is_owner else self.read()
        alone = setting([module], configure_callbacks=list)  # a callback could set another mode
        with place, alone, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that a step that draws numbers draws the same for the file
            self.trainer.validate(module, loaders, datamodule=self.owner if is_data else None, verbose=False, **options)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}


def export_checkpoint(
    validate: Validation,
    model: L.LightningModule,
    output: Path,
    to: Format | None,
    *,
    ckpt: Path,
    load: dict[str, Any],
    **options: Any,
) -> Exported:
    """Export the model of a checkpoint and print what was found.

    Args:
        validate: Validation on the batches that are compared.
        model: The module, which validation fills from the checkpoint.
        output: The file to write.
        to: Its format.
        ckpt: The checkpoint.
        load: Options of ``Trainer.validate`` that name the checkpoint.
        **options: As of :func:`~lightning_bln.export`.
    """
    to = format_of(output, to)
    check_path(output)
    if output.resolve() == ckpt.resolve():
        raise ExportError(f"{output} is the checkpoint itself; name another file")
    calls = Calls(model)
    validate.trainer.callbacks = [*validate.trainer.callbacks, calls]  # type: ignore[attr-defined]
    with setting([model], forward=calls), fitting(model, ckpt):
        own = validate(model, **load)
    validate.trainer.callbacks = [one for one in validate.trainer.callbacks if one is not calls]  # type: ignore[attr-defined]
    others: Metrics = {}

    def check(file: Callable[..., Any]) -> None:
        copy = deepcopy(model)
        copy.forward = file  # type: ignore[method-assign]
        others.update(validate(copy))

    ways = len({call.structure() for call in calls.calls})
    with setting([logging.getLogger("lightning_bln.convert")], disabled=True):  # the report is printed
        found = export(model, output, calls.calls or calls.inputs, to=to, check=check if ways == 1 else None, **options)
    if modes := sorted({str(layer.mode) for layer in mode_layers(model)}):
        print(f"statistics mode: {', '.join(modes)}")
    print(found)
    if ways == 1:
        print(table(own, others, output.name))
    else:
        how = f"calls forward in {ways} ways" if ways else "does not call forward"
        print(f"validation_step {how}, so that its metrics cannot be computed by the file")
    print(f"wrote {output} ({to}, {output.stat().st_size / 1000:.1f} kB)")
    return found


def table(own: Metrics, others: Metrics, file: str) -> str:
    """Lines with the metrics of a checkpoint and of a file."""
    rows = [("", "checkpoint", file), *((name, f"{own[name]:.6g}", f"{others[name]:.6g}") for name in sorted(own))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
