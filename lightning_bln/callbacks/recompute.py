"""Recomputation of the population over training batches within fit, without a trace in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_bln._scoped import setting
from lightning_bln._torch import sync_buffers
from lightning_bln.batchnorm import batch_norms
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.kept_batches import KeptBatches
from lightning_bln.callbacks.large_state import Contents, large_values
from lightning_bln.callbacks.readings import training_batches
from lightning_bln.callbacks.running_averages import Running
from lightning_bln.callbacks.user_state import UserState
from lightning_bln.callbacks.weights import KeptWeights
from lightning_bln.distributed import is_sharded
from lightning_bln.joining import reading_items, serves_items
from lightning_bln.population import Population
from lightning_bln.recomputation import gather_population, populations
from lightning_bln.sweep.random_state import RandomState

STEP = "population_step"
"""Optional method of a module, ``(batch, batch_idx)``, that is called in place of an unusable ``training_step``."""

NEEDS_GRADIENTS = ("does not require grad", "not have been used in the graph", "no grad accumulator")
"""Words of torch's errors where a gradient is asked for and none is taken."""


class Recomputed(NamedTuple):
    """Names of populations that stay, since the step calls their layers not at all, and running statistics.

    Those are of batch norms by name; the layers do not have them yet.
    """

    left: list[str]
    running: dict[str, Running]


def recompute(
    trainer: Any,
    module: Any,
    *,
    samples: int | None,
    limit: int | None,
    dataloader: Iterable[Any] | None = None,
    on_batch: Callable[[int], None],
    asleep: Collection[nn.Module] = (),
    kept: KeptBatches | None = None,
    batchnorm: bool = True,
) -> Recomputed:
    """Compute the population of ``module`` at its present weights, over the Trainer's training data.

    Args:
        trainer: A Trainer within ``fit``.
        module: The module it trains.
        samples: As in :func:`~lightning_bln.recompute_population`.
        limit: Use at most this many batches on each rank.
        dataloader: Batches to use in place of the training data.
        on_batch: Called with 1 for each batch that is read.
        asleep: Layers that keep their population, since they are in evaluation mode while the module trains.
        kept: Batches of the Trainer's training data from an earlier reading, or where to keep them.
        batchnorm: Whether to compute running statistics of torch's batch norms, too.
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

        def read() -> Generator[Any, None, None]:
            for batch in source():
                on_batch(1)
                yield batch

        def source() -> Iterable[Any]:
            if dataloader is not None:
                return opened(dataloader)
            loaders = _lightning.train_loader(trainer).flattened
            if kept is None or samples is None:
                return training_batches(trainer, opened)
            return kept.read(loaders, partial(training_batches, trainer, opened), collate)

        with closing(read()) as batches:
            left = gather_population(
                module,
                batches,
                run,
                samples=samples,
                limit=limit_of(trainer, limit) if dataloader is None else limit,
                collate=collate,
                restart=begin_again,
                # the module alone does not show that its wrapper shards weights, so that ranks must run in step
                wrapped=trainer.strategy.model if is_sharded(trainer.strategy.model) else None,
                asleep=asleep,
                batchnorm=batchnorm,
            )
        for population in populations(module):
            population.reset()
        norms = {name: one for name, one in batch_norms(module).items() if batchnorm and one not in asleep}
        running = {name: Running.of(norm) for name, norm in norms.items() if name not in left}
    return Recomputed(left, running)


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
            f"give it a method {STEP}(batch, batch_idx) that only calls the model{or_epoch(module)}",
        )
    if _lightning.takes_dataloader_iter(module.training_step):
        raise _lightning.misconfiguration(
            trainer,
            "population='recompute', but training_step(dataloader_iter) draws its own batches; give the module a "
            f"method {STEP}(batch, batch_idx) that only calls the model{or_epoch(module)}",
        )


def or_epoch(module: nn.Module) -> str:
    """The way out for a model with populations that gather in training; batch norms of torch have none."""
    return ", or set population='epoch'" if populations(module) else ""


def run_step(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Run a training step without optimizer on a batch, moved and converted as the Trainer does it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = _lightning.before_batch_transfer(module, batch, 0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    if hasattr(module, STEP):
        with trainer.precision_plugin.train_step_context():
            getattr(module, STEP)(batch, batch_idx)
        return
    indexed = _lightning.takes_batch_idx(module.training_step)
    try:
        trainer.strategy.training_step(batch, *([batch_idx] if indexed else []))
    except RuntimeError as error:
        if not any(words in str(error) for words in NEEDS_GRADIENTS):
            raise
        raise _lightning.misconfiguration(
            trainer,
            f"population='recompute' runs training_step without gradients, which it needs ({error}); give the module "
            f"a method {STEP}(batch, batch_idx) that only calls the model{or_epoch(module)}",
        ) from error


@contextmanager
def undisturbed(trainer: Any, module: Any) -> Iterator[Callable[[], None]]:
    """After the context, all that a training step touches is as before: weights, gradients, RNG, state, logs, stage.

    Its value is a function that gives the module's state back within the context.
    """
    wrapped = trainer.strategy.model
    sync_buffers(wrapped)  # of other layers, on which the population depends
    user, random = UserState(module), RandomState(module.device)
    state = user.take()
    large = list(large_values(value for values in state for value in values.values()))
    tensors = {f"a large attribute of {type(module).__name__}": one for one in large if isinstance(one, Tensor)}
    contents = [Contents(one) for one in large if not isinstance(one, Tensor)]
    with (
        torch.inference_mode(False),
        # DDP's forward would broadcast buffers, and ranks may have different numbers of batches
        setting([wrapped] if isinstance(wrapped, DistributedDataParallel) else [], require_forward_param_sync=False),
        setting([module], log=mute, log_dict=mute),
        setting([trainer], loggers=_lightning.silent_loggers(trainer)),
        setting([trainer.state], stage=type(trainer.state.stage).TRAINING),
    ):
        weights = KeptWeights(module, contents=not is_sharded(wrapped), others=tensors)
        try:
            user.put(UserState.copy(state, shared=large))
            with weights.backup:
                yield lambda: user.put(UserState.copy(state, shared=large))
        finally:
            user.put(state)
            random.restore()
            for one in contents:
                if one.has_changed():
                    one.put_back()
            warn_written(module, weights.restore())


def warn_written(module: nn.Module, names: Iterable[str]) -> None:
    """Warn of weights that the step has written into, where they belong to layers that it gathers statistics of."""
    layers = [name for name, one in module.named_modules() if isinstance(one, Population)]
    parts = {name.partition(".")[0] for name in [*layers, *batch_norms(module)]}
    moved = [name for name in names if name.partition(".")[0] in parts]
    if moved:
        rank_zero_warn(
            f"training_step writes into {moved[0]} and {len(moved) - 1} other weights, as momentum encoders do; that "
            "was taken back, but the population is that of the weights written. A method "
            f"{STEP}(batch, batch_idx) that only calls the model computes that of the weights validated."
        )


def mute(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log``."""
