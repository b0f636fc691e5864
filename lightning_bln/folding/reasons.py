"""Reasons why a norm or a recurrent layer stays, and what would let it fold."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lightning_bln.convert.plain_recurrent import PLAIN_LAYERS
from lightning_bln.equal_modes import Letters, standard
from lightning_bln.modes import StatisticsMode
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import RecurrentCell
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrent import Recurrent
from lightning_bln.sweep.plot import number
from lightning_bln.sweep.result import SweepResult

OWN_STATISTICS = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""Norms of torch that are never affine; torch before 2.4 has no RMSNorm."""


def reasons_of_torchs(norm: Any) -> list[str]:
    """Reasons why a norm of torch is no affine map."""
    if isinstance(norm, OWN_STATISTICS):
        return ["it normalises by each input's own statistics"]
    if isinstance(norm.running_mean, nn.UninitializedBuffer):
        return ["it has seen no input yet"]
    if norm.running_mean is None or norm.running_var is None:
        return ["it tracks no running statistics; train with track_running_stats=True"]
    return without_data(norm)


def reasons_of_norm(norm: Normalization, result: SweepResult | None) -> list[str]:
    """Reasons why a norm outside recurrent layers is no affine map."""
    reason, population = mode_reason(norm, result), norm.population
    found = [] if reason is None else [reason]
    if not found and not population.is_frozen:
        found = [UNFROZEN]
    if math.prod(population.feature_mean.shape) > 1:
        found.append("statistics of each position; train with positions='shared'")
    return found or without_data(norm)


UNFROZEN = "no population is frozen; call recompute_population before"


def reasons_of_recurrent(layer: Recurrent | RecurrentCell, result: SweepResult | None) -> list[str]:
    """Reasons why torch has no recurrent layer that computes what ``layer`` evaluates to."""
    if type(layer.cell) not in PLAIN_LAYERS:
        return [f"cell {type(layer.cell).__name__}, which torch does not have"]
    norms = {name: one for name, one in layer.named_children() if isinstance(one, GateNorm)}
    found = dict.fromkeys(reason for norm in norms.values() if (reason := mode_reason(norm, result)))
    if not found and not all(norm.population.is_frozen for norm in norms.values()):
        found[UNFROZEN] = None
    if any(len(norm.population.feature_mean) > 1 for norm in norms.values()):
        found["statistics of each time step; train with time_statistics='shared'"] = None
    if any(name.startswith("norm_cell") for name in norms):
        found["a norm on the cell state; train with norm_cell=False"] = None
    if layer.zoneout:
        found[f"zoneout={layer.zoneout}, which acts in evaluation, too; train with zoneout=0"] = None
    return [*found] or without_data(layer)


def without_data(layer: nn.Module) -> list[str]:
    """The reason against a layer on the meta device."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return ["its tensors are on the meta device and hold no numbers"] if any(one.is_meta for one in tensors) else []


def mode_reason(norm: Normalization, result: SweepResult | None) -> str | None:
    """The reason why the mode of a norm is not affine, with one that is, and its score."""
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
    return f"mode='{mode}' takes statistics from each input; {folds} would fold{cost}"


def is_affine(mode: StatisticsMode, letters: Letters) -> bool:
    """Whether every letter that a norm reads stands for the population."""
    return all(use for use, read in zip(mode.uses_population, letters, strict=True) if read)
