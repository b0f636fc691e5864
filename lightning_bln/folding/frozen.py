"""Recurrent layers and cells whose norms are given maps, for cells, steps and norms that torch has no layer for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.folding.maps import map_of
from lightning_bln.folding.script import ScriptedCell, ScriptedLayer
from lightning_bln.functional import scale_factor
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrent import Recurrent


class FrozenRecurrent(Recurrent):
    r"""A recurrent layer whose norms are affine maps of each step, made by :func:`~lightning_bln.fold`.

    .. math::
        N_t(a) = w \, (a - \mu_t) / \sqrt{v_t} + b

    It is called as the layer was, ``start=`` too, and has no population and no statistics mode. It exports, runs on the
    compiled kernels, and ``torch.jit.script`` takes it with any number of steps and samples; there is no ``start=``
    in a script, and cells of three states or more take and give a list of them.

    Example:
        >>> from lightning_bln import BLNLSTM, fold, recompute_population, set_mode
        >>> layer = BLNLSTM(4, 8)
        >>> recompute_population(layer, [torch.randn(10, 16, 4)])
        >>> set_mode(layer, "pppp")
        >>> frozen = fold(layer)
        >>> type(frozen).__name__
        'FrozenRecurrent'
        >>> x = torch.randn(10, 2, 4)
        >>> torch.allclose(torch.jit.script(frozen)(x)[0], layer.eval()(x)[0], atol=1e-5)
        True
    """

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedLayer.of(self)


class FrozenCell(RecurrentCell):
    """One step of a cell whose norms are affine maps, made by :func:`~lightning_bln.fold`: :class:`FrozenRecurrent`.

    Example:
        >>> from lightning_bln import fold
        >>> from lightning_bln.cells import RecurrentCell
        >>> type(fold(RecurrentCell("mgu", 4, 8, norm=None))).__name__
        'FrozenCell'
    """

    def __prepare_scriptable__(self) -> nn.Module:
        return ScriptedCell.of(self)


def frozen(layer: Recurrent | RecurrentCell) -> nn.Module:
    """A layer, or cell, that evaluates as ``layer`` does, whose norms are affine; it shares the parameters."""
    made: Any = deepcopy(layer, {id(one): one for one in layer.parameters()})
    made.__class__ = FrozenCell if isinstance(layer, RecurrentCell) else FrozenRecurrent
    for name, norm in layer.named_children():
        if isinstance(norm, GateNorm):
            setattr(made, name, frozen_norm(norm))
    return made.eval()


def frozen_norm(norm: GateNorm) -> FrozenNorm:
    """The maps of a norm at the steps that its population knows."""
    like = norm.weight
    assert like is not None
    unit = deepcopy(norm)  # factors are positive without weight and scale
    unit.weight, unit.bias, unit.scale = nn.Parameter(torch.ones_like(like)), None, 1.0
    factor, summand = map_of(unit)
    shape = norm.steps_known, norm.gates, -1
    weight = scale_factor(norm.scale, norm.num_features) * like.detach().double()
    bias = None if norm.bias is None else norm.bias.detach().clone()

    def placed(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(like.device, dtype)

    kept = norm.population.batch_mean.dtype
    mean, var = (-summand / factor).view(shape), factor.pow(-2).view(shape)
    return FrozenNorm(placed(weight, like.dtype), bias, placed(mean, kept), placed(var, kept))
