"""Every private name of lightning that the callback uses, each with its reason, and a check that it is there."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
"""The two names under which the same Trainer is distributed; a Trainer takes callbacks of its own namespace only."""


def namespaces() -> list[str]:
    """The namespaces a callback made now should belong to: those in use, else the first that is installed."""
    loaded = [name for name in NAMESPACES if name in sys.modules]
    if loaded:
        return loaded
    for name in NAMESPACES:
        if find_spec(name.partition(".")[0]) is not None:
            return [name]
    raise ImportError("lightning_bln.callbacks needs a Trainer; run: pip install lightning")


def callback_bases() -> tuple[type, ...]:
    """The ``Callback`` classes of the namespaces in use."""
    return tuple(importlib.import_module(name).Callback for name in namespaces())


def namespace_of(trainer: Any) -> str:
    """The namespace ``trainer`` comes from."""
    for base in type(trainer).__mro__:
        for name in NAMESPACES:
            if base.__module__.startswith(name + "."):
                return name
    return namespaces()[0]


def misconfiguration(trainer: Any, message: str) -> Exception:
    """A ``MisconfigurationException`` of the trainer's namespace."""
    exceptions = importlib.import_module(f"{namespace_of(trainer)}.utilities.exceptions")
    return exceptions.MisconfigurationException(message)


def lightning_base(module: nn.Module) -> type[nn.Module]:
    """The ``LightningModule`` class that ``module`` derives from."""
    return next(base for base in type(module).__mro__ if base.__name__ == "LightningModule")


def evaluation_loop(trainer: Any) -> Any:
    """The validation loop now running: ``fit`` and ``validate`` have one each, and no public name tells which."""
    return trainer._evaluation_loop


def results(loop: Any) -> Any:
    """The collection that ``self.log`` fills during this loop."""
    return loop._results


def swap_results(loop: Any, collection: Any) -> Any:
    """Let ``self.log`` fill ``collection``; returns the one it filled before."""
    before, loop._results = loop._results, collection
    return before


def new_results(loop: Any, has_bar: bool = True) -> Any:
    """A collection for a run; its class is private, but the loop has one to take the class from.

    Without ``has_bar`` nothing is turned into a number for a progress bar: jointly evaluated modes have none in common.
    """
    results = mode_results(type(loop._results))(training=False)  # type: ignore[arg-type]
    results.has_bar = has_bar
    return results


@cache
def mode_results(base: Any) -> type:
    """``base``, but a row that already lies where it is asked to go does not rebuild itself at every ``self.log``."""

    def set_row(self: Any, key: str, row: Any) -> None:
        row.__dict__["to"] = partial(move_row, row)
        dict.__setitem__(self, key, row)

    def metrics(self: Any, on_step: bool) -> Any:
        in_bar = [row.meta for row in self.values() if row.meta.prog_bar and not self.has_bar]
        for meta in in_bar:
            meta.prog_bar = False
        try:
            return base.metrics(self, on_step)
        finally:
            for meta in in_bar:
                meta.prog_bar = True

    return type("ModeResults", (base,), {"__setitem__": set_row, "metrics": metrics})


def move_row(row: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    value = row.__dict__.get("value")
    # a metric's row has no value yet, or one that the user has put where it belongs
    if not row.is_tensor or (value is not None and value.device == device):
        return row
    return type(row).to(row, device, *args, **kwargs)


def plain_row(row: Any) -> Any:
    """A row as lightning made it, to be given back."""
    row.__dict__.pop("to", None)
    return row


def logged_outputs(loop: Any) -> list[dict[str, Any]]:
    """Logged values of each dataloader, which the loop hands to the loggers and ``validate`` returns."""
    return loop._logged_outputs


def is_sequential(loop: Any) -> bool:
    """Whether dataloaders run one after the other, each with metrics of its own."""
    return loop._is_sequential


def current_hook(module: Any) -> str | None:
    """The hook ``self.log`` believes to be in; it decides how a value is reduced."""
    return module._current_fx_name


def set_current_hook(module: Any, name: str | None) -> None:
    """See :func:`current_hook`."""
    # no parameter, module or buffer, which is what the module's own way of setting would look for first
    module.__dict__["_current_fx_name"] = name


def current_fx(connector: Any) -> str | None:
    """The hook last logged from: when it changes, the connector resets values."""
    return connector._current_fx


def set_current_fx(connector: Any, name: str | None) -> None:
    """See :func:`current_fx`."""
    connector._current_fx = name


def silent_logger(trainer: Any) -> Any:
    """A logger of the trainer's namespace that takes every call and does nothing.

    Lightning's own ``DummyLogger`` refuses an attribute or index of an attribute: ``experiment.config.update(...)``.
    """
    return silent_logger_class(namespace_of(trainer))()


@cache
def silent_logger_class(namespace: str) -> type:
    base = importlib.import_module(f"{namespace}.loggers.logger").DummyLogger
    own = {"experiment": property(lambda self: Ignored()), "__getattr__": lambda self, name: getattr(Ignored(), name)}
    return type("SilentLogger", (base,), own)


class Ignored:
    """An object that takes every call, attribute and index, and does nothing."""

    def __getattr__(self, name: str) -> Ignored:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Ignored:
        return self

    def __getitem__(self, index: Any) -> Ignored:
        return self

    def __setitem__(self, index: Any, value: Any) -> None: ...


def log_as_named(trainer: Any, module: Any, values: dict[str, float]) -> None:
    """Log many numbers as ``self.log`` does in a callback's hook at the end of an epoch, at a tenth of its cost.

    Names may hold a dataloader's index, which ``self.log`` refuses before lightning 2.5.3. A ``self.log`` has to come
    first in the hook: it turns the page for a new epoch.
    """
    collection, hook = results(evaluation_loop(trainer)), current_hook(module)
    for name, value in values.items():
        number, key = torch.tensor(value, device=module.device), f"{hook}.{name}"
        if key in collection:
            collection.update_metrics(key, number, 1)
        else:
            collection.log(hook, name, number, add_dataloader_idx=False)


CONNECTOR_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
"""The dictionaries behind ``trainer.callback_metrics`` and its two siblings, in the order callback, log, pbar."""


def connector(trainer: Any) -> Any:
    """Holds those dictionaries, and the hook last logged from, by which it knows when to reset values."""
    return trainer._logger_connector


def train_loader(trainer: Any) -> Any:
    """The combined training loader: the public property gives its parts, not how they are combined."""
    return trainer.fit_loop._combined_loader


def before_batch_transfer(module: Any, batch: Any, dataloader_idx: int) -> Any:
    """Runs the user's hook of that name exactly when the Trainer would."""
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Keep buffers out of DDP's broadcast, which would replace every rank's statistics by those of rank 0."""
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    module._ddp_params_and_buffers_to_ignore = [*before, *(name for name in names if name not in set(before))]  # type: ignore[assignment]


def averaged_model(callback: Any) -> Any:
    """The averaged copy a ``WeightAveraging`` callback keeps, or None; it has no public name."""
    return getattr(callback, "_average_model", None)


SWAPS = ("_swap_models", "_copy_average_to_current")
"""How ``WeightAveraging`` exchanges weights and buffers with its copy: by position, whatever their shapes."""


ROW_VALUES = ("value", "cumulated_batch_size", "has_reset", "_forward_cache", "_computed", "_update_count")
"""What a row of results has gathered, as opposed to how it gathers; rows have no public way to tell."""

METRIC_INTERNALS = frozenset({"update", "compute", "_update_signature", "_defaults", "_reductions", "_persistent"})
"""Attributes of a torchmetrics object that are no state: wrapped methods, and how each state starts and is reduced."""

HPARAMS = frozenset({"_hparams", "_hparams_initial", "_hparams_name"})
"""Hyperparameters of a LightningModule: set before training, and possibly large."""

BACK_REFERENCES = frozenset({"_trainer", "_fabric"})
"""What a LightningModule refers to and does not hold, so that a search for its state must not follow."""


def attributes_set(cls: type) -> set[str]:
    """Names that ``__init__`` of ``cls`` mentions: instance attributes leave no other trace on a class."""
    code = inspect.unwrap(cls.__init__).__code__  # type: ignore[misc]
    return {*code.co_names, *(one for one in code.co_consts if isinstance(one, str))}


def required(namespace: str) -> Iterator[tuple[str, bool]]:
    """Each private name used above with whether the installed version has it."""
    loops = importlib.import_module(f"{namespace}.loops.evaluation_loop")
    fit = importlib.import_module(f"{namespace}.loops.fit_loop")
    connectors = f"{namespace}.trainer.connectors.logger_connector"
    logging = importlib.import_module(f"{connectors}.logger_connector")
    row = attributes_set(importlib.import_module(f"{connectors}.result")._ResultMetric)
    metric = attributes_set(importlib.import_module("torchmetrics").Metric)
    hparams = importlib.import_module(f"{namespace}.utilities.parsing").save_hyperparameters.__code__.co_names
    trainer = importlib.import_module(namespace).Trainer
    module = importlib.import_module(namespace).LightningModule
    loop = attributes_set(loops._EvaluationLoop)
    yield "Trainer._evaluation_loop", hasattr(trainer, "_evaluation_loop")
    yield "Trainer._logger_connector", "_logger_connector" in attributes_set(trainer)
    yield "_EvaluationLoop._results", "_results" in loop
    yield "_EvaluationLoop._logged_outputs", "_logged_outputs" in loop
    yield "_EvaluationLoop._is_sequential", hasattr(loops._EvaluationLoop, "_is_sequential")
    yield "_FitLoop._combined_loader", "_combined_loader" in attributes_set(fit._FitLoop)
    yield "LightningModule._current_fx_name", "_current_fx_name" in attributes_set(module)
    yield "LightningModule._on_before_batch_transfer", hasattr(module, "_on_before_batch_transfer")
    for name in sorted(BACK_REFERENCES):
        yield f"LightningModule.{name}", name in attributes_set(module)
    for name in sorted(HPARAMS):
        yield f"LightningModule.{name}", name in hparams
    for name in ROW_VALUES:
        yield f"_ResultMetric.{name}", name in row | metric
    for name in sorted(METRIC_INTERNALS):
        yield f"torchmetrics.Metric.{name}", name in metric
    names = attributes_set(logging._LoggerConnector)
    for name in (*CONNECTOR_METRICS, "_current_fx"):
        yield f"_LoggerConnector.{name}", name in names


def check(namespace: str) -> None:
    """Raise where a private name is gone.

    Raises:
        ImportError: The installed lightning lacks something the callback needs.
    """
    try:
        missing = [name for name, is_there in required(namespace) if not is_there]
    except (ImportError, AttributeError) as error:
        missing = [str(error)]
    if missing:
        version = importlib.import_module(namespace.partition(".")[0]).__version__
        if any(name.startswith("torchmetrics.") for name in missing):
            version += f" with torchmetrics {importlib.import_module('torchmetrics').__version__}"
        raise ImportError(
            f"lightning_bln.callbacks does not know {namespace} {version}: it lacks {', '.join(missing)}; "
            "install lightning==2.6.6, or a newer lightning-bln"
        )


def takes_dataloader_iter(step: Any) -> bool:
    """Whether a step asks for the dataloader's iterator in place of batches."""
    return "dataloader_iter" in inspect.signature(step).parameters


def takes_batch_idx(step: Any) -> bool:
    """Whether a step is called with the batch's index: as lightning decides it, by name or by a second parameter."""
    parameters = inspect.signature(step).parameters
    named = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    has_varargs = any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
    return "batch_idx" in parameters or has_varargs or len(named) >= 2
