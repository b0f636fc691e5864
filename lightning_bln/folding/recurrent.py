"""Recurrent layers of torch whose weights hold the affine maps of the norms inside ours."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.convert.layers import SETTINGS
from lightning_bln.convert.plain_recurrent import PLAIN_CELLS, PLAIN_LAYERS
from lightning_bln.folding.maps import map_of
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrent import Recurrent


def folded(layer: Recurrent | RecurrentCell) -> nn.Module:
    """A recurrent layer, or cell, of torch that evaluates as ``layer`` does, whose norms are affine."""
    is_cell = isinstance(layer, RecurrentCell)
    kind: Any = (PLAIN_CELLS if is_cell else PLAIN_LAYERS)[type(layer.cell)]
    settings = {name: getattr(layer.cell if name == "nonlinearity" else layer, name) for name in SETTINGS[kind]}
    settings["bias"] |= any(isinstance(one, GateNorm) for one in layer.children())
    own = dict(layer.named_parameters(recurse=False))
    like = own["weight_ih" if is_cell else "weight_ih_l0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a dropout that one layer has no use for, as ours did
        made: nn.Module = kind(layer.input_size, layer.hidden_size, **settings, device="meta", dtype=like.dtype)
    made.to_empty(device=like.device)  # nothing is drawn from a random generator
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(value_of(layer, name, own, parameter))
            parameter.requires_grad_(like.requires_grad)
    return made.eval()


def value_of(layer: nn.Module, name: str, own: dict[str, Any], like: Tensor) -> Tensor:
    """A parameter of torch's layer in float64: ours, with the norm of its product."""
    held = own.get(name)
    value = torch.zeros(like.shape, dtype=torch.float64) if held is None else held.detach().cpu().double()
    role = name.removeprefix("weight_").removeprefix("bias_")  # "ih_l0_reverse", say
    norm = getattr(layer, f"norm_{role}", None)
    if norm is None:
        return value
    factor, summand = map_of(norm)
    return value * factor[:, None] if name.startswith("weight") else value + summand
