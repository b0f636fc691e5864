"""Reasons why a norm or a recurrent layer stays, and what would let it fold."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lightning_bln._torch import BatchNorm
from lightning_bln.convert.plain_recurrent import PLAIN_LAYERS
from lightning_bln.equal_modes import is_affine, standard
from lightning_bln.folding.frozen import FrozenCell, FrozenRecurrent
from lightning_bln.modes import StatisticsMode
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrent import Recurrent
from lightning_bln.sweep.plot import number
from lightning_bln.sweep.result import SweepResult

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
FROZEN = (FrozenRecurrent, FrozenCell)
OWN_STATISTICS = (nn.LayerNorm, nn.GroupNorm, *INSTANCE_NORMS)
"""Norms of torch that normalise by each input's own statistics."""

PACKAGE = __name__.split(".")[0]
LAYERS = (Normalization, Recurrent, RecurrentCell, BatchNorm, *OWN_STATISTICS)
"""Layers that a report says something about."""


HARMLESS = ("__init__", "__doc__", "__module__", "__annotations__", "__firstlineno__", "__static_attributes__")
"""Names in a class that neither change what its layers compute nor are missed in a copy of another class."""


def names_of_its_own(kind: type) -> list[str]:
    """Methods and attributes that classes outside this package give a layer, the constructor aside."""
    ours = (Normalization, Recurrent, RecurrentCell)
    classes = (one for one in kind.__mro__ if issubclass(one, ours) and one.__module__.split(".")[0] != PACKAGE)
    return [name for one in classes for name in vars(one) if name not in HARMLESS]


def reasons_of_torchs(norm: Any) -> list[str]:
    """Reasons why a norm of torch is no affine map."""
    if isinstance(norm, INSTANCE_NORMS) and norm.track_running_stats:
        return ["an InstanceNorm, also with running statistics, has no counterpart"]
    if isinstance(norm, OWN_STATISTICS):
        return ["it normalises by each input's own statistics"]
    if norm.running_mean is None or norm.running_var is None:
        return ["it tracks no running statistics; train with track_running_stats=True"]
    return without_data(norm)


def reasons_of_norm(norm: Normalization, result: SweepResult | None) -> list[str]:
    """Reasons why a norm outside recurrent layers is no affine map."""
    population = norm.population
    is_apart = math.prod(population.feature_mean.shape) > 1
    others = ["statistics of each position; train with positions='shared'"] if is_apart else []
    reason = mode_reason(norm, result, suffices=not others) if population.is_frozen else UNFROZEN
    found = others if reason is None else [reason, *others]
    return found or without_data(norm)


UNFROZEN = "no population is frozen; call recompute_population before"


def reasons_of_recurrent(layer: Recurrent | RecurrentCell, result: SweepResult | None) -> list[str]:
    """Reasons why a norm inside a recurrent layer is no affine map, and what else torch's layer lacks."""
    if isinstance(layer, FROZEN):
        return ["it is frozen"]
    norms, others = [one for one in layer.children() if isinstance(one, GateNorm)], reasons_against_torchs(layer)
    if not all(norm.population.is_frozen for norm in norms):
        return [UNFROZEN, *others]
    reasons = (mode_reason(norm, result, suffices=True) for norm in norms)
    found = [*dict.fromkeys(reason for reason in reasons if reason is not None)]
    return [*found, *others] if found else without_data(layer)


def reasons_against_torchs(layer: Recurrent | RecurrentCell) -> list[str]:
    """Reasons why torch has no recurrent layer that computes what ``layer`` does with affine norms."""
    if type(layer.cell) not in PLAIN_LAYERS:
        return [f"cell {type(layer.cell).__name__}, which torch does not have"]
    norms, found = {name: one for name, one in layer.named_children() if isinstance(one, GateNorm)}, []
    if any(norm.steps_known > 1 for norm in norms.values()):
        found.append("statistics of each time step; train with time_statistics='shared'")
    if any(name.startswith("norm_cell") for name in norms):
        found.append("a norm on the cell state; train with norm_cell=False")
    if layer.zoneout:
        found.append(f"zoneout={layer.zoneout}, which acts in evaluation, too; train with zoneout=0")
    return found


def without_data(layer: nn.Module) -> list[str]:
    """The reason against a layer on the meta device."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return ["its tensors are on the meta device and hold no numbers"] if any(one.is_meta for one in tensors) else []


def mode_reason(norm: Normalization, result: SweepResult | None, *, suffices: bool) -> str | None:
    """The reason why the mode of a norm is not affine, with one that is, which may suffice to fold, and its score."""
    letters, mode = norm.reads_letters, norm.mode
    if is_affine(mode, letters):
        return None
    folds = StatisticsMode("".join("p" if read else own for own, read in zip(mode, letters, strict=True)))
    cost = ""
    if result is not None:
        scored = [one for one in result.scores if is_affine(one, letters) and result.monitor in result.scores[one]]
        if scored:
            folds = result.best(among=scored)
            cost = f": {result.monitor} {number(result.scores[folds][result.monitor])}"
            present = (one for one in result.scores if standard(one, letters) == standard(mode, letters))
            score = next((result.scores[one].get(result.monitor) for one in present), None)
            cost += "" if score is None else f" instead of {number(score)}"
    return f"mode='{mode}' takes statistics from each input; {folds} {'would fold' if suffices else 'is needed'}{cost}"
