"""Populations of a whole model: gathered over batches, frozen and emptied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from lightning_bln._torch import is_packed
from lightning_bln.distributed import in_step, is_distributed
from lightning_bln.population import Population


def populations(model: nn.Module) -> list[Population]:
    """Every population in ``model``."""
    return [module for module in model.modules() if isinstance(module, Population)]


def require_populations(model: nn.Module) -> list[Population]:
    """:func:`populations`; raises ValueError if there is none."""
    found = populations(model)
    if not found:
        raise ValueError(
            f"model={type(model).__name__} has no layer with a population; put a BatchLayerNorm or a recurrent layer "
            "with norm='bln' into it"
        )
    return found


def freeze_population(model: nn.Module) -> None:
    """Freeze the gathered statistics of every layer in ``model`` as its population.

    Raises:
        ValueError: ``model`` has no layer with a population.
        RuntimeError: A layer has gathered nothing; then no layer is frozen.
    """
    found = require_populations(model)
    empty = [
        name for name, module in model.named_modules() if isinstance(module, Population) and not module.is_gathering
    ]
    if empty and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"{empty[0]} has gathered no statistics to freeze; run batches through it in training mode first, or "
            "call recompute_population(model, batches)"
        )
    for population in found:
        population.freeze()


def reset_population(model: nn.Module) -> None:
    """Empty gathered statistics of all layers; frozen ones stay."""
    for population in require_populations(model):
        population.reset()


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Context in which forward passes of ``model`` do nothing but gather statistics, from an empty start.

    All modules are in evaluation mode (no dropout), except for layers with a population, which normalise by the current
    batch. Gradients are off. Afterwards every module has its own mode again, and after an error its population too.
    """
    found = require_populations(model)
    holders = [
        module for module in model.modules() if any(isinstance(child, Population) for child in module.children())
    ]
    before = [dict(population.named_buffers()) for population in found]
    training = {module: module.training for module in model.modules()}  # scripted modules too, unlike ``setting``
    reset_population(model)
    model.eval()
    for holder in holders:
        holder.training = True
    try:
        with torch.no_grad():
            yield
    except BaseException:
        for population, buffers in zip(found, before, strict=True):
            for name, buffer in buffers.items():
                setattr(population, name, buffer)
        raise
    finally:
        for module, mode in training.items():
            module.training = mode


def recompute_population(
    model: nn.Module, batches: Iterable[Any], *, predict: Callable[[Any], Any] | None = None, limit: int | None = None
) -> None:
    """Compute the population of every layer in ``model`` over ``batches``, at its current weights.

    Args:
        model: Module with layers that have a population. It runs without dropout and gradients.
        batches: Training batches as a rule; about 20 suffice.
        predict: Function to call with each batch. By default the model is called with the batch, or with its first
            entry if the batch is a tuple or list.
        limit: Largest number of batches to use.

    Raises:
        ValueError: ``model`` has no layer with a population, or ``batches`` is empty. After this and any other error
            the population is as before.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> layer = BatchLayerNorm(2, scale=False)
        >>> recompute_population(layer, [torch.tensor([[0.0, 4.0], [2.0, 8.0]])])
        >>> layer.population.batch_mean, layer.population.batch_var
        (tensor([[1., 6.]]), tensor([[2., 8.]]))
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}, but at least one batch is needed; pass a positive number or None")
    with gathering(model):
        seen = 0
        for batch in in_step(model, batches if limit is None else islice(batches, limit)):
            if predict is not None:
                predict(batch)
            else:
                model(batch[0] if isinstance(batch, (tuple, list)) and not is_packed(batch) else batch)
            seen += 1
        # one rank may have no batch: its population is merged from the other ranks'
        if not seen and not is_distributed():
            raise ValueError("batches is empty, so there is nothing to compute a population from; pass at least one")
        freeze_population(model)
