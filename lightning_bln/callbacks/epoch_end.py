"""The end of a validation, run once for each mode, without a trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import own_buffers, own_modules, own_parameters
from lightning_bln.callbacks.user_state import UNSEARCHED


@contextmanager
def undone(trainer: Any, module: Any) -> Iterator[None]:
    """After the context, what an ``on_validation_epoch_end`` may do to training is undone.

    That is: steps of schedulers, changes of optimizers' groups and of which state they hold, ``trainer.should_stop``,
    state of schedulers and the like that the module holds itself, and which modules, parameters and buffers it has.
    """
    optimizers = list(trainer.optimizers)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    helpers = [one for one in held_by(module) if not any(one is known for known in schedulers + optimizers)]
    saved = [(one, deepcopy(one.state_dict())) for one in helpers]
    held = [(fields, kept(fields)) for fields in (scheduler.__dict__ for scheduler in schedulers)]
    held += [(group, kept(group)) for optimizer in optimizers for group in optimizer.param_groups]
    held += [(optimizer.state, dict(optimizer.state)) for optimizer in optimizers]
    held += [(state, kept(state)) for optimizer in optimizers for state in optimizer.state.values()]
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            continue
        held += [(fields(part), dict(fields(part))) for fields in (own_modules, own_parameters, own_buffers)]
    should_stop = trainer.should_stop
    try:
        yield
    finally:
        trainer.should_stop = should_stop
        for helper, state in saved:
            helper.load_state_dict(state)
        for fields, values in held:
            if list(fields) != list(values) or any(fields[name] is not value for name, value in values.items()):
                fields.clear()
                fields.update(values)


def has_state_dict(value: Any) -> bool:
    names = "state_dict", "load_state_dict"
    return all(callable(getattr(value, name, None)) for name in names)


def held_by(module: Any) -> list[Any]:
    """Schedulers, scalers and other objects with a state dict among the attributes of ``module``, and in containers."""

    def found(value: Any, depth: int) -> Iterator[Any]:
        if isinstance(value, (list, tuple, dict)) and depth:
            for one in value.values() if isinstance(value, dict) else value:
                yield from found(one, depth - 1)
        elif not isinstance(value, (type, torch.nn.Module, torch.optim.Optimizer)) and has_state_dict(value):
            yield value

    fields = {name: value for name, value in vars(module).items() if name not in UNSEARCHED}
    return list({id(one): one for value in fields.values() for one in found(value, 2)}.values())


def kept(fields: dict[Any, Any]) -> dict[Any, Any]:
    """The entries of ``fields``, lists and small tensors copied, since they may be written into."""
    return {name: copied(value) for name, value in fields.items()}


def copied(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.clone()
    return list(value) if type(value) is list else dict(value) if type(value) is dict else value
