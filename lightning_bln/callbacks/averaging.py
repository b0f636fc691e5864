"""Weight averaging without populations: a population belongs to the weights it was computed at and has no average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_bln._scoped import setting
from lightning_bln._torch import EXTRA_STATE, without_buffers
from lightning_bln.callbacks import _lightning
from lightning_bln.modes import HasMode
from lightning_bln.population import Population
from lightning_bln.recomputation import populations


def exclude_populations(callback: Any, module: nn.Module) -> None:
    """Let a ``WeightAveraging`` callback average and exchange everything in ``module`` except populations.

    It pairs buffers by position and copies one into the other. The shapes of populations may differ, since they grow
    with the data, and their counts would be averaged like weights.
    """
    averaged = _lightning.averaged_model(callback)
    if not isinstance(averaged, AveragedModel):
        return
    averaged.update_parameters = without_populations(averaged.update_parameters, averaged, module)  # type: ignore
    for name in _lightning.SWAPS:
        method = getattr(type(callback), name).__get__(callback)
        setattr(callback, name, without_populations(method, averaged, module))


@contextmanager
def saving_average(callbacks: Iterable[Any], module: nn.Module) -> Iterator[None]:
    """Within the context, weights-only checkpoints hold the averaged weights, if there are any, as full ones do.

    For a weights-only checkpoint the Trainer calls no callback, so that the weights in training would be saved, which
    nobody validated, beside the average's population and mode. It does call the module.
    """
    averaging = [callback for callback in callbacks if isinstance(_lightning.averaged_model(callback), AveragedModel)]
    if not averaging:
        yield
        return
    own: Any = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        if "callbacks" not in checkpoint:
            average = _lightning.averaged_model(averaging[-1]).module.state_dict()
            checkpoint["state_dict"].update({key: average[key] for key in checkpoint["state_dict"] if key in average})
            write_statistics(module, checkpoint["state_dict"])
        own(checkpoint)

    with setting([module], on_save_checkpoint=on_save_checkpoint):
        yield


@contextmanager
def saving_statistics(module: nn.Module, refresh: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within the context, ``refresh`` runs before a checkpoint is complete, which then holds the populations of now.

    The Trainer calls the module for checkpoints of all kinds, but callbacks for none with weights alone.
    """
    own: Any = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        refresh(checkpoint)
        write_statistics(module, checkpoint["state_dict"])
        own(checkpoint)

    with setting([module], on_save_checkpoint=on_save_checkpoint):
        yield


@contextmanager
def averaged(callbacks: Iterable[Any], module: nn.Module) -> Iterator[None]:
    """Within the context ``module`` has the averaged weights that a checkpoint holds, if there are any."""
    averaging = [callback for callback in callbacks if isinstance(_lightning.averaged_model(callback), AveragedModel)]
    for callback in averaging:
        _lightning.swap_average(callback, module)
    try:
        yield
    finally:
        for callback in averaging[::-1]:
            _lightning.swap_average(callback, module)


def write_statistics(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Write the modes and populations of ``module`` into a state dict whose weights may be an average's."""
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        entries: dict[str, Tensor] = {}
        if isinstance(part, HasMode):
            entries[EXTRA_STATE] = part.get_extra_state()
        if isinstance(part, Population):
            entries |= dict(part.named_buffers(recurse=False))
        state_dict.update({prefix + key: value for key, value in entries.items() if prefix + key in state_dict})


def without_populations(function: Callable, *models: nn.Module) -> Callable:
    """``function``, during which the populations of ``models`` have no buffers."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with without_buffers(population for model in models for population in populations(model)):
            return function(*args, **kwargs)

    return wrapped


def population_buffers(module: Any) -> list[str]:
    """Names of the buffers that hold a model's populations."""
    return [
        f"{name}.{buffer}".lstrip(".")
        for name, one in module.named_modules()
        if isinstance(one, Population)
        for buffer, _ in one.named_buffers()
    ]
