"""A trained model as a copy in plain torch modules, wherever its statistics mode makes a norm affine."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln._torch import BatchNorm, has_hooks, own_buffers, own_parameters
from lightning_bln.convert.layers import BATCH_NORMS, base_of
from lightning_bln.convert.origin import origin_of
from lightning_bln.convert.places import places, refuse_wrapped, replace
from lightning_bln.convert.report import Conversion, ConversionReport, log, of
from lightning_bln.folding.affine import Affine
from lightning_bln.folding.blocks import plain_blocks
from lightning_bln.folding.flow import BLOCKS, Flow
from lightning_bln.folding.maps import map_of
from lightning_bln.folding.reasons import LAYERS, reasons_of_norm, reasons_of_recurrent, reasons_of_torchs
from lightning_bln.folding.recurrent import folded
from lightning_bln.folding.weights import (
    axis_note,
    bake,
    inputs_of,
    outputs_of,
    pads_zeros,
    spatial_axes,
    take_in_before,
    take_in_behind,
)
from lightning_bln.modes import is_outdated
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrent import Recurrent
from lightning_bln.sweep.result import SweepResult

FORWARDS = (Normalization.forward, Recurrent.forward, RecurrentCell.forward)

OUTDATED = "its population is older than its weights"


@overload
def fold(model: nn.Module, *, report: Literal[False] = ..., result: SweepResult | None = ...) -> nn.Module: ...


@overload
def fold(
    model: nn.Module, *, report: Literal[True], result: SweepResult | None = ...
) -> tuple[nn.Module, ConversionReport]: ...


def fold(
    model: nn.Module, *, report: bool = False, result: SweepResult | None = None
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    r"""Copy ``model`` for evaluation, with torch's own modules wherever every statistic comes from a population.

    There a norm is an affine map of each feature, :math:`N(x) = a x + b`, and

    .. math::
        N(W x + c) = (\mathrm{diag}(a) W) x + (a c + b)

    is a linear layer. So it is for BLN in mode ``pppp``, ``norm="batch"`` in ``pp**``, ``norm="layer"`` in ``**pp``,
    with one set of statistics for all positions, and for torch's BatchNorm. The map goes into the linear layer or
    convolution that the norm follows, or precedes where that is exact; elsewhere the norm becomes an
    :class:`~lightning_bln.folding.Affine`. LSTM, GRU and RNN with such norms, one set of statistics for all time steps
    and none on the cell state become torch's. All else stays as it is, and the report says why.

    Args:
        model: Module, which stays as it is. Its copy is in evaluation mode, and meant for that alone.
        report: Whether to return a report as well. In any case the logger ``lightning_bln.convert`` gets it at level
            INFO, and what was left alone at level WARNING.
        result: Scores of modes, by which the report says what a mode would cost that folds.

    Returns:
        The copy; with ``report`` also a :class:`~lightning_bln.convert.ConversionReport`.

    Raises:
        ValueError: A part is wrapped for DDP, or a lazy layer has seen no input yet.

    Example:
        >>> from lightning_bln import BatchLayerNorm, recompute_population, set_mode
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchLayerNorm(8), nn.ReLU())
        >>> recompute_population(model, [torch.randn(32, 4)])
        >>> set_mode(model, "pppp")
        >>> plain, found = fold(model, report=True)
        >>> print(found)
        1: BatchLayerNorm -> Identity (in the weights of the Linear before it)
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(plain(x), model.eval()(x), atol=1e-6)
        True
    """
    refuse(model)
    with torch.inference_mode(False), torch.no_grad():
        copy = deepcopy(model).eval()
        folding = Folding(copy, result)
        entries, remarks = folding.layers(), folding.remarks()
        copy = replace(folding.every, folding.made)
        copy, blocks = plain_blocks(copy)
    found = ConversionReport((*entries, *blocks, *remarks))
    log("fold", found)
    return (copy.eval(), found) if report else copy.eval()


def refuse(model: nn.Module) -> None:
    """Raise where a model cannot be copied as it should be."""
    for place in places(model, lambda module: False):
        refuse_wrapped(place)
        own = (*own_parameters(place.module).values(), *own_buffers(place.module).values())
        if any(one is not None and is_lazy(one) for one in own):
            raise ValueError(
                f"{place.path or 'model'} is a {type(place.module).__name__} that has seen no input yet; run a batch "
                "through the model first"
            )


class Outcome(NamedTuple):
    """The replacement of a layer, ``None`` if it stays, and sentences about it."""

    layer: nn.Module | None
    notes: list[str]


class Folding:
    """Replacements of layers of a model, whose linear layers and convolutions are changed in place.

    Args:
        model: A copy that may be changed.
        result: Scores of modes.
    """

    def __init__(self, model: nn.Module, result: SweepResult | None) -> None:
        self.model, self.result = model, result
        self.every = [*places(model, lambda module: isinstance(module, LAYERS))]
        self.flow = Flow.of(model)
        self.made: dict[nn.Module, nn.Module] = {}
        owners: dict[Any, int] = {}
        for module in model.modules():
            for parameter in own_parameters(module).values():
                owners[parameter] = owners.get(parameter, 0) + 1
        self.tied = {parameter for parameter, count in owners.items() if count > 1 and parameter is not None}

    def layers(self) -> list[Conversion]:
        """Fold each layer, and report on it."""
        entries = []
        for module in dict.fromkeys(place.module for place in self.every if isinstance(place.module, LAYERS)):
            kind = type_before_parametrizations(module)
            layer, notes = self.outcome(module)
            if layer is not None:
                self.made[module] = layer
            entries.append(of(self.names(module), kind, None if layer is None else type(layer), notes, []))
        return entries

    def outcome(self, module: Any) -> Outcome:
        """The outcome for one layer."""
        if reasons := self.reasons(module):
            return Outcome(None, reasons)
        outdated = [OUTDATED] if any(is_outdated(one) for one in module.modules()) else []
        for one in module.modules():
            bake(one)
        if isinstance(module, (Recurrent, RecurrentCell)):
            return Outcome(folded(module), outdated)
        layer, notes = self.place_map(module)
        return Outcome(layer, notes + outdated)

    def reasons(self, module: Any) -> list[str]:
        """Reasons why a layer stays."""
        is_ours = isinstance(module, (Normalization, Recurrent, RecurrentCell))
        kind: Any = type_before_parametrizations(module)
        is_own = "forward" in vars(module) or (kind.forward not in FORWARDS if is_ours else False)
        if is_own or (isinstance(module, BatchNorm) and base_of(module) not in BATCH_NORMS):
            return ["it has a forward of its own"]
        if isinstance(module, Normalization):
            found = reasons_of_norm(module, self.result)
        elif is_ours:
            found = reasons_of_recurrent(module, self.result)
        else:
            found = reasons_of_torchs(module)
        if not found and any(map(has_hooks, module.modules())):
            found = ["it has hooks, which a plain layer would not run"]
        if not found and (extra := self.extra(module)):
            found = [f"it is called with {' and '.join(sorted(extra))}, which no plain layer takes"]
        if not found and isinstance(module, (Recurrent, RecurrentCell)) and self.is_tied(module):
            found = ["its parameters are tied to others"]
        return found

    def extra(self, module: nn.Module) -> set[str]:
        """Further arguments that a layer, or the convolution block that it is part of, is called with."""
        if isinstance(module, (Recurrent, RecurrentCell)):
            return self.flow.extra[module] - {"input", "hx", "argument 2"}
        parents = [place.parent for place in self.every if place.module is module and isinstance(place.parent, BLOCKS)]
        given = [self.flow.extra[one] for one in (module, *parents) if one is not None]
        return {"a mask"} if any(given) and isinstance(module, Normalization) else set().union(*given)

    def place_map(self, norm: Any) -> Outcome:
        """Put the map of a norm into a layer before it, behind it, or by itself."""
        found, axis = map_of(norm), channel_dim(norm)
        before, behind = self.flow.feeder(norm), self.flow.fed(norm)
        obstacle = None
        if before is not None and spatial_axes(before) is not None:
            note = axis_note(before, axis) if outputs_of(before) == norm.num_features else None
            obstacle = self.obstacle(before, note, norm)
            if obstacle is None:
                bake(before)
                take_in_behind(before, found)
                return self.passed(norm, f"in the weights of the {type(before).__name__} before it", note)
        if behind is not None and spatial_axes(behind) is not None and not pads_zeros(behind):
            note = axis_note(behind, axis) if inputs_of(behind) == norm.num_features else None
            hindrance = self.obstacle(behind, note, norm)
            if hindrance is None:
                bake(behind)
                take_in_before(behind, found)
                return self.passed(norm, f"in the weights of the {type(behind).__name__} behind it", note)
            obstacle = obstacle or hindrance
        like = next((one for one in (*norm.parameters(), *norm.buffers()) if one.is_floating_point()), None)
        assert like is not None
        # as a population, no narrower than float32
        to = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        return Outcome(Affine(found.factor.to(**to), found.summand.to(**to), axis), [obstacle] if obstacle else [])

    def passed(self, norm: nn.Module, place: str, note: str | None) -> Outcome:
        """The outcome for a norm that now gives its input back."""
        self.flow.pass_over(norm)
        return Outcome(nn.Identity(), [place, note] if note else [place])

    def obstacle(self, layer: nn.Module, note: str | None, norm: Any) -> str | None:
        """The reason why a linear layer does not take a map in."""
        name = type_before_parametrizations(layer).__name__
        origin = origin_of(norm)
        kind = type(norm) if origin is None else origin.kind
        is_spatial = spatial_axes(layer) == 0 and kind in (nn.BatchNorm2d, nn.BatchNorm3d)
        if note is None or is_spatial:
            return f"its feature axis is not that of the {name} beside it"
        if has_hooks(layer):
            return f"the {name} beside it has hooks"
        if self.is_tied(layer):
            return f"the {name} beside it has tied parameters"
        if layer in self.flow.read:
            return f"something else reads the weights of the {name} beside it"
        return None

    def is_tied(self, module: nn.Module) -> bool:
        """Whether a parameter has several owners."""
        return any(parameter in self.tied for parameter in module.parameters())

    def remarks(self) -> list[Conversion]:
        """Reports on modules that could be traced in part, or not."""
        entries, inside = [], set[nn.Module]()
        for module, error in self.flow.untraced.items():
            if module not in inside and any(isinstance(one, LAYERS) for one in module.modules()):
                note = f"cannot be traced, so that norms fold within its parts alone: {error}"
                entries.append(of(self.names(module), type(module), type(module), [note], []))
            inside |= set(module.modules())
        for module in self.flow.by_default:
            note = "traced as called without its optional arguments"
            entries.append(of(self.names(module), type(module), type(module), [note], []))
        return entries

    def names(self, module: nn.Module) -> list[str]:
        """Paths of a module."""
        return [place.path for place in self.every if place.module is module]


def channel_dim(norm: Any) -> int:
    """The feature axis of a norm."""
    return norm.channel_dim if isinstance(norm, Normalization) else 1
