"""LightningCLI with the further subcommands ``sweep``, ``calibrate`` and ``export``, as ``bln`` runs it."""

from __future__ import annotations

import argparse
import inspect
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback

from lightning_bln._checks import check_int
from lightning_bln._files import FileError
from lightning_bln.calibration import Calibration
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.cli.calibration import Calibrating, Split, few, reading
from lightning_bln.cli.checkpoint import load_checkpoint, undo_population, write_mode, write_population
from lightning_bln.cli.exporting import PLAIN_TRAINER, Validation, export_checkpoint
from lightning_bln.cli.fitting import fitting
from lightning_bln.cli.trust import check_trust, import_paths, read_config
from lightning_bln.exporting import Exported
from lightning_bln.exporting.formats import Format
from lightning_bln.modes import mode_layers, parse_modes
from lightning_bln.recomputation import populations
from lightning_bln.sweep.result import Direction, SweepResult, one_direction

CONFIG_KEY = "bln_config"
"""The key in a checkpoint of the YAML it was trained from."""

RECIPE = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
"""The entries of a configuration that every subcommand has."""

NOISE = (
    ".*LeafSpec.*",  # lightning 2.6 on torch 2.13
    ".*args parameter is intended to run from within Python.*",  # ours come from the command line all the same
    ".*callbacks used to create the checkpoint.*",  # a sweep leaves out callbacks that would write files
)
"""Patterns of warnings that a user of the command cannot act on."""


OF_CHECKPOINT = ("sweep", "calibrate", "export")
"""Subcommands of a checkpoint, which may say itself which model and data it is of."""


def run(args: Sequence[str]) -> None:
    """Run one of Lightning's subcommands, ``args[0]``, with the options that follow it."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    if args[0] == "calibrate" and "--undo=true" in with_value(list(args), "--undo"):
        undo(list(args))
    elif args[0] in OF_CHECKPOINT:
        with tempfile.TemporaryDirectory() as folder:
            CLI(args=own_config(with_value(list(args), "--trust"), Path(folder)))
    else:
        CLI(args=checked(list(args)))


def undo(args: list[str]) -> None:
    """Put the population back that a checkpoint had before; its model and data are not needed."""
    parser = argparse.ArgumentParser(prog="bln calibrate --undo", allow_abbrev=False)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    known = parser.parse_known_args(args[1:])[0]
    undo_population(known.ckpt, output=known.output, weights_only="--weights_only=false" not in args)
    print(f"wrote the population before the calibration to {known.output or known.ckpt}")


def own_config(args: list[str], folder: Path) -> list[str]:
    """``args``, preceded by the configuration that the checkpoint they name holds, if any, as a file in ``folder``.

    Raises:
        FileError: The file is damaged, or its configuration names foreign modules and ``args`` do not trust it.
    """
    known = parsed(args, "ckpt")
    if known.ckpt is None:
        return args
    if not known.ckpt.is_file():
        raise FileError(f"{known.ckpt}: no such file; pass a checkpoint that the Trainer has written")
    checkpoint = load_checkpoint(known.ckpt, weights_only="--weights_only=false" not in args, is_checked=True)
    if not isinstance(checkpoint.get("state_dict"), dict):
        raise FileError(f"{known.ckpt}: no checkpoint of a Trainer, since it has no state_dict")
    saved = checkpoint.get(CONFIG_KEY)
    if saved is None:
        if known.config is None:
            raise SystemExit(
                f"--ckpt={known.ckpt} does not say which model and data it is of, as one written by `bln fit` does; "
                "pass --config too"
            )
        return args
    recipe = {key: value for key, value in read_config(saved, known.ckpt).items() if key in RECIPE}
    if "--trust=true" not in args:
        check_trust(known.ckpt, recipe, named_by_user(args, known.config))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return [args[0], "--config", str(path), *args[1:]]


def checked(args: list[str]) -> list[str]:
    """``args`` without ``--trust``; raise where it is missing and their ``--ckpt_path`` is of a foreign class.

    Newer versions of Lightning build the model of the class that a checkpoint's hyperparameters name.
    """
    args = with_value(args, "--trust")
    known = parsed(args, "ckpt_path")
    trusts = "--trust=true" in args
    args = [one for one in args if not one.startswith("--trust=")]
    if trusts or known.ckpt_path is None or not known.ckpt_path.is_file():
        return args
    try:
        hyperparameters = load_checkpoint(known.ckpt_path).get("hyper_parameters", {})
    except FileError:
        if "--weights_only=false" in args:
            return args
        raise
    names = {key: value for key, value in dict(hyperparameters or {}).items() if key != "_instantiator"}
    check_trust(known.ckpt_path, names, named_by_user(args, known.config))
    return args


def parsed(args: list[str], checkpoint: str) -> argparse.Namespace:
    """The checkpoint and the configuration that a command line names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{checkpoint}", type=Path)
    parser.add_argument("-c", "--config", type=Path, action="append")
    return parser.parse_known_args(args[1:])[0]


def with_value(args: list[str], flag: str) -> list[str]:
    """``args``, ``flag`` alone or followed by true or false as one argument with a value."""
    found: list[str] = []
    for one in args:
        if found and found[-1] == flag and one in ("true", "false"):
            found[-1] = f"{flag}={one}"
        else:
            found.append(one)
    return [f"{flag}=true" if one == flag else one for one in found]


def named_by_user(args: list[str], configs: list[Path] | None) -> set[str]:
    """Import paths on the command line and in the user's own configurations, which need no consent."""
    found = {part for one in args for part in one.split("=")}
    for path in configs or []:
        if path.is_file():
            found |= {*import_paths(read_config(path.read_text(), path))}
    return found


class Trainer(L.Trainer):
    """Lightning's Trainer, which can also sweep the modes of a checkpoint, and save predictions."""

    def sweep(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        *,
        ckpt: Path,
        output: Path | None = None,
        monitor: str = "val_loss",
        direction: Direction | None = None,
        mode: Direction | None = None,
        candidates: list[str] | str | None = None,
        weights_only: bool = True,
        trust: bool = False,
    ) -> SweepResult:
        """Evaluate a checkpoint in every statistics mode that differs for its model, and write the best one into it.

        Args:
            model: The checkpoint's module.
            dataloaders: Validation data, unless ``datamodule`` has them.
            datamodule: Datamodule with the validation data.
            ckpt: The checkpoint, of which nothing but the mode changes; it is replaced in one step at the end.
            output: Write to this file instead.
            monitor: The validation metric by which to choose, unless the configuration has a BLNStatsCallback.
            direction: Whether a small ("min", the default) or a large ("max") value of it is good.
            mode: Earlier name of ``direction``.
            candidates: The modes to choose from, such as "foldable", "batch_independent" or "pp**"; by default those of
                the configuration's BLNStatsCallback, or all.
            weights_only: Refuse files that could run code when they are loaded.
            trust: Import whatever classes the checkpoint's configuration names, as ``--trust``; without it, those of
                this package, torch, lightning and torchmetrics only.

        Returns:
            The scores of the modes and the choice.

        Raises:
            FileNotFoundError: There is no file at ``ckpt``.
            RuntimeError: The checkpoint has no population.
        """
        direction = one_direction(direction, mode)
        check_file(ckpt)
        found = [callback for callback in self.callbacks if isinstance(callback, BLNStatsCallback)]  # type: ignore[has-type]
        callback = found[0] if found else BLNStatsCallback(monitor=monitor, direction=direction)
        if candidates is not None:
            callback.candidates = parse_modes("candidates", candidates)
        if not found:
            self.callbacks = [*self.callbacks, callback]  # type: ignore[has-type]
        options: dict[str, Any] = {"ckpt_path": str(ckpt), "verbose": False}
        if "weights_only" in inspect.signature(self.validate).parameters:  # lightning 2.6 and later
            options["weights_only"] = weights_only
        with fitting(model, ckpt):
            self.validate(model, dataloaders, datamodule=datamodule, **options)
        # a layer that nothing calls has no population
        if not any(population.is_frozen for population in populations(model)) or callback.result is None:
            mend = "train with BLNStatsCallback, or call recompute_population before saving"
            if not mode_layers(model):
                mend = f"{type(model).__name__} has no layer with one; to_bln(model, norm='keep') makes some"
            raise RuntimeError(f"ckpt={str(ckpt)!r} has no frozen population, so there is no mode to choose; {mend}")
        if self.is_global_zero:
            write_mode(ckpt, model, output=output, weights_only=weights_only, callback=callback)
            print(callback.result)
            print(f"wrote {callback.result.chosen} to {output or ckpt}")
        self.strategy.barrier()
        return callback.result

    def calibrate(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        *,
        ckpt: Path,
        output: Path | None = None,
        split: Split = "predict",
        samples: int = 1024,
        undo: bool = False,
        weights_only: bool = True,
        trust: bool = False,
    ) -> Calibration | None:
        """Compute a checkpoint's population anew on data of a new domain, and keep the old one beside it in the file.

        Args:
            model: The checkpoint's module; its ``predict_step`` is what runs on a batch, if it has one.
            dataloaders: Data of the new domain, unless ``datamodule`` or ``model`` have it.
            datamodule: Datamodule with the data.
            ckpt: The checkpoint, of which nothing but statistics changes; it is replaced in one step at the end.
            output: Write to this file instead.
            split: The data to read: "predict", "train", "validation" or "test".
            samples: How many samples to take.
            undo: Put the population back that the checkpoint had before, and do nothing else.
            weights_only: Refuse files that could run code when they are loaded.
            trust: Import whatever classes the checkpoint's configuration names, as for ``bln sweep``.

        Returns:
            Both populations; ``None`` with ``undo``.

        Raises:
            FileNotFoundError: There is no file at ``ckpt``.
            ValueError: There is no such data, or the model has no layer with a population.
        """
        if undo:
            undo_population(ckpt, output=output, weights_only=weights_only)
            return None
        check_file(ckpt)
        callback = Calibrating(model, samples)
        self.callbacks = [*self.callbacks, callback]
        options: dict[str, Any] = {"ckpt_path": str(ckpt), "return_predictions": False}
        if "weights_only" in inspect.signature(super().predict).parameters:  # lightning 2.6 and later
            options["weights_only"] = weights_only
        given = dataloaders is not None
        loaders = few(dataloaders, samples) if given else None
        data = nullcontext() if given else reading(datamodule or model, split, samples)
        with callback.taking(model), data, fitting(model, ckpt):
            self.predict(model, loaders, datamodule=datamodule, **options)
        calibration = callback.calibration
        assert calibration is not None
        if self.is_global_zero:
            write_population(ckpt, calibration, output=output, weights_only=weights_only)
            print(calibration)
            print(
                f"wrote the population of {calibration.samples} samples to {output or ckpt}; "
                f"bln calibrate --ckpt {output or ckpt} --undo puts the old one back"
            )
        self.strategy.barrier()
        return calibration

    def export(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        *,
        ckpt: Path,
        output: Path,
        to: Format | None = None,
        batches: int = 16,
        tolerance: float | None = None,
        weights_only: bool = True,
        trust: bool = False,
    ) -> Exported:
        """Write the model of a checkpoint to a file that is kept if it computes the same on validation data.

        Args:
            model: The checkpoint's module, whose ``forward`` is exported, in the statistics mode of the checkpoint.
            dataloaders: Validation data, unless ``datamodule`` or ``model`` have them.
            datamodule: Datamodule with the validation data.
            ckpt: The checkpoint, which stays as it is.
            output: The file to write; one that is there is replaced once the new one has been compared.
            to: "onnx", "pt2" (torch.export) or "torch" (the folded model's state dict); by default as output ends:
                .onnx, .pt2, .pt.
            batches: How many validation batches to compare and score, the last one among them.
            tolerance: Accepted difference, relative to the largest number of the results; 1e-4 for float32 by default.
            weights_only: Refuse files that could run code when they are loaded.
            trust: Import whatever classes the checkpoint's configuration names, as for ``bln sweep``.

        Returns:
            What was found.

        Raises:
            FileNotFoundError: There is no file at ``ckpt``.
            ExportError: The model cannot be exported, or the file computes something else.
        """
        check_file(ckpt)
        options: dict[str, Any] = {"ckpt_path": str(ckpt)}
        if "weights_only" in inspect.signature(self.validate).parameters:  # lightning 2.6 and later
            options["weights_only"] = weights_only
        owner = dataloaders if dataloaders is not None else datamodule or model
        validation = Validation(self, owner, check_int("batches", batches, 1))
        return export_checkpoint(
            validation, model, Path(output), to, load=options, ckpt=Path(ckpt), tolerance=tolerance
        )

    def predict(self, *args: Any, output: Path | None = None, **kwargs: Any) -> Any:
        """Run inference on your data.

        Args:
            args: Arguments of Lightning's ``predict``.
            output: File to save the predictions to with ``torch.save``, a list with an entry for each batch.
            kwargs: Arguments of Lightning's ``predict``.
        """
        predictions = super().predict(*args, **kwargs)
        if output is not None and self.is_global_zero:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            torch.save(predictions, output)
        return predictions


def check_file(ckpt: str | Path) -> None:
    """Raise where there is no file at ``ckpt``."""
    if not Path(ckpt).is_file():
        raise FileNotFoundError(f"ckpt={str(ckpt)!r} is no file; pass a checkpoint that the Trainer has written")


class SaveConfig(SaveConfigCallback):
    """Callback that saves the configuration in the checkpoint, so that ``bln sweep`` and others need the file alone."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.parser.dump(self.config, skip_none=False)


class CLI(LightningCLI):
    """LightningCLI for any module and data by their class paths; see Lightning's documentation of it.

    Args:
        args: The command line, or with ``run=False`` the configuration as a dictionary.
        run: Whether to run a subcommand, or only to create ``model``, ``datamodule`` and ``trainer``.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("save_config_callback", SaveConfig if run else None)
        kwargs.setdefault("parser_kwargs", {"prog": "bln"} if run else None)
        super().__init__(
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            args=args,
            run=run,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, and those of a checkpoint."""
        return {
            **LightningCLI.subcommands(),
            **{name: {"model", "dataloaders", "datamodule"} for name in OF_CHECKPOINT},
        }

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Create the Trainer, for a checkpoint's commands without the callbacks and loggers that would write files."""
        if self.subcommand not in (None, "fit"):
            self.save_config_callback = None  # it would overwrite the file of the training
        if self.subcommand in OF_CHECKPOINT:
            callbacks = self.config_init[self.subcommand]["trainer"].get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            kwargs["callbacks"] = [one for one in callbacks if isinstance(one, BLNStatsCallback)]
            kwargs |= {"logger": False, "enable_checkpointing": False}
        if self.subcommand == "export":
            precision = str(self.config_init[self.subcommand]["trainer"].get("precision"))
            kwargs["callbacks"] = []  # one could set another mode
            kwargs |= {**PLAIN_TRAINER, "precision": "64-true" if precision.startswith("64") else "32-true"}
        return super().instantiate_trainer(**kwargs)
