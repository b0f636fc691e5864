"""BatchNorm, SyncBatchNorm and LayerNorm of torch in place of a Normalization."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_bln.convert.layers import has
from lightning_bln.convert.origin import ORIGIN, Origin, origin_of
from lightning_bln.convert.places import Counterpart
from lightning_bln.functional import scale_factor
from lightning_bln.modes import is_outdated
from lightning_bln.norm import Normalization


def norm_reason(layer: Normalization, batch_norm: type[nn.Module] | None) -> str | None:
    """The reason why torch has no norm that computes what ``layer`` does, if so."""
    if layer.norm == "bln":
        return "norm='bln', which torch does not have"
    factor = scale_factor(layer.scale, layer.num_features)
    if factor != 1.0:
        return f"scale={layer.scale}, a factor of {factor:.4g}; torch's norms have none besides their weight"
    return layer_reason(layer) if layer.norm == "layer" else batch_reason(layer, batch_norm)


def layer_reason(layer: Normalization) -> str | None:
    """The reason against LayerNorm."""
    if layer.channel_dim != -1:
        return f"norm='layer' over axis {layer.channel_dim}, but LayerNorm is over the last one, -1"
    if not layer.mode.endswith("cc"):
        return f"mode='{layer.mode}' takes feature statistics from the population, but LayerNorm has none; use 'ppcc'"
    return None


def batch_reason(layer: Normalization, batch_norm: type[nn.Module] | None) -> str | None:
    """The reason against BatchNorm."""
    if (layer.batch_dim, layer.channel_dim) != (0, 1):
        axes = f"batch_dim={layer.batch_dim} and channel_dim={layer.channel_dim}"
        return f"{axes}, but the axes of BatchNorm are 0 and 1"
    if layer.positions != "shared":
        return "positions='separate' keeps statistics of each position, but BatchNorm has one for all"
    origin, mode, population = origin_of(layer), layer.mode, layer.population
    if mode[:2] not in ("pp", "cc"):
        return f"mode='{mode}' takes mean and variance from different places, but BatchNorm takes both from one"
    if mode[:2] == "cc" and population.is_frozen and (origin is None or origin.has_statistics):
        return f"mode='{mode}' evaluates by the batch though there is a population; set mode='ppcc' to keep it"
    if mode[:2] == "pp" and not population.is_frozen:
        return "no population is frozen, so that there are no running statistics; call recompute_population"
    if mode[:2] == "pp" and tuple(population.batch_mean.shape) != (1, layer.num_features):
        return f"its population has positions of shape {population.positions}, but BatchNorm has one for all"
    if kind_of(layer, batch_norm) is None:
        return "nothing says how many axes its input has; pass batch_norm=nn.BatchNorm2d, say"
    return None


def kind_of(layer: Normalization, batch_norm: type[nn.Module] | None) -> type[nn.Module] | None:
    """The class of torch for ``norm="batch"``; the classes differ in the axes they take, and Sync in training."""
    if layer.sync_batch_stats:
        return nn.SyncBatchNorm
    origin = origin_of(layer)
    return batch_norm if origin is None or origin.kind is nn.SyncBatchNorm else origin.kind


def plain_norm(layer: Normalization, batch_norm: type[nn.Module] | None) -> Counterpart:
    """A norm of torch with a layer's settings and statistics, its parameters not yet those of the layer."""
    affine = has(layer, "weight") or has(layer, "bias")
    to: dict[str, Any] = {"device": "meta", "dtype": dtype_of(layer)}  # each tensor is replaced by the layer's
    if layer.norm == "layer":
        return Counterpart(nn.LayerNorm(layer.num_features, eps=layer.eps, elementwise_affine=affine, **to), [], [])
    kind: Any = kind_of(layer, batch_norm)
    has_statistics, origin = layer.mode.startswith("pp"), origin_of(layer)
    if origin is not None and origin.has_statistics != has_statistics:
        origin = None  # what it had or lacked has come or gone since
    settings = {"eps": layer.eps, "affine": affine, "track_running_stats": has_statistics}
    made: Any = kind(layer.num_features, momentum=momentum_of(layer, origin), **settings, **to)
    batches = 0 if has_statistics else None
    if origin is not None:
        batches, made.track_running_stats = origin.batches, origin.tracks
    device = layer.population.batch_mean.device
    made.num_batches_tracked = None if batches is None else torch.tensor(batches, dtype=torch.long, device=device)
    return give_statistics(layer, made, to["dtype"]) if has_statistics else Counterpart(made, [], [])


def dtype_of(layer: Normalization) -> torch.dtype:
    """The dtype of a layer as torch has it: that of its parameters, or else of its statistics."""
    origin, own = origin_of(layer), layer.population.batch_mean.dtype
    found = next((one.dtype for one in layer.parameters() if one.is_floating_point()), None)
    if found is not None:
        return found
    # a population is no narrower than float32
    return origin.dtype if origin is not None and own == torch.promote_types(origin.dtype, torch.float32) else own


def give_statistics(layer: Normalization, made: Any, dtype: torch.dtype) -> Counterpart:
    """Make the population of a layer the running statistics of the BatchNorm ``made``."""
    population, origin = layer.population, origin_of(layer)
    notes, lost = [], []
    for name, value in (("running_mean", population.batch_mean), ("running_var", population.batch_var)):
        setattr(made, name, value[0].detach().to(dtype, copy=True))
    if population.estimator == "paper":
        lost.append("population='paper', as which running statistics do not go on")
    if made.momentum == 0 and (origin is None or origin.momentum != 0):
        notes.append("momentum 0, since its population does not follow batches")
    if is_outdated(population) and made.momentum != 0 and made.track_running_stats:
        lost.append("the mark that its statistics are older than its weights: call recompute_population before")
    return Counterpart(made, notes, lost)


def momentum_of(layer: Normalization, origin: Origin | None) -> float | None:
    """The momentum by which running statistics do what the population does.

    A population without momentum stays where it is, as running statistics with a momentum of 0 do.
    """
    own = layer.population.momentum
    if own is not None or origin is None:
        return own or 0.0
    # one that was in force would be the population's, unless the user has taken it away
    was_in_force = origin.tracks and origin.momentum
    return 0.0 if was_in_force else origin.momentum


def known_of_norm() -> frozenset[str]:
    """Attributes and children of every Normalization, those that are not the user's."""
    layer = Normalization(1, device="meta")
    return frozenset((*vars(layer), *(name for name, _ in layer.named_children()), ORIGIN))
