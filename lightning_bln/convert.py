"""Conversion of plain torch modules to normalised ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln.norm import Normalization
from lightning_bln.recurrent import BLNGRU, BLNLSTM, BLNRNN, Recurrent

TORCH_LAYERS: dict[type[nn.RNNBase], type[Recurrent]] = {nn.LSTM: BLNLSTM, nn.GRU: BLNGRU, nn.RNN: BLNRNN}


def from_torch(layer: nn.LSTM | nn.GRU | nn.RNN, *, norm: str | None = "bln", **options: Any) -> Recurrent:
    """A normalised recurrent layer with the sizes, weights and biases of a torch one.

    Args:
        layer: A :class:`torch.nn.LSTM`, :class:`torch.nn.GRU` or :class:`torch.nn.RNN`.
        norm: ``"bln"``, ``"layer"``, ``"batch"``, or ``None`` for a layer with outputs equal to the original's.
        **options: Further options of :class:`~lightning_bln.Recurrent`.

    Raises:
        ValueError: ``layer`` is none of these three.

    Example:
        >>> plain = nn.LSTM(4, 8)
        >>> x = torch.randn(5, 3, 4)
        >>> torch.allclose(from_torch(plain, norm=None)(x)[0], plain(x)[0], atol=1e-6)
        True
    """
    if type(layer) not in TORCH_LAYERS:
        raise ValueError(f"layer={type(layer).__name__}, but only nn.LSTM, nn.GRU and nn.RNN convert; pass one of them")
    names = ["num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    names += {nn.LSTM: ["proj_size"], nn.RNN: ["nonlinearity"]}.get(type(layer), [])
    weight = layer.weight_ih_l0
    assert isinstance(weight, Tensor)
    kind: Any = TORCH_LAYERS[type(layer)]
    converted: Recurrent = kind(
        layer.input_size,
        layer.hidden_size,
        norm=norm,
        device=weight.device,
        dtype=weight.dtype,
        **{name: getattr(layer, name) for name in names},
        **options,
    )
    converted.load_state_dict(layer.state_dict(), strict=norm is None)
    return converted.train(layer.training)


def to_bln(model: nn.Module, *, norm: str = "bln", **options: Any) -> nn.Module:
    """Replace every BatchNorm, LayerNorm and torch recurrent layer in ``model`` by its normalised counterpart.

    The new layers keep weights and biases. BatchNorm becomes BLN over its channels with shared positions, LayerNorm
    over its last axis, both with scale 1 so that activations keep their size. They have no population yet: train, or
    call :func:`~lightning_bln.recompute_population`.

    Args:
        model: Module to change in place.
        norm: ``"bln"``, ``"layer"`` or ``"batch"``.
        **options: For the recurrent layers, as in :class:`~lightning_bln.Recurrent`.

    Returns:
        ``model``, or its counterpart if it is itself such a layer.

    Raises:
        ValueError: A LayerNorm is over several axes; then nothing is replaced.

    Example:
        >>> to_bln(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))[1].norm
        'bln'
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
            raise ValueError(
                f"{name or 'model'} is a LayerNorm over {tuple(module.normalized_shape)}, but BLN takes one feature "
                "axis; flatten those axes first"
            )
    if isinstance(model, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return normalization_like(model, model.num_features, channel_dim=1, norm=norm)
    if isinstance(model, nn.LayerNorm):
        return normalization_like(model, model.normalized_shape[0], channel_dim=-1, norm=norm)
    if isinstance(model, (nn.LSTM, nn.GRU, nn.RNN)):
        return from_torch(model, norm=norm, **options)
    for name, child in model.named_children():
        setattr(model, name, to_bln(child, norm=norm, **options))
    return model


def normalization_like(module: Any, num_features: int, *, channel_dim: int, norm: str) -> Normalization:
    """A norm with the weights of a BatchNorm or LayerNorm."""
    affine = module.weight is not None
    factory = {"device": module.weight.device, "dtype": module.weight.dtype} if affine else {}
    converted = Normalization(
        num_features,
        norm=norm,
        eps=module.eps,
        affine=affine,
        bias=module.bias is not None,
        channel_dim=channel_dim,
        positions="shared",
        scale=False,
        **factory,
    )
    with torch.no_grad():
        for own, original in ((converted.weight, module.weight), (converted.bias, module.bias)):
            if own is not None:
                own.copy_(original)
    return converted.train(module.training)
