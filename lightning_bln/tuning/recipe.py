"""Configuration of ``bln tune``: what ``bln fit`` would train, and which of its entries to search."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from lightning_bln._checks import check_bool, check_choice, check_int
from lightning_bln._files import FileError, one_line
from lightning_bln.cli.lightning import CLI, NOISE, RECIPE
from lightning_bln.sweep.result import Direction, check_direction
from lightning_bln.tuning.space import Distribution

PRUNERS = ("median", "hyperband", "none")
SAMPLERS = ("tpe", "random")

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
"""Arguments of a trial's Trainer, unless the configuration has others."""

DEMO: dict[str, Any] = {
    "fit": {
        "seed_everything": 0,
        "model": {"class_path": "lightning_bln.demo.RowClassifier", "init_args": {"hidden_size": 64}},
        "data": {"class_path": "lightning_bln.demo.DigitRows", "init_args": {"batch_size": 32}},
        "trainer": {"accelerator": "cpu", "max_epochs": 4},
    },
    "search": {
        "model.init_args.norm": ["bln", "layer", "batch"],
        "model.init_args.hidden_size": {"low": 16, "high": 96, "step": 16},
        "model.init_args.lr": {"low": 0.0005, "high": 0.02, "log": True},
        "data.init_args.batch_size": [16, 32, 64],
    },
    "monitor": "val_loss",
    "mode": "min",
    "pruner": "median",
}
"""The search without a configuration: the demo's network on its digits."""


@dataclass(frozen=True)
class Recipe:
    """A search over entries of a configuration of ``bln fit``.

    Args:
        fit: The configuration: ``model``, ``data``, ``trainer`` and so on.
        search: A distribution for each path into ``fit`` that is searched, such as ``model.init_args.lr``.
        monitor: The validation metric to optimise.
        mode: Its direction, ``"min"`` or ``"max"``.
        latency: Whether the milliseconds of a forward are a second objective.
        pruner: ``"median"``, ``"hyperband"`` or ``"none"``; without effect with ``latency``.
        sampler: ``"tpe"`` (with ``latency`` NSGA-II) or ``"random"``.
        seed: Seed of the sampler; parallel workers add their number to it.

    Raises:
        ValueError: An entry is none of those above.
    """

    fit: Mapping[str, Any]
    search: Mapping[str, Distribution]
    monitor: str = "val_loss"
    mode: Direction = "min"
    latency: bool = False
    pruner: str = "median"
    sampler: str = "tpe"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("pruner", self.pruner, PRUNERS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_direction(self.mode, "mode")
        check_bool("latency", self.latency)
        check_int("seed", self.seed)
        if not isinstance(self.monitor, str):
            raise ValueError(f"monitor={self.monitor!r}, but it must be the name of a metric")
        if not self.search:
            raise ValueError("search is empty, so there is nothing to tune; name at least one hyperparameter")

    @classmethod
    def load(cls, path: str | Path | None = None) -> Recipe:
        """Read a YAML file, whose ``fit`` may name another one; without a file, the demo's search.

        Raises:
            FileError: A file is missing, no YAML, or describes no search.
        """
        if path is None:
            return cls.parse(DEMO)
        spec = read_yaml(Path(path))
        if isinstance(spec, dict) and isinstance(spec.get("fit"), str):
            spec["fit"] = read_yaml(Path(path).parent / spec["fit"])
        with naming(path):
            return cls.parse(spec)

    @classmethod
    def parse(cls, spec: Any) -> Recipe:
        """The search described by the content of a YAML file."""
        known = [field.name for field in fields(cls)]
        if not isinstance(spec, dict) or not {"fit", "search"} <= set(spec) <= set(known):
            raise ValueError(f"the configuration must have fit and search, and may have {', '.join(known[2:])}")
        for name in ("fit", "search"):
            if not isinstance(spec[name], dict):
                raise ValueError(f"{name} is a {type(spec[name]).__name__}, but it must be a mapping")
        fit = {key: value for key, value in copy.deepcopy(spec["fit"]).items() if key in RECIPE}
        fit.setdefault("seed_everything", 0)
        search = {name: Distribution.parse(name, one) for name, one in spec["search"].items()}
        recipe = cls(**{**spec, "fit": fit, "search": search})
        recipe.configuration(recipe.first_values())  # raises where a path leads nowhere
        if not isinstance(fit.setdefault("trainer", {}), dict):
            raise ValueError(f"fit.trainer is a {type(fit['trainer']).__name__}, but it must be a mapping")
        callbacks = fit["trainer"].setdefault("callbacks", []) or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if not all(isinstance(one, dict) and isinstance(one.get("class_path"), str) for one in callbacks):
            raise ValueError("fit.trainer.callbacks must be mappings with a class_path each")
        if not any(str(one.get("class_path")).endswith("BLNStatsCallback") for one in callbacks):
            arguments = {"monitor": recipe.monitor, "mode": recipe.mode}
            callbacks.append({"class_path": "lightning_bln.callbacks.BLNStatsCallback", "init_args": arguments})
        fit["trainer"]["callbacks"] = callbacks
        return recipe

    @property
    def max_epochs(self) -> int | None:
        """The Trainer's number of epochs, if the configuration has one."""
        return self.fit.get("trainer", {}).get("max_epochs")

    @property
    def sign(self) -> int:
        """Factor that makes the smallest metric the best one."""
        return 1 if self.mode == "min" else -1

    def configuration(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``fit`` with ``values`` at their paths."""
        config = copy.deepcopy(dict(self.fit))
        for path, value in values.items():
            set_path(config, path, value)
        return config

    def build(self, values: Mapping[str, Any], folder: Path) -> tuple[Any, Any, Any]:
        """Create Trainer, model and datamodule for ``values`` as ``bln fit`` does, but quiet.

        Args:
            values: A value for each path of ``search``.
            folder: Folder that the Trainer may write to.

        Raises:
            ValueError: LightningCLI does not accept the configuration.
        """
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
            logging.getLogger(name).setLevel(logging.WARNING)
        config = self.configuration(values)
        trainer = {**QUIET, "default_root_dir": str(folder), **config["trainer"]}
        callbacks = trainer["callbacks"]
        for one in [*callbacks, trainer["logger"]]:
            arguments = one.get("init_args", {}) if isinstance(one, dict) else {}
            # trials run at the same time, and must not write to one folder
            arguments.update({key: str(folder) for key in ("dirpath", "save_dir") if arguments.get(key) is not None})
        for callback in callbacks:
            if str(callback["class_path"]).endswith("BLNStatsCallback"):
                callback["init_args"] = {"verbose": False, **callback.get("init_args", {})}
        if not any("Checkpoint" in str(callback["class_path"]) for callback in callbacks):
            trainer.setdefault("enable_checkpointing", False)
        config["trainer"] = trainer
        try:
            cli = CLI(args=config, run=False, parser_kwargs={"exit_on_error": False})
        except Exception as error:
            raise ValueError(f"this configuration cannot be built: {error}\n{yaml.safe_dump(config)}") from error
        return cli.trainer, cli.model, cli.datamodule

    def first_values(self) -> dict[str, Any]:
        """The first value of each path's distribution."""
        return {name: distribution.first for name, distribution in self.search.items()}


def prepare(recipe: Recipe | str | Path | None, output: str | Path, trials: int, jobs: int) -> tuple[Recipe, Path]:
    """Check what all engines need before anything is stored; returns the recipe loaded and the folder's full path."""
    if trials < 1 or jobs < 1:
        raise ValueError(f"trials={trials} and jobs={jobs}, but both must be positive")
    source = recipe
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    output = Path(output).resolve()
    with naming(source) if isinstance(source, (str, Path)) else nullcontext():
        recipe.build(recipe.first_values(), output)
    return recipe, output


def read_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    with naming(path):
        return yaml.safe_load(path.read_text())


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within the context, an error in what a file describes becomes one line that names the file."""
    try:
        yield
    except FileError:
        raise
    except RecursionError:
        raise FileError(f"{path}: nested too deeply") from None
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: {one_line(error)[:400]}") from error


def set_path(config: Any, path: str, value: Any) -> None:
    """Set the entry at a dotted path, in which numbers are indices into lists."""
    *above, last = path.split(".")
    for place, key in enumerate(above):
        try:
            config = config[int(key)] if isinstance(config, list) else config.setdefault(key, {})
        except (IndexError, ValueError, AttributeError):
            raise ValueError(f"search.{path} leads nowhere: fit has no {'.'.join(above[: place + 1])}") from None
    if isinstance(config, list) and last.isdecimal() and int(last) < len(config):
        config[int(last)] = value
    elif isinstance(config, dict):
        config[last] = value
    else:
        raise ValueError(f"search.{path} leads nowhere: fit has no {path}")
