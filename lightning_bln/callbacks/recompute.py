"""Recomputation of the population over training batches within fit, without a trace in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lightning_bln._scoped import setting
from lightning_bln._torch import altered, tree_map
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.run import RandomState
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.distributed import in_step, is_sharded
from lightning_bln.recomputation import recompute_population, reset_population

STEP = "population_step"
"""Optional method of a module, ``(batch, batch_idx)``, that is called in place of an unusable ``training_step``."""


def recompute(
    trainer: Any,
    module: Any,
    *,
    limit: int | None,
    dataloader: Iterable[Any] | None = None,
    on_step: Callable[[int], None],
) -> None:
    """Compute the population of ``module`` at its present weights, over the Trainer's training data.

    Args:
        trainer: A Trainer within ``fit``.
        module: The module it trains.
        limit: Use at most this many batches on each rank.
        dataloader: Batches to use in place of the training data.
        on_step: Called with 1 after each batch.
    """
    with undisturbed(trainer, module):
        batches = training_batches(trainer) if dataloader is None else zip(dataloader, count())
        wrapped = trainer.strategy.model
        if is_sharded(wrapped) and not is_sharded(module):
            # recompute_population sees the module alone, and only its wrapper says that ranks must run in step
            batches, limit = in_step(wrapped, islice(batches, limit)), None

        def predict(item: tuple[Any, int]) -> None:
            run_step(trainer, module, *item)
            on_step(1)

        recompute_population(module, batches, predict=predict, limit=limit)
        reset_population(module)


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
def undisturbed(trainer: Any, module: Any) -> Iterator[None]:
    """After the context, all that a training step touches besides gradients is as before: RNG, state, logs, stage."""
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
            yield
        finally:
            user.put(state)
            random.restore()


def mute(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log``."""


def training_batches(trainer: Any) -> Iterator[tuple[Any, int]]:
    """A separate pass over the training data, with each batch's index, beside the one that trains."""
    source = _lightning.train_loader(trainer)
    combined = _lightning.recombined(source, tree_map(lambda loader: independent(trainer, loader), source.iterables))
    with restored_generators(source.flattened):
        for batch, batch_idx, _ in combined:
            yield batch, batch_idx


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
