"""Convolution blocks whose norm has become plain, as Sequentials."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_bln._torch import has_hooks
from lightning_bln.convert.places import places, replace
from lightning_bln.convert.report import Conversion, of
from lightning_bln.folding.affine import Affine
from lightning_bln.folding.flow import BLOCKS, is_block
from lightning_bln.folding.reasons import LAYERS

ACTIVATIONS: dict[Any, type[nn.Module]] = {
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    torch.relu: nn.ReLU,
    F.relu: nn.ReLU,
    torch.sigmoid: nn.Sigmoid,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
}
"""Modules in place of functions."""


def plain_blocks(model: nn.Module) -> tuple[nn.Module, list[Conversion]]:
    """Put a Sequential in place of each convolution block whose norm has become plain."""
    every = [*places(model, lambda module: isinstance(module, LAYERS))]
    made: dict[nn.Module, nn.Module] = {}
    entries = []
    for block in dict.fromkeys(place.module for place in every if isinstance(place.module, BLOCKS)):
        if not is_block(block) or not isinstance(block.norm, (nn.Identity, Affine)):
            continue
        names, notes = [place.path for place in every if place.module is block], []
        sequence = None
        if has_hooks(block):
            notes = ["it has hooks, which a Sequential would not run"]
        elif (activation := activation_of(block)) is None:
            notes = ["its activation is a function, which torch has no module for"]
        else:
            parts = {"conv": block.conv, "activation": activation, "norm": block.norm}
            chain = ("conv", "activation", "norm") if block.order == "conv-act-norm" else ("conv", "norm", "activation")
            sequence = made[block] = nn.Sequential(OrderedDict((name, parts[name]) for name in chain))
        entries.append(of(names, type(block), None if sequence is None else nn.Sequential, notes, []))
    return replace(every, made), entries


def activation_of(block: Any) -> nn.Module | None:
    """A block's activation as a module."""
    activation = block.activation
    if isinstance(activation, nn.Module):
        return activation
    kind = ACTIVATIONS.get(activation)
    return None if kind is None else kind()
