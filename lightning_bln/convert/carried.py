"""Everything of a layer that its counterpart takes over: parameters, parametrizations, hooks, attributes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_bln._torch import (
    MODULE_INTERNALS,
    carry_hooks,
    is_persistent,
    own_buffers,
    own_modules,
    own_parameters,
)

RUNNING = frozenset(("running_mean", "running_var", "num_batches_tracked"))
"""Buffers of a BatchNorm, in place of which a population stands."""


def carry(source: nn.Module, target: nn.Module, known: frozenset[str], *, shared: bool) -> list[str]:
    """Give ``target`` all that ``source`` holds besides its settings.

    Args:
        source: A layer.
        target: Its counterpart, whose parameters have the same names.
        known: Attributes and children that every layer of that kind has.
        shared: Whether ``target`` replaces ``source`` and takes its very parameters, buffers and hooks, so that tied
            parameters stay tied; otherwise it gets copies.

    Returns:
        A sentence on each thing that ``target`` cannot take.
    """
    target.train(source.training)
    memo: dict[int, Any] = {}

    def given(value: Any) -> Any:
        return value if shared else deepcopy(value, memo)

    lost = carry_parameters(source, target, known, given)
    carry_hooks(source, target, shared=shared)
    for name, value in vars(source).items():
        is_own = name not in MODULE_INTERNALS and name not in known
        if not is_own or (isinstance(value, Tensor) and name in vars(target)):  # the latter is a parameter's place
            continue
        if name == "forward" or hasattr(target, name):
            lost.append(f"attribute {name!r}, since its counterpart has another of that name")
        else:
            setattr(target, name, value)
    return lost


def carry_parameters(source: nn.Module, target: nn.Module, known: frozenset[str], given: Any) -> list[str]:
    """Give ``target`` parameters, buffers and submodules, also those that take a parameter's place."""
    lost = []
    for name in [*own_parameters(target)]:
        held = vars(source).get(name)
        if isinstance(held, Tensor):  # a hook computes it before each forward, as the older weight_norm and pruning do
            delattr(target, name)
            setattr(target, name, held.detach().clone())
    for name, parameter in own_parameters(source).items():
        if name in own_parameters(target) or not hasattr(target, name):
            target.register_parameter(name, given(parameter))
        elif parameter is not None:
            lost.append(f"parameter {name!r}, since its counterpart has another attribute of that name")
    for name, buffer in own_buffers(source).items():
        if name not in RUNNING:
            target.register_buffer(name, given(buffer), persistent=is_persistent(source, name))
    for name, child in own_modules(source).items():
        if name != "parametrizations" and name not in known:
            target.add_module(name, given(child))
    if parametrize.is_parametrized(source):
        chains = source.parametrizations
        assert isinstance(chains, nn.ModuleDict)
        for name, chain in chains.items():
            if own_parameters(target).get(name) is None:
                lost.append(f"the parametrization of {name!r}, which its counterpart does not have")
                continue
            # makes the attribute a property that reads the chain, which is then the source's own, its state untouched
            parametrize.register_parametrization(target, name, nn.Identity(), unsafe=True)
            assert isinstance(target.parametrizations, nn.ModuleDict)
            target.parametrizations[name] = given(chain)
    return lost
