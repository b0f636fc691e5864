"""The end of a validation, run once for each mode, without a trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_bln._torch import own_buffers, own_modules, own_parameters


@contextmanager
def undone(trainer: Any, module: Any) -> Iterator[None]:
    """After the context, what an ``on_validation_epoch_end`` may do to training is undone.

    That is: steps of schedulers, changes of optimizers' groups and of which state they hold, ``trainer.should_stop``,
    and which modules, parameters and buffers the module has.
    """
    optimizers = list(trainer.optimizers)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    held = [(fields, kept(fields)) for fields in (scheduler.__dict__ for scheduler in schedulers)]
    held += [(group, kept(group)) for optimizer in optimizers for group in optimizer.param_groups]
    held += [(optimizer.state, dict(optimizer.state)) for optimizer in optimizers]
    held += [(state, kept(state)) for optimizer in optimizers for state in optimizer.state.values()]
    for part in module.modules():
        held += [(fields(part), dict(fields(part))) for fields in (own_modules, own_parameters, own_buffers)]
    should_stop = trainer.should_stop
    try:
        yield
    finally:
        trainer.should_stop = should_stop
        for fields, values in held:
            if list(fields) != list(values) or any(fields[name] is not value for name, value in values.items()):
                fields.clear()
                fields.update(values)


def kept(fields: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of ``fields``, lists and small tensors copied, since they may be written into."""
    return {name: copied(value) for name, value in fields.items()}


def copied(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.clone()
    return list(value) if type(value) is list else dict(value) if type(value) is dict else value
