"""Private names of lightning and torchmetrics that the callbacks use, each with its reason, checked at import."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torchmetrics import Metric

from lightning_bln._scoped import setting
from lightning_bln._torch import tree_flatten

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
"""The two packages that distribute the Trainer; each accepts only callbacks of its own ``Callback`` class."""


def namespaces() -> list[str]:
    """The namespaces whose callbacks a new one must be: all imported so far, else the first installed."""
    loaded = [name for name in NAMESPACES if name in sys.modules]
    if loaded:
        return loaded
    for name in NAMESPACES:
        if find_spec(name.partition(".")[0]) is not None:
            return [name]
    raise ImportError("lightning_bln.callbacks needs a Trainer; run: pip install lightning")


def callback_bases() -> tuple[type, ...]:
    """The ``Callback`` class of each of :func:`namespaces`."""
    return tuple(importlib.import_module(name).Callback for name in namespaces())


def namespace_of(trainer: Any) -> str:
    """The namespace of the Trainer's class."""
    found = (name for base in type(trainer).__mro__ for name in NAMESPACES if base.__module__.startswith(f"{name}."))
    return next(found, namespaces()[0])


def misconfiguration(trainer: Any, message: str) -> Exception:
    """A ``MisconfigurationException`` of the trainer's namespace."""
    exceptions = importlib.import_module(f"{namespace_of(trainer)}.utilities.exceptions")
    return exceptions.MisconfigurationException(message)


def bases(value: Any) -> dict[str, type]:
    """The class of an object and its bases by name: which of the Trainer's packages they come from does not matter."""
    return {base.__name__: base for base in type(value).__mro__}


def starts_workers(trainer: Any) -> bool:
    """Whether the Trainer runs in processes that it starts by itself, and ends again, within ``fit``."""
    return "_MultiProcessingLauncher" in bases(trainer.strategy.launcher)


def evaluation_loop(trainer: Any) -> Any:
    """The running validation loop; ``fit`` and ``validate`` have one each, and no public name tells which is active."""
    return trainer._evaluation_loop


def results(loop: Any) -> Any:
    """The result collection that ``self.log`` fills during this loop."""
    return loop._results


CONNECTOR_METRICS = {"callback": "_callback_metrics", "log": "_logged_metrics", "pbar": "_progress_bar_metrics"}
"""The dictionaries behind ``callback_metrics``, ``logged_metrics`` and ``progress_bar_metrics`` of a Trainer, by the
names that a result collection gives them."""


def publish(loop: Any, metrics: dict[str, dict[str, Any]], lost: Iterable[str] = ()) -> None:
    """Have the Trainer show the metrics of a result collection, and those named ``lost`` no longer."""
    for kind, name in CONNECTOR_METRICS.items():
        shown = getattr(loop.trainer._logger_connector, name)
        for one in lost:
            shown.pop(one, None)
        shown.update(metrics[kind])


def log_state(loop: Any) -> dict[str, Any]:
    """Metrics shown, and the hook last logged from, which tells when to reset: what ``self.log`` goes on from."""
    return {
        name: getattr(loop.trainer._logger_connector, name) for name in (*CONNECTOR_METRICS.values(), "_current_fx")
    }


def swap_log(loop: Any, collection: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make ``self.log`` fill ``collection`` and go on from ``state``; returns the previous ones."""
    before = loop._results, log_state(loop)
    loop._results = collection
    vars(loop.trainer._logger_connector).update(state)
    return before


def new_results(loop: Any, has_bar: bool = True) -> Any:
    """An empty result collection; its class is private, so it is taken from the loop's own.

    Without ``has_bar`` it computes no progress-bar metrics: a value of joint evaluation is no single number.
    """
    results = mode_results(type(loop._results))(training=False)  # type: ignore[arg-type]
    results.has_bar = has_bar
    return results


@cache
def mode_results(base: Any) -> type:
    """A subclass of the result collection ``base`` whose rows skip ``to`` where they already are on the device.

    Lightning calls ``to`` at every ``self.log``, and it rebuilds the row each time.
    """

    def set_row(self: Any, key: str, row: Any) -> None:
        row.__dict__["to"] = partial(move_row, row)
        dict.__setitem__(self, key, row)

    def metrics(self: Any, on_step: bool) -> Any:
        in_bar = [row.meta for row in self.values() if row.meta.prog_bar and not self.has_bar]
        with setting(in_bar, prog_bar=False):
            return base.metrics(self, on_step)

    return type("ModeResults", (base,), {"__setitem__": set_row, "metrics": metrics})


def move_row(row: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
    """``row.to(device)``, or ``row`` itself where that would change nothing."""
    value = row.__dict__.get("value")
    # the row of a metric object has no value yet, or the user's object, which is not ours to move
    if not row.is_tensor or (value is not None and value.device == device):
        return row
    return type(row).to(row, device, *args, **kwargs)


def plain_row(row: Any) -> Any:
    """A row without our ``to``, as lightning makes it."""
    row.__dict__.pop("to", None)
    return row


def logged_outputs(loop: Any) -> list[dict[str, Any]]:
    """Metrics logged for each dataloader, which the loop passes to the loggers and returns from ``validate``."""
    return loop._logged_outputs


def dataloader_indices(loop: Any) -> Iterable[int | None]:
    """The index of each dataloader with metrics of its own, as those have that run one after the other, else None."""
    return range(loop.num_dataloaders) if loop.num_dataloaders > 1 and loop._is_sequential else [None]


def call_hook(module: Any, name: str, *args: Any, owner: Any = None) -> Any:
    """Call a hook that ``self.log`` then takes itself to be called from, which decides how a value is reduced.

    ``owner`` is the module by default, or a strategy that calls the module's.
    """
    # past nn.Module.__setattr__, which searches parameters, modules and buffers: this runs several times a step
    fields = vars(module)
    before, fields["_current_fx_name"] = fields["_current_fx_name"], name
    try:
        return getattr(module if owner is None else owner, name)(*args)
    finally:
        fields["_current_fx_name"] = before


def silent_loggers(trainer: Any) -> list[Any]:
    """As many loggers as the Trainer has, which take every call and do nothing."""
    return [silent_logger_class(namespace_of(trainer))() for _ in trainer.loggers]


@cache
def silent_logger_class(namespace: str) -> type:
    """Lightning's ``DummyLogger``, which alone refuses an attribute of an attribute: ``experiment.config.update``."""
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
    """Log many numbers in a callback's hook at the end of an epoch, at a tenth of the cost of ``self.log``.

    Names may hold a dataloader's index, which ``self.log`` refuses before lightning 2.5.3. Ranks have the same values.
    """
    collection, hook, connector = trainer._evaluation_loop._results, module._current_fx_name, trainer._logger_connector
    if connector.should_reset_tensors(hook):  # as in ``self.log``: values of an earlier epoch are no part of a mean
        collection.reset(metrics=False, fx=hook)
    connector._current_fx = hook
    for name, value in values.items():
        number, key = torch.tensor(value, device=module.device), f"{hook}.{name}"
        if key in collection:
            collection.update_metrics(key, number, 1)
        else:
            # without sync_dist Lightning would advise it
            collection.log(hook, name, number, add_dataloader_idx=False, sync_dist=trainer.world_size > 1)


def train_loader(trainer: Any) -> Any:
    """The combined training loader; the public property gives its parts, not how they are combined."""
    return trainer.fit_loop._combined_loader


def given_train_loaders(trainer: Any) -> list[Any]:
    """Training loaders that ``fit`` was given; none where a hook makes them, which is not ours to call."""
    instance = trainer.fit_loop._data_source.instance
    if instance is None or {"LightningModule", "LightningDataModule"} & set(bases(instance)):
        return []
    return getattr(instance, "flattened", None) or tree_flatten(instance)[0]


def training_modes(trainer: Any) -> dict[str, bool]:
    """Whether each module, by its name, was in training mode before a validation within fit put all into evaluation.

    Outside of one nothing, since modules then have their own modes.
    """
    return trainer._evaluation_loop._module_mode.mode if trainer.validating else {}


def mark_cut(checkpoint: dict[str, Any]) -> None:
    """Have a run that resumes from a checkpoint, saved within a validation, begin with this validation.

    Of progress that it cannot place, Lightning takes a validation for done.
    """
    progress = checkpoint["loops"]["fit_loop"].get("epoch_loop.val_loop.batch_progress", {})
    first = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress.update(total=dict(first), current=dict(first), is_last_batch=False)


def begin_again(trainer: Any) -> None:
    """Have a validation that goes on where a checkpoint cut it begin with its first batch."""
    loop = trainer._evaluation_loop
    done = loop.batch_progress.current.ready
    if done:
        loop.batch_progress.reset_on_run()
        loop._data_fetcher.fetched -= done


def recombined(combined: Any, loaders: Any) -> Any:
    """Other loaders combined as ``combined`` combines its own; it has no public name for its mode."""
    other = type(combined)(loaders, combined._mode)
    other.limits = combined.limits
    return other


def before_batch_transfer(module: Any, batch: Any, dataloader_idx: int) -> Any:
    """Run the user's hook ``on_before_batch_transfer`` exactly where the Trainer would."""
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def averaged_model(callback: Any) -> Any:
    """The averaged copy that a ``WeightAveraging`` callback keeps, or None; it has no public name."""
    return getattr(callback, "_average_model", None)


def swap_average(callback: Any, module: Any) -> None:
    """Exchange the weights of a module and those that a ``WeightAveraging`` callback keeps."""
    callback._swap_models(module)


SWAPS = ("_swap_models", "_copy_average_to_current")
"""The methods in which ``WeightAveraging`` exchanges weights and buffers with its copy, pairing them by position."""

ROW_VALUES = ("value", "cumulated_batch_size", "has_reset", "_forward_cache", "_computed", "_update_count")
"""Fields in which a row of results gathers values, as opposed to its settings; no public name tells them apart."""

METRIC_INTERNALS = frozenset({"update", "compute", "_update_signature", "_defaults", "_reductions", "_persistent"})
"""Attributes of a torchmetrics object that are no state: wrapped methods, and how each state starts and is reduced."""

HPARAMS = frozenset({"_hparams", "_hparams_initial", "_hparams_name"})
"""Hyperparameters of a LightningModule: set before training, and possibly large."""

BACK_REFERENCES = frozenset({"_trainer", "_fabric"})
"""What a LightningModule refers to and does not hold, so that a search for its state must not follow."""


EVALUATION_LOOP = ("_results", "_logged_outputs", "_is_sequential", "_module_mode", "_data_fetcher")


def required(namespace: str) -> Iterator[tuple[str, bool]]:
    """Each private name used above, with whether the installed version has it."""

    def part(path: str) -> Any:
        return importlib.import_module(f"{namespace}.{path}")

    connectors, lightning = "trainer.connectors.logger_connector", importlib.import_module(namespace)
    names: dict[type, tuple[str, ...]] = {
        lightning.Trainer: ("_evaluation_loop", "_logger_connector"),
        lightning.LightningModule: ("_current_fx_name", "_on_before_batch_transfer", *sorted(BACK_REFERENCES)),
        part("loops.evaluation_loop")._EvaluationLoop: EVALUATION_LOOP,
        part("loops.fit_loop")._FitLoop: ("_combined_loader", "_data_source"),
        part("strategies.launchers.multiprocessing")._MultiProcessingLauncher: (),
        part("utilities.combined_loader").CombinedLoader: ("_mode",),
        part(f"{connectors}.logger_connector")._LoggerConnector: (
            *CONNECTOR_METRICS.values(),
            "_current_fx",
            "should_reset_tensors",
        ),
        part(f"{connectors}.result")._ResultCollection: ("dataloader_idx", "metrics", "update_metrics", "log", "reset"),
        part(f"{connectors}.result")._ResultMetric: ("is_tensor", "meta", *ROW_VALUES),
    }
    averaging = getattr(part("callbacks"), "WeightAveraging", None)  # from lightning 2.6 on
    if averaging is not None:
        names[averaging] = ("_average_model", *SWAPS)
    for owner, wanted in names.items():
        yield from has_names(owner, wanted)
    hparams = part("utilities.parsing").save_hyperparameters.__code__.co_names
    yield from ((f"LightningModule.{name}", name in hparams) for name in sorted(HPARAMS))


def has_names(owner: type, names: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Names of a class, each with whether it has it; instance attributes count where an ``__init__`` names them."""
    inits = [inspect.unwrap(base.__init__) for base in owner.__mro__]  # type: ignore[misc]
    codes = [init.__code__ for init in inits if inspect.isfunction(init)]
    set_by_init = {name for code in codes for name in (*code.co_names, *code.co_consts) if isinstance(name, str)}
    for name in names:
        yield f"{owner.__name__}.{name}", hasattr(owner, name) or name in set_by_init


def check(namespace: str) -> None:
    """Raise an ImportError where the installed lightning or torchmetrics lacks a private name."""
    user = "lightning_bln.callbacks"
    # torchmetrics first, whose names lightning's rows inherit
    metric = has_names(Metric, (*sorted(METRIC_INTERNALS), "_computed", "_update_count"))
    require(user, "torchmetrics", metric, "torchmetrics==1.9.0")
    require(user, namespace, required(namespace), "lightning==2.6.6")


def require(user: str, library: str, names: Iterable[tuple[str, bool]], known: str) -> None:
    """Raise an ImportError where ``library`` lacks names that ``user`` needs; pip's requirement ``known`` has them."""
    try:
        missing = [name for name, is_there in names if not is_there]
    except (ImportError, AttributeError) as error:
        missing = [str(error)]
    if missing:
        version = importlib.import_module(library.partition(".")[0]).__version__
        raise ImportError(
            f"{user} does not know {library} {version}: it lacks {', '.join(missing)}; "
            f"install {known}, or a newer lightning-bln"
        )


def takes_dataloader_iter(step: Any) -> bool:
    """Whether a step takes the dataloader's iterator in place of batches."""
    return "dataloader_iter" in inspect.signature(step).parameters


def takes_batch_idx(step: Any) -> bool:
    """Whether lightning passes the batch's index to a step, by the rule it applies: a name, or a second parameter."""
    parameters = inspect.signature(step).parameters
    named = [one for one in parameters.values() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    has_varargs = any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
    return "batch_idx" in parameters or has_varargs or len(named) >= 2
