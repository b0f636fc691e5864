"""Statistics beside averaged weights: a population belongs to the weights it was computed at and has no average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_bln.callbacks import _lightning
from lightning_bln.modes import HasMode
from lightning_bln.population import Population, populations


def keep_apart(callback: Any, module: nn.Module) -> None:
    """Let a ``WeightAveraging`` callback average and exchange everything in ``module`` except populations.

    It pairs buffers by position and copies one into the other: populations grow with the data, so the shapes may
    differ, and counts would be averaged as if they were weights.
    """
    averaged = _lightning.averaged_model(callback)
    if not isinstance(averaged, AveragedModel):
        return
    averaged.update_parameters = without_populations(averaged.update_parameters, averaged, module)  # type: ignore
    for name in _lightning.SWAPS:
        method = getattr(type(callback), name).__get__(callback)
        setattr(callback, name, without_populations(method, averaged, module))


@contextmanager
def save_average_alone(callbacks: Iterable[Any], module: nn.Module) -> Iterator[None]:
    """Within the context checkpoints of weights alone hold the average's, if there is one, as full ones do.

    The Trainer asks no callback about them: they would hold the weights still in training, which nobody validated,
    beside the average's population and mode. It does ask the module.
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

    module.__dict__["on_save_checkpoint"] = on_save_checkpoint
    try:
        yield
    finally:
        module.__dict__.pop("on_save_checkpoint", None)


def write_statistics(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Put the modes and populations of ``module`` into a checkpoint whose weights may be an average's."""
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        entries: dict[str, Tensor] = {}
        if isinstance(part, HasMode):
            entries["_extra_state"] = part.get_extra_state()
        if isinstance(part, Population):
            entries |= dict(part.named_buffers(recurse=False))
        state_dict.update({prefix + key: value for key, value in entries.items() if prefix + key in state_dict})


def without_populations(function: Callable, *models: nn.Module) -> Callable:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with hidden_populations(*models):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def hidden_populations(*models: nn.Module) -> Iterator[None]:
    found = [population for model in models for population in populations(model)]
    buffers = [population._buffers for population in found]
    for population in found:
        population._buffers = {}
    try:
        yield
    finally:
        for population, own in zip(found, buffers, strict=True):
            population._buffers = own
