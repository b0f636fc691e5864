"""Populations of a whole model: gathered over batches, frozen and emptied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bln._checks import check_int
from lightning_bln._scoped import setting
from lightning_bln._torch import MODULE_INTERNALS, is_packed
from lightning_bln.batchnorm import batch_norms, observing
from lightning_bln.distributed import in_step, is_distributed, number_of_ranks
from lightning_bln.joining import collated, owned, reading_items, samples_along, serves_items
from lightning_bln.population import Population
from lightning_bln.together import Together


def populations(model: nn.Module) -> list[Population]:
    """Every population in ``model``."""
    return [module for module in model.modules() if isinstance(module, Population)]


def require_populations(model: nn.Module) -> list[Population]:
    """:func:`populations`; raises ValueError if there is none."""
    found = populations(model)
    if not found:
        mend = (
            "put a BatchLayerNorm, a recurrent layer with norm='bln' or a BatchNorm with running statistics into it"
            if not batch_norms(model)
            else "recompute_population computes the running statistics of its batch norms, unless batchnorm=False"
        )
        raise ValueError(f"model={type(model).__name__} has no layer with a population; {mend}")
    return found


def freeze_population(model: nn.Module) -> None:
    """Freeze the gathered statistics of every layer in ``model`` as its population.

    A layer that has gathered nothing, since nobody called it, stays as it is, with a warning.

    Raises:
        ValueError: ``model`` has no layer with a population.
        RuntimeError: No layer has gathered anything.
    """
    warn_left(freeze_gathered(model))


def freeze_gathered(model: nn.Module, asleep: Collection[nn.Module] | None = None) -> list[str]:
    """:func:`freeze_population` without a warning; return the names of populations that stay as they are.

    Where layers may be ``asleep``, their populations stay and are not named, and it is no error if all do.
    """
    require_populations(model)
    return freeze_named(named_populations(model, asleep), may_be_empty=asleep is not None)


def freeze_named(named: Mapping[str, Population], *, may_be_empty: bool) -> list[str]:
    """Freeze populations and return the names of those that stay as they are, unless that is all of them."""
    if not may_be_empty and not is_distributed() and not any(one.is_gathering for one in named.values()):
        named[next(iter(named))].freeze()  # says what to do
    empty = [name for name, population in named.items() if not population.freeze_gathered()]
    if not may_be_empty and len(empty) == len(named):
        named[empty[0]].freeze()
    return empty


def named_populations(model: nn.Module, asleep: Collection[nn.Module] | None = None) -> dict[str, Population]:
    """Every population in ``model`` by name, but for those of layers that are ``asleep``."""
    out = {id(child) for holder in asleep or () for child in holder.children()}
    named = {name: module for name, module in model.named_modules() if isinstance(module, Population)}
    return {name: population for name, population in named.items() if id(population) not in out}


def holders_of(model: nn.Module) -> list[nn.Module]:
    """Layers in ``model`` that hold a population."""
    return [module for module in model.modules() if any(isinstance(child, Population) for child in module.children())]


def warn_left(names: Sequence[str]) -> None:
    """Warn of populations that nothing was gathered for."""
    if names:
        warnings.warn(
            f"{', '.join(names)} gathered no statistics, since nothing called the layer, and stays as it is",
            stacklevel=3,
        )


def reset_population(model: nn.Module) -> None:
    """Empty gathered statistics of all layers; frozen ones stay."""
    for population in require_populations(model):
        population.reset()


@contextmanager
def gathering(
    model: nn.Module, asleep: Collection[nn.Module] | None = None, *, batchnorm: bool = False
) -> Iterator[dict[str, Population]]:
    """Context in which forward passes of ``model`` do nothing but gather statistics, from an empty start.

    Its value are the populations that gather, by name; with ``batchnorm`` those of torch's batch norms are among them.

    All modules are in evaluation mode (no dropout), except for layers with a population, which normalise by the current
    batch unless they are ``asleep``. Gradients are off. Afterwards every module has its own mode again, and after an
    error its population too. Modes are set as flags: ``train`` and ``eval``, which a module may have of its own, do not
    run.
    """
    out = {id(one) for one in asleep or ()}
    norms = {name: one for name, one in batch_norms(model).items() if batchnorm and id(one) not in out}
    found = populations(model) if norms else require_populations(model)
    before = [dict(population.named_buffers()) for population in found]
    values = [{name: buffer.clone() for name, buffer in buffers.items()} for buffers in before]
    training = {module: module.training for module in model.modules()}  # scripted modules too, unlike ``setting``
    for population in found:
        population.reset()
    for module in training:
        module.training = False
    for holder in holders_of(model):
        holder.training = id(holder) not in out
    try:
        with torch.no_grad(), observing(norms) as others:
            yield named_populations(model, asleep) | others
    except BaseException:
        for population, buffers, kept in zip(found, before, values, strict=True):
            for name, buffer in buffers.items():
                setattr(population, name, buffer)
                buffer.copy_(kept[name])
        raise
    finally:
        for module, mode in training.items():
            module.training = mode


def recompute_population(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    predict: Callable[[Any], Any] | None = None,
    samples: int | None = 1024,
    limit: int | None = None,
    batchnorm: bool = True,
) -> None:
    """Compute the population of every layer in ``model`` at its current weights.

    That of torch's batch norms are their running statistics: mean and unbiased variance over all samples, in place of
    averages of the batches that training has seen. Momentum and ``num_batches_tracked`` stay.

    The samples go through the model together, so that statistics of a step are those of states that the same
    statistics produced; the batch size in the equation stays that of ``batches``. A DataLoader gives its samples to its
    collate function at once, other batches are joined where that leaves each sample as it is. Where they do not join,
    they go one by one, with a warning. Ranks exchange their samples, so that several give what one would.

    Args:
        model: Module with layers that have a population. It runs without dropout and gradients.
        batches: Training batches as a rule.
        predict: Function to call with each batch, such as ``lambda batch: model(**batch)``. By default the model is
            called with the batch, or with its first entry if the batch is a tuple or list. One that carries a state
            from batch to batch needs ``samples=None``.
        samples: Use the first batches that hold as many samples, over all ranks. ``None``: use all batches, one by one.
        limit: Largest number of batches to use, on each rank.
        batchnorm: Whether torch's batch norms are computed anew; else they normalise by the statistics they have.

    Raises:
        ValueError: ``model`` has no layer with a population, ``batches`` is empty, or a batch does not tell what to
            call the model with. After this and any other error the population is as before.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> layer = BatchLayerNorm(2, scale=False)
        >>> recompute_population(layer, [torch.tensor([[0.0, 4.0], [2.0, 8.0]])])
        >>> layer.population.batch_mean, layer.population.batch_var
        (tensor([[1., 6.]]), tensor([[2., 8.]]))
    """
    batches, run, options = prepared(model, batches, predict, joins=samples is not None)
    warn_left(gather_population(model, batches, run, samples=samples, limit=limit, batchnorm=batchnorm, **options))


def prepared(
    model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None, *, joins: bool
) -> tuple[Iterable[Any], Callable[[Any], Any], dict[str, Any]]:
    """Batches, not collated yet if they are to be joined, a function to run each by, and options of a gathering.

    Raises:
        ValueError: ``batches`` is a tensor.
    """
    collate: list[Callable[[list[Any]], Any]] = []
    if joins and isinstance(batches, DataLoader) and serves_items(batches):
        collate, batches = [batches.collate_fn], reading_items(batches, 0)
    if isinstance(batches, Tensor):
        raise ValueError(f"batches is a tensor of shape {tuple(batches.shape)}, not a list of batches; pass [x]")
    if predict is not None:
        return batches, predict, {"collate": collate, "restart": None}
    return batches, partial(call_model, model), {"collate": collate, "restart": state_of(model)}


def gather_population(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    *,
    samples: int | None,
    limit: int | None = None,
    collate: Sequence[Callable[[list[Any]], Any]] = (),
    restart: Callable[[], Any] | None = None,
    wrapped: nn.Module | None = None,
    asleep: Collection[nn.Module] | None = None,
    batchnorm: bool = False,
) -> list[str]:
    """:func:`recompute_population` by a function that runs the model; return the names of populations that it left.

    Args:
        model: Module with layers that have a population.
        batches: Batches, or such of :class:`~lightning_bln.joining.Items`.
        run: Function to call with each batch.
        samples: As there.
        limit: As there.
        collate: Collate functions of the loaders that :class:`~lightning_bln.joining.Items` come from.
        restart: Called before batches that have been run are run again; ``None`` where nothing gives states back.
        wrapped: What contains ``model`` and says whether ranks must run it together, if not ``model`` itself.
        asleep: Layers that keep their population and gather nothing; where given, others may gather nothing, too.
        batchnorm: Whether torch's batch norms are computed, too.
    """
    for name, number in (("samples", samples), ("limit", limit)):
        if number is not None:
            check_int(name, number, 1)
    with gathering(model, asleep, batchnorm=batchnorm) as named:
        batches = islice(batches, limit)
        if samples is not None:
            taken = list(holding(batches, -(-samples // number_of_ranks())))
            together = Together(model, [*named.values()], run, partial(collated, functions=collate), restart)
            if together.gather(taken, samples, map(owned, batches)):
                return freeze_alike(named, may_be_empty=asleep is not None)
            batches = iter(taken)
        seen = 0
        for batch in in_step(model if wrapped is None else wrapped, batches, named.values()):
            run(collated(batch, collate))
            seen += 1
        # one rank may have no batch: its population is merged from the other ranks'
        if not seen and not is_distributed():
            raise ValueError("batches is empty, so there is nothing to compute a population from; pass at least one")
        return freeze_named(named, may_be_empty=asleep is not None)


def freeze_alike(named: Mapping[str, Population], *, may_be_empty: bool) -> list[str]:
    """Freeze statistics that all ranks have gathered alike, up to rounding; as :func:`freeze_named`."""
    with setting(named.values(), is_joint=True):
        left = freeze_named(named, may_be_empty=may_be_empty)
    if is_distributed():
        for population in named.values():
            population.broadcast_frozen()
    return left


def state_of(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model's modules the attributes back that they have now, such as carried states."""
    others = (module for module in model.modules() if not isinstance(module, Population))
    before = [(vars(module), dict(vars(module))) for module in others]

    def restore() -> None:
        for fields, values in before:
            for name in [name for name in fields if name not in values]:
                del fields[name]
            fields.update({name: value for name, value in values.items() if name not in MODULE_INTERNALS})

    return restore


def holding(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """The first batches that hold as many samples."""
    for batch in batches:
        yield owned(batch)
        samples -= samples_along(batch)
        if samples <= 0:
            return


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch as :func:`recompute_population` does by default."""
    entries = batch if isinstance(batch, (tuple, list)) and not is_packed(batch) else None
    call = "model(**batch)" if isinstance(batch, Mapping) else "model(*batch)"
    mend = f"pass predict=, such as predict=lambda batch: {call}"
    if entries is not None and len(entries) > 2 and takes_several(model):
        raise ValueError(
            f"a batch has {len(entries)} entries and {type(model).__name__} takes several, so that it is open which; "
            + mend
        )
    first = batch if entries is None else entries[0]
    try:
        return model(first)
    except (TypeError, AttributeError, KeyError) as error:
        if isinstance(first, Tensor) and (entries is None or len(entries) == 1):
            raise
        what = type(batch).__name__ if entries is None else f"the first of {len(entries)} entries"
        raise ValueError(f"the model cannot be called with {what} ({error}); {mend}") from error


def takes_several(model: nn.Module) -> bool:
    """Whether a model's forward takes more than one argument."""
    kinds = [one.kind for one in signature(model.forward).parameters.values()]
    positional = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return positional > 1 or Parameter.VAR_POSITIONAL in kinds
