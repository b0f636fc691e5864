"""Counterparts of torch's normalising and recurrent layers, one by one."""

from __future__ import annotations

import inspect
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lightning_bln._torch import own_parameters
from lightning_bln.convert.carried import carry
from lightning_bln.convert.origin import remember
from lightning_bln.convert.places import Counterpart
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.cell_modules import BLNGRUCell, BLNLSTMCell, BLNRNNCell, RecurrentCell
from lightning_bln.recurrent import BLNGRU, BLNLSTM, BLNRNN, Recurrent

TORCH_LAYERS: dict[type[nn.RNNBase], type[Recurrent]] = {nn.LSTM: BLNLSTM, nn.GRU: BLNGRU, nn.RNN: BLNRNN}
TORCH_CELLS: dict[type[nn.RNNCellBase], type[RecurrentCell]] = {
    nn.LSTMCell: BLNLSTMCell,
    nn.GRUCell: BLNGRUCell,
    nn.RNNCell: BLNRNNCell,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVERTIBLE: tuple[type[nn.Module], ...] = (*TORCH_LAYERS, *TORCH_CELLS, *BATCH_NORMS, nn.LayerNorm)

SETTINGS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys(
    TORCH_LAYERS, ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
) | dict.fromkeys(TORCH_CELLS, ("bias",))
SETTINGS[nn.LSTM] += ("proj_size",)
SETTINGS[nn.RNN] += ("nonlinearity",)
SETTINGS[nn.RNNCell] += ("nonlinearity",)
"""Arguments of recurrent layers besides their two sizes."""


@overload
def from_torch(layer: nn.LSTM | nn.GRU | nn.RNN, *, norm: str | None = "bln", **options: Any) -> Recurrent: ...


@overload
def from_torch(
    layer: nn.LSTMCell | nn.GRUCell | nn.RNNCell, *, norm: str | None = "bln", **options: Any
) -> RecurrentCell: ...


def from_torch(layer: Any, *, norm: str | None = "bln", **options: Any) -> Recurrent | RecurrentCell:
    """A normalised recurrent layer, or single-step cell, with the sizes, weights and biases of a torch one.

    It has copies of the layer's parameters with their ``requires_grad``, parametrizations and pruning masks, runs its
    hooks, and lies where the layer lies; ``layer`` stays as it is.

    Args:
        layer: A :class:`torch.nn.LSTM`, :class:`torch.nn.GRU` or :class:`torch.nn.RNN`, or one of their cells.
        norm: ``"bln"``, ``"layer"``, ``"batch"``, or ``None`` for a layer with outputs equal to the original's.
        **options: Further options of :class:`~lightning_bln.Recurrent`, or of the cells.

    Raises:
        ValueError: ``layer`` is none of these, or of a subclass of them.

    Example:
        >>> plain = nn.LSTM(4, 8)
        >>> x = torch.randn(5, 3, 4)
        >>> torch.allclose(from_torch(plain, norm=None)(x)[0], plain(x)[0], atol=1e-6)
        True
    """
    kind = type_before_parametrizations(layer)
    if kind not in SETTINGS:
        raise ValueError(
            f"layer={kind.__name__}, but only nn.LSTM, nn.GRU and nn.RNN convert, and their cells; pass one of them"
        )
    converted = recurrent_like(layer, kind, norm=norm, **options)
    carry(layer, converted, known_attributes(kind), shared=False)
    return converted


def recurrent_like(module: Any, base: type, *, norm: str | None, **options: Any) -> Recurrent | RecurrentCell:
    """A recurrent layer or cell with the settings of one of torch's, its parameters not yet those of the original."""
    kind: Any = TORCH_LAYERS.get(base) or TORCH_CELLS[base]
    weight = next(module.parameters())  # not by name: a parametrized weight would be computed, and might change
    return kind(
        module.input_size,
        module.hidden_size,
        norm=norm,
        device=weight.device,
        dtype=weight.dtype,
        **{name: getattr(module, name) for name in SETTINGS[base]},
        **options,
    )


def counterpart(
    module: Any, base: type[nn.Module], norm: str, options: dict[str, Any], like: Tensor | None
) -> Counterpart:
    """The replacement of a layer, which takes over its very parameters and hooks.

    Args:
        module: The layer.
        base: The class in ``CONVERTIBLE`` by whose forward it runs.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``"keep"``.
        options: For recurrent layers, of which cells take those they know.
        like: A parameter nearby, for a layer that has none.
    """
    notes: list[str] = []
    if base in SETTINGS:
        if base in TORCH_CELLS:
            unknown = sorted(options.keys() & ONLY_OVER_TIME)
            options = {name: value for name, value in options.items() if name not in unknown}
            notes += [f"a single step takes no {', '.join(unknown)}"] if unknown else []
        inside = None if norm == "keep" else norm
        converted: nn.Module = recurrent_like(module, base, norm=inside, **options)
    else:
        is_batch_norm = base in BATCH_NORMS
        own = ("batch" if is_batch_norm else "layer") if norm == "keep" else norm
        size = module.num_features if is_batch_norm else module.normalized_shape[0]
        converted = normalization_like(module, size, channel_dim=1 if is_batch_norm else -1, norm=own, like=like)
        if norm == "keep":
            converted.population.to(torch.promote_types(converted.population.mean.dtype, torch.float32))
    lost = carry(module, converted, known_attributes(base), shared=True)
    if isinstance(converted, Normalization) and base in BATCH_NORMS:
        remember(module, base, converted)
        told = carry_running_statistics(module, converted, keeps_start=norm == "keep")
        notes, lost = notes + told.notes, lost + told.lost
    was = type_before_parametrizations(module)
    if was is not base:
        lost.append(f"methods that {was.__name__} adds to {base.__name__}")
    return Counterpart(converted, notes, lost)


ONLY_OVER_TIME = inspect.signature(Recurrent).parameters.keys() - inspect.signature(RecurrentCell).parameters.keys()
"""Options that a single step does not have."""


def known_attributes(base: type[nn.Module]) -> frozenset[str]:
    """Attributes of every instance of a layer of torch, those that are not the user's."""
    sizes = (1, 1) if base in SETTINGS else (1,)
    kind: Any = base
    return frozenset(vars(kind(*sizes, device="meta")))


def normalization_like(
    module: Any, num_features: int, *, channel_dim: int, norm: str, like: Tensor | None = None
) -> Normalization:
    """A norm with the settings of a BatchNorm or LayerNorm, its parameters not yet those of the original.

    ``like`` says where it lies and of which dtype it is where ``module`` has no tensors.
    """
    held = [*module.parameters(), *(one for one in module.buffers() if one.is_floating_point())]
    like = next(iter(held), like)
    momentum = module.momentum if getattr(module, "track_running_stats", False) else None
    return Normalization(
        num_features,
        norm=norm,
        eps=module.eps,
        affine=has(module, "weight"),
        bias=has(module, "bias"),
        channel_dim=channel_dim,
        positions="shared",
        scale=False,
        momentum=momentum or None,
        sync_batch_stats=isinstance(module, nn.SyncBatchNorm),
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
    )


def has(module: nn.Module, name: str) -> bool:
    """Whether a layer has such a parameter, or what takes its place; reading it would compute a parametrized one."""
    own = own_parameters(module).get(name), vars(module).get(name)
    return any(isinstance(value, Tensor) for value in own) or is_parametrized(module, name)


def carry_running_statistics(module: Any, converted: Normalization, *, keeps_start: bool) -> Counterpart:
    """Make the running statistics of a BatchNorm its counterpart's population where they are all that it needs.

    Those that come from no data yet do so only if ``keeps_start``; torch normalises by them all the same.
    """
    told = Counterpart(converted, [], [])
    if converted.norm == "layer":
        return told  # takes its statistics from each input
    if module.running_mean is None or module.running_var is None:
        converted.mode = "cccc"
        told.notes.append("mode cccc, since it tracks no running statistics and evaluates by the batch's own")
        return told
    if converted.norm == "bln":
        if has_seen_data(module):
            told.lost.append(
                "running statistics, since BLN's population needs those of features and the batch size too: call "
                "recompute_population"
            )
        return told
    if keeps_start or has_seen_data(module):
        one = module.running_mean.new_ones(1)
        # norm="batch" gives the feature statistics and the batch size no weight
        values = {"feature_mean": 0 * one, "feature_var": one, "batch_size": one}
        values |= {"batch_mean": module.running_mean[None], "batch_var": module.running_var[None]}
        converted.population.load_state_dict(values, strict=False)
        told.notes.append("running statistics are its population")
    if module.momentum is None:
        told.lost.append("momentum=None, the average over all batches: call recompute_population after training")
    return told


def has_seen_data(module: Any) -> bool:
    """Whether the running statistics of a BatchNorm come from data; those of old checkpoints are without a count."""
    mean, var, count = module.running_mean, module.running_var, module.num_batches_tracked
    if mean.is_meta:
        return False
    return bool((count is not None and count > 0) or mean.any() or var.ne(1).any())


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class in ``CONVERTIBLE`` whose forward ``module`` runs, if there is one."""
    kind = type_before_parametrizations(module)
    if "forward" in vars(module):
        return None
    return next((base for base in CONVERTIBLE if issubclass(kind, base) and kind.forward is base.forward), None)
