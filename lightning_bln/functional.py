"""Batch layer normalization as a function, without state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_bln._checks import check_choice
from lightning_bln._torch import is_autocast_enabled
from lightning_bln.equation import Equation, Source, Statistics, normalize_by, widen
from lightning_bln.masks import blank, check_mask, sizes_of

NORMS = ("bln", "layer", "batch")


def batch_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batch_mean: Tensor | None = None,
    batch_var: Tensor | None = None,
    feature_mean: Tensor | None = None,
    feature_var: Tensor | None = None,
    batch_size: float | Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-3,
    delta: float = 1e-4,
    scale: bool | float = True,
    channel_dim: int = -1,
    batch_dim: int = 0,
    positions: str = "separate",
    norm: str = "bln",
) -> Tensor:
    r"""Normalise an input by its batch's statistics and by its own features', weighted by the inverse batch size.

    .. math::
        y = \gamma s \left( w_F \frac{x - \mu_F}{\sqrt{\sigma_F^2 + \epsilon}}
                          + w_B \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} \right) + \beta, \qquad
        w_F = \frac{1}{m} - \delta, \quad w_B = 1 - \frac{1}{m} - \delta

    with :math:`m` the batch size, :math:`\mu_B, \sigma_B^2` over the batch axis (a value per position and feature),
    :math:`\mu_F, \sigma_F^2` over the feature axis (a value per sample and position), biased variances, and
    :math:`s = 1/\sqrt{d}` for :math:`d` features. Gradients flow through every statistic that is not given.

    Args:
        x: The input, with a batch axis, a feature axis and any number of other axes ("positions").
        weight: :math:`\gamma`, shape ``(d,)``; one if left out.
        bias: :math:`\beta`, shape ``(d,)``; zero if left out.
        batch_mean: Used in place of :math:`\mu_B`. This and the next three broadcast against ``x`` with its batch
            axis moved first and its feature axis last: ``(d,)``, ``(*positions, d)`` or ``(1, *positions, d)``.
        batch_var: Used in place of :math:`\sigma_B^2`.
        feature_mean: Used in place of :math:`\mu_F`: ``(*positions, 1)`` or ``(m, *positions, 1)``.
        feature_var: Used in place of :math:`\sigma_F^2`.
        batch_size: Used in place of :math:`m` in the two weights: a number, or a tensor that broadcasts as above.
        mask: True where ``x`` holds data, bool, shape ``(m, *positions)``. Padding, whatever it holds, enters no
            statistic and no gradient, and its output is zero. :math:`m` is the number of true entries at a position.
        eps: Added to the variances.
        delta: The authors' correction of the two weights.
        scale: ``True`` for :math:`s = 1/\sqrt{d}`, ``False`` for 1, or :math:`s` itself.
        channel_dim: The feature axis.
        batch_dim: The batch axis.
        positions: ``"separate"`` for batch statistics of each position, ``"shared"`` for one over all of them.
        norm: ``"bln"``, or one half of the equation: ``"layer"`` (:math:`w_F, w_B = 1, 0`) or ``"batch"`` (0, 1).

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: An axis, a shape or an option does not fit, or the batch is empty.
        TypeError: ``x`` does not hold floating-point numbers, or ``mask`` no bools.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 8.0, 1.0], [2.0, 2.0, 2.0]])
        >>> y = batch_layer_norm(x)
        >>> torch.equal(batch_layer_norm(x, batch_mean=x.mean(0)), y)
        True
        >>> batch_layer_norm(x, norm="batch", scale=False).mean(0).abs().max() < 1e-6
        tensor(True)

    Source:
        Ziaee and Cano, "Batch Layer Normalization, A new normalization layer for CNNs and RNNs", arXiv 2209.08898.
    """
    batch_dim, channel_dim = check_input(x, batch_dim=batch_dim, channel_dim=channel_dim)
    check_choice("positions", positions, ("separate", "shared"))
    num_features = x.shape[channel_dim]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (num_features,):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, but the input's feature axis (dim {channel_dim}) has "
                f"{num_features}; pass a {name} of shape ({num_features},)"
            )
    canonical = x.movedim((batch_dim, channel_dim), (0, -1))
    if mask is not None:
        check_mask(mask, canonical)
    over = tuple(range(canonical.ndim - 1)) if positions == "shared" else (0,)
    if batch_size is None:
        batch_size = canonical.shape[0] if mask is None else sizes_of(mask, 0, widen(x).dtype)
    given = Statistics(batch_mean, batch_var, feature_mean, feature_var)
    source = Source(given, tuple(value is not None for value in given))
    weights = parts(batch_size, delta, norm)
    equation = Equation(weight, bias, scale_factor(scale, num_features), eps, *weights)
    y, _ = normalize_by(canonical, equation, source, over, mask)
    y = y if mask is None else blank(y, mask)
    return y.movedim((0, -1), (batch_dim, channel_dim))


def mixing_weights(batch_size: float | Tensor, delta: float = 1e-4, norm: str = "bln") -> tuple:
    """The weights of the feature part and of the batch part, ``(w_F, w_B)``.

    Example:
        >>> mixing_weights(4, delta=0.0)
        (0.25, 0.75)
        >>> mixing_weights(4, norm="layer")
        (1.0, 0.0)
    """
    check_choice("norm", norm, NORMS)
    if norm == "layer":
        return 1.0, 0.0
    if norm == "batch":
        return 0.0, 1.0
    if isinstance(batch_size, Tensor) and not batch_size.ndim:  # a size while torch.jit.trace runs
        batch_size = batch_size.double()
    inverse = 1.0 / batch_size
    return inverse - delta, 1.0 - (inverse + delta)


def parts(batch_size: float | Tensor, delta: float, norm: str) -> tuple[float | Tensor | None, float | Tensor | None]:
    """:func:`mixing_weights`; ``None`` for the part that a norm does not have."""
    w_feature, w_batch = mixing_weights(batch_size, delta, norm)
    return None if norm == "batch" else w_feature, None if norm == "layer" else w_batch


def scale_factor(scale: bool | float, num_features: int) -> float:
    """The number that ``scale`` stands for: ``True`` is the paper's 1/sqrt(d), ``False`` is one."""
    if scale is True:
        return 1.0 / math.sqrt(num_features)
    return 1.0 if scale is False else float(scale)


def check_input(x: Tensor, *, batch_dim: int, channel_dim: int) -> tuple[int, int]:
    """Raise unless ``x`` can be normalised over those axes; return them counted from the front."""
    if not torch.is_floating_point(x):
        raise TypeError(f"x has dtype {x.dtype}, which holds no fractions; convert it with x.float()")
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but a batch axis and a feature axis are needed; add one")
    axes = []
    for name, dim in (("batch_dim", batch_dim), ("channel_dim", channel_dim)):
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"{name}={dim}, but x has {x.ndim} axes; pass {name} in [{-x.ndim}, {x.ndim - 1}]")
        axes.append(dim % x.ndim)
    if axes[0] == axes[1]:
        raise ValueError(f"batch_dim={batch_dim} and channel_dim={channel_dim} are the same axis; pass two")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, an empty batch; pass at least one sample")
    return axes[0], axes[1]


def check_dtype(x: Tensor, like: Tensor | None, name: str = "x", owner: str = "the layer's parameters have") -> None:
    """Raise unless ``x`` has the dtype and device of ``like``, if any; under autocast dtypes may differ."""
    if like is None:
        return
    if x.dtype != like.dtype and (not x.is_floating_point() or not is_autocast_enabled(x.device.type)):
        raise TypeError(f"{name} has dtype {x.dtype}, but {owner} {like.dtype}; convert one with .to()")
    if x.device != like.device:
        owner = owner.replace(" have", " are on").replace(" has", " is on")
        raise RuntimeError(f"{name} is on {x.device}, but {owner} {like.device}; move one with .to()")
