"""Recomputation of the population over training batches within fit, without a trace in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bln._scoped import setting
from lightning_bln._torch import altered, tree_map
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.distributed import is_sharded
from lightning_bln.joining import reading_items, serves_items
from lightning_bln.recomputation import gather_population, reset_population
from lightning_bln.sweep.random_state import RandomState

STEP = "population_step"
"""Optional method of a module, ``(batch, batch_idx)``, that is called in place of an unusable ``training_step``."""


def recompute(
    trainer: Any,
    module: Any,
    *,
    samples: int | None,
    limit: int | None,
    dataloader: Iterable[Any] | None = None,
    on_batch: Callable[[int], None],
) -> None:
    """Compute the population of ``module`` at its present weights, over the Trainer's training data.

    Args:
        trainer: A Trainer within ``fit``.
        module: The module it trains.
        samples: As in :func:`~lightning_bln.recompute_population`.
        limit: Use at most this many batches on each rank.
        dataloader: Batches to use in place of the training data.
        on_batch: Called with 1 for each batch that is read.
    """
    collate: list[Any] = []

    def opened(loader: Any) -> Any:
        if samples is None or not serves_items(loader):
            return loader
        collate.append(loader.collate_fn)
        return reading_items(loader, len(collate) - 1)

    with undisturbed(trainer, module) as restart:
        indices = count()

        def run(batch: Any) -> None:
            run_step(trainer, module, batch, next(indices))

        def begin_again() -> None:
            nonlocal indices
            indices = count()
            restart()

        def read() -> Iterator[Any]:
            for batch in training_batches(trainer, opened) if dataloader is None else opened(dataloader):
                on_batch(1)
                yield batch

        gather_population(
            module,
            read(),
            run,
            samples=samples,
            limit=limit_of(trainer, limit) if dataloader is None else limit,
            collate=collate,
            restart=begin_again,
            # the module alone does not show that its wrapper shards weights, so that ranks must run in step
            wrapped=trainer.strategy.model if is_sharded(trainer.strategy.model) else None,
        )
        reset_population(module)


def limit_of(trainer: Any, limit: int | None) -> int | None:
    """Largest number of training batches: of those that an epoch trains on, as ``limit_train_batches`` leaves them."""
    trained = trainer.num_training_batches
    bounds = [one for one in (limit, trained) if one is not None and math.isfinite(one)]
    return max(int(min(bounds)), 1) if bounds else None


def batches_for(loader: Any, samples: int | None, ranks: int) -> float:
    """Batches of a loader that each rank reads for so many samples; infinite where that is unknown."""
    size = getattr(loader, "batch_size", None)
    return math.inf if samples is None or not isinstance(size, int) else -(-samples // (size * ranks))


def check_recompute(trainer: Any, module: Any) -> None:
    """Raise where a training step could not be run without harm to training, before anything has changed."""
    if hasattr(module, STEP):
        return
    if not module.automatic_optimization:
        raise _lightning.misconfiguration(
            trainer,
            "population='recompute', but the module optimises by hand, so its training_step would move the weights; "
            f"give it a method {STEP}(batch, batch_idx) that only calls the model, or set population='epoch'",
        )
    if _lightning.takes_dataloader_iter(module.training_step):
        raise _lightning.misconfiguration(
            trainer,
            "population='recompute', but training_step(dataloader_iter) draws its own batches; give the module a "
            f"method {STEP}(batch, batch_idx) that only calls the model, or set population='epoch'",
        )


def run_step(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Run a training step without optimizer on a batch, moved and converted as the Trainer does it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = _lightning.before_batch_transfer(module, batch, 0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    if hasattr(module, STEP):
        with trainer.precision_plugin.train_step_context():
            getattr(module, STEP)(batch, batch_idx)
    else:
        indexed = _lightning.takes_batch_idx(module.training_step)
        trainer.strategy.training_step(batch, *([batch_idx] if indexed else []))


@contextmanager
def undisturbed(trainer: Any, module: Any) -> Iterator[Callable[[], None]]:
    """After the context, all that a training step touches besides gradients is as before: RNG, state, logs, stage.

    Its value is a function that gives the module's state back within the context.
    """
    user, wrapped = UserState(module), trainer.strategy.model
    state, random = user.take(), RandomState(module.device)
    with (
        torch.inference_mode(False),
        # DDP's forward would broadcast buffers, and ranks may have different numbers of batches
        setting([wrapped] if isinstance(wrapped, DistributedDataParallel) else [], require_forward_param_sync=False),
        setting([module], log=mute, log_dict=mute),
        setting([trainer], loggers=_lightning.silent_loggers(trainer)),
        setting([trainer.state], stage=type(trainer.state.stage).TRAINING),
    ):
        try:
            user.put(UserState.copy(state))
            yield lambda: user.put(UserState.copy(state))
        finally:
            user.put(state)
            random.restore()


def mute(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log``."""


def training_batches(trainer: Any, opened: Callable[[Any], Any]) -> Iterator[Any]:
    """A separate pass over the training data, beside the one that trains.

    Args:
        trainer: A Trainer within ``fit``.
        opened: Gives for each loader the one to read.
    """
    source = _lightning.train_loader(trainer)
    loaders = tree_map(lambda loader: opened(independent(trainer, loader)), source.iterables)
    with restored_generators(source.flattened):
        for batch, _, _ in _lightning.recombined(source, loaders):
            yield batch


def independent(trainer: Any, loader: Any) -> Any:
    """A loader of the same batches that shares no iterator with ``loader``, or an error where there cannot be one."""
    name, problem = type(loader).__name__, None
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        problem = (
            f"{name} keeps its place in the data, which a second reading would move; pass stats_dataloader=, or set "
            "population='epoch'"
        )
    elif isinstance(loader, DataLoader) and loader.persistent_workers and loader.num_workers:
        # persistent workers serve one iterator: a second one would take the batches that the first still waits for
        if type(loader) is DataLoader:
            return altered(loader)
        problem = (
            f"{name}(persistent_workers=True) cannot be read a second time while it trains; set "
            "persistent_workers=False, or pass stats_dataloader="
        )
    elif isinstance(loader, Iterator):
        problem = (
            f"the training data is a {name}, which can be read only once; pass stats_dataloader=, or set "
            "population='epoch'"
        )
    if problem is not None:
        raise _lightning.misconfiguration(trainer, f"population='recompute', but {problem}")
    return loader


@contextmanager
def restored_generators(loaders: Iterable[Any]) -> Iterator[None]:
    """After the context, the generators that loaders and samplers draw from have the state they had before."""
    generators = []
    for loader in loaders:
        sampler = getattr(loader, "sampler", None)
        holders = [loader, sampler, getattr(loader, "batch_sampler", None)]
        holders.append(getattr(holders[-1], "sampler", None))
        generators += [one for one in (getattr(holder, "generator", None) for holder in holders) if one is not None]
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def fingerprint(module: nn.Module) -> int:
    """A checksum of this rank's weights, which shows that some have changed, by an optimizer or otherwise."""
    shards = [one.to_local() if hasattr(one, "to_local") else one for one in module.parameters()]
    sums = [sum_of_bits(one.detach()) for one in shards]
    return int(torch.stack(sums).sum()) if sums else 0


def sum_of_bits(weight: Tensor) -> Tensor:
    """The sum of a weight's bytes as 64-bit integers: as fast as memory, and a change of one element always shows."""
    raw = weight.contiguous().view(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    rest = raw.numel() % 8
    if not rest:
        return raw.view(torch.int64).sum()
    return raw[:-rest].view(torch.int64).sum() + raw[-rest:].sum()
