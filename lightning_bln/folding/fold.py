"""A trained model as a copy in plain torch modules, wherever its statistics mode makes a norm affine."""

from __future__ import annotations

from collections.abc import Mapping
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
from lightning_bln.folding.example import Example
from lightning_bln.folding.flow import BLOCKS, Flow
from lightning_bln.folding.frozen import frozen
from lightning_bln.folding.maps import map_of
from lightning_bln.folding.reasons import (
    LAYERS,
    names_of_its_own,
    reasons_against_torchs,
    reasons_of_norm,
    reasons_of_recurrent,
    reasons_of_torchs,
)
from lightning_bln.folding.recurrent import folded
from lightning_bln.folding.weights import SIDES, Side, bake, is_same_axis, spatial_axes
from lightning_bln.modes import is_outdated
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrent import Recurrent
from lightning_bln.sweep.result import SweepResult

FORWARDS = (Normalization.forward, Recurrent.forward, RecurrentCell.forward)

OUTDATED = "its population is older than its weights"

AS_SEEN = "for inputs of as many axes as the example's"

TAKES: dict[type[nn.Module], set[int]] = {nn.BatchNorm1d: {2, 3}, nn.BatchNorm2d: {4}, nn.BatchNorm3d: {5}}
"""Numbers of axes that norms of torch take; others take any."""


@overload
def fold(
    model: nn.Module, *, report: Literal[False] = ..., result: SweepResult | None = ..., example: Any = ...
) -> nn.Module: ...


@overload
def fold(
    model: nn.Module, *, report: Literal[True], result: SweepResult | None = ..., example: Any = ...
) -> tuple[nn.Module, ConversionReport]: ...


def fold(
    model: nn.Module, *, report: bool = False, result: SweepResult | None = None, example: Any = None
) -> nn.Module | tuple[nn.Module, ConversionReport]:
    r"""Copy ``model`` for evaluation, with torch's own modules wherever every statistic comes from a population.

    There a norm is an affine map of each feature, :math:`N(x) = a x + b`, and

    .. math::
        N(W x + c) = (\mathrm{diag}(a) W) x + (a c + b)

    is a linear layer. So it is for BLN in mode ``pppp``, ``norm="batch"`` in ``pp**``, ``norm="layer"`` in ``**pp``,
    with one set of statistics for all positions, and for torch's BatchNorm. The map goes into the linear layer or
    convolution that the norm follows, or precedes where that is exact; elsewhere the norm becomes an
    :class:`~lightning_bln.folding.Affine`. LSTM, GRU and RNN with such norms, one set of statistics for all time steps
    and none on the cell state become torch's; other recurrent layers with such norms a
    :class:`~lightning_bln.folding.FrozenRecurrent`. All else stays as it is, and the report says why.

    Args:
        model: Module, which stays as it is. Its copy is in evaluation mode, and meant for that alone.
        report: Whether to return a report as well. In any case the logger ``lightning_bln.convert`` gets it at level
            INFO, and what was left alone at level WARNING.
        result: Scores of modes, by which the report says what a mode would cost that folds.
        example: An input to run copies of the model on, before and after: a tuple is taken for positional arguments, a
            dict for arguments by name, all else for the one argument. It shows how many axes values have, by which
            norms on axis 1 go into linear layers beside them, and that the folded model gives the same outputs. The
            copy is meant for inputs of as many axes.

    Returns:
        The copy; with ``report`` also a :class:`~lightning_bln.convert.ConversionReport`.

    Raises:
        ValueError: A part is wrapped for DDP, a lazy layer has seen no input yet, or the folded model gives other
            outputs for ``example`` than the model, past rounding.

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

        Of a norm on axis 1, as torch's BatchNorm1d is, an example says whether that is the axis of features:

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> fold(model)[1], fold(model, example=torch.randn(2, 4))[1]
        (Affine(8, channel_dim=1), Identity())
    """
    if result is not None and not isinstance(result, SweepResult):
        raise TypeError(f"result is a {type(result).__name__}, but a SweepResult is needed; pass callback.result")
    refuse(model)
    with torch.inference_mode(False), torch.no_grad():
        copy = deepcopy(model).eval()
        run = None if example is None else Example(copy, example)
        folding = Folding(copy, result, {} if run is None else run.axes)
        entries, remarks = folding.layers(), folding.remarks()
        copy = replace(folding.every, folding.made)
        copy, blocks = plain_blocks(copy)
        copy.eval()
        if run is not None:
            run.check(copy)
    found = ConversionReport((*entries, *blocks, *remarks))
    log("fold", found)
    return (copy, found) if report else copy


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
        seen: For norms the numbers of axes of their inputs in an example.
    """

    def __init__(self, model: nn.Module, result: SweepResult | None, seen: Mapping[nn.Module, set[int]]) -> None:
        self.model, self.result, self.seen = model, result, seen
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
            others = reasons_against_torchs(module) + self.further(module)
            is_open = not others and any(module in {*one.modules()} for one in self.flow.untraced)
            taken = ["taken to be called without start= and stream()"] if is_open else []
            return Outcome(frozen(module) if others else folded(module), others + taken + outdated)
        layer, notes = self.place_map(module)
        return Outcome(layer, notes + outdated)

    def reasons(self, module: Any) -> list[str]:
        """Reasons why a layer stays."""
        is_ours = isinstance(module, (Normalization, Recurrent, RecurrentCell))
        kind: Any = type_before_parametrizations(module)
        is_own = "forward" in vars(module) or (kind.forward not in FORWARDS if is_ours else False)
        if is_own or (isinstance(module, BatchNorm) and base_of(module) not in BATCH_NORMS):
            return ["it has a forward of its own"]
        if is_ours and (own := names_of_its_own(kind)):
            return [f"{kind.__name__} has {', '.join(own)} of its own, which another class would not have"]
        if isinstance(module, Normalization):
            found = reasons_of_norm(module, self.result)
        elif is_ours:
            found = reasons_of_recurrent(module, self.result)
        else:
            found = reasons_of_torchs(module)
        if not found and any(map(has_hooks, module.modules())):
            found = ["it has hooks, which a plain layer would not run"]
        return found if found or isinstance(module, (Recurrent, RecurrentCell)) else self.further(module)

    def further(self, module: nn.Module) -> list[str]:
        """Reasons against a plain layer that lie in how the model uses one."""
        extra, found = self.extra(module), []
        if extra:
            found.append(f"it is called with {' and '.join(sorted(extra))}, which no plain layer takes")
        if isinstance(module, (Recurrent, RecurrentCell)) and self.is_tied(module):
            found.append("its parameters are tied to others")
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
        obstacles = []
        for side, layer in zip(SIDES, (self.flow.feeder(norm), self.flow.fed(norm)), strict=True):
            if layer is None or spatial_axes(layer) is None or side.is_inexact(layer):
                continue
            obstacle = self.obstacle(layer, side, norm)
            if obstacle is None:
                bake(layer)
                side.take_in(layer, found)
                self.flow.pass_over(norm)
                place = f"in the weights of the {type(layer).__name__} {side.word} it"
                rests = axis > 0 and not spatial_axes(layer) and None in self.flow.axes.get(norm, {None})
                return Outcome(nn.Identity(), [place, AS_SEEN] if rests and norm in self.seen else [place])
            obstacles.append(obstacle)
        like = next((one for one in (*norm.parameters(), *norm.buffers()) if one.is_floating_point()), None)
        assert like is not None
        # as a population, no narrower than float32
        to = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        return Outcome(Affine(found.factor.to(**to), found.summand.to(**to), axis), obstacles[:1])

    def obstacle(self, layer: nn.Module, side: Side, norm: Any) -> str | None:
        """The reason why a linear layer does not take a map in."""
        name = type_before_parametrizations(layer).__name__
        is_same = is_same_axis(layer, channel_dim(norm), self.axes(norm, layer))
        if is_same is False or side.features(layer) != norm.num_features:
            return f"its feature axis is not that of the {name} beside it"
        if is_same is None:
            return f"whether its feature axis is that of the {name} beside it depends on the input; pass example="
        if has_hooks(layer):
            return f"the {name} beside it has hooks"
        if self.is_tied(layer):
            return f"the {name} beside it has tied parameters"
        if layer in self.flow.read:
            return f"something else reads the weights of the {name} beside it"
        return None

    def axes(self, norm: Any, layer: nn.Module) -> set[int]:
        """Numbers of axes of a norm's inputs beside ``layer``; none if they are open.

        They are those of the example, or else what the trace proves, what torch's norms take, or what convolutions
        give for batches. A norm behind an input without a batch axis would take channels for samples.
        """
        seen, traced = self.seen.get(norm, set()), self.flow.axes.get(norm, {None})
        if seen or None not in traced:
            return seen | {number for number in traced if number is not None}
        origin = origin_of(norm)
        kind = type_before_parametrizations(norm) if origin is None else origin.kind
        taken = next((axes for base, axes in TAKES.items() if issubclass(kind, base)), None)
        spatial = spatial_axes(layer)
        if spatial and (taken is None or spatial + 2 in taken):
            return {spatial + 2}
        return taken if taken and (spatial or len(taken) == 1) else set()

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
