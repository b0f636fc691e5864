"""Batch layer normalization as a module: the equation, an affine map and a population."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._torch import is_autocast_enabled
from lightning_bln.distributed import is_distributed, joint_batch
from lightning_bln.functional import (
    NORMS,
    Statistics,
    check_choice,
    check_input,
    complete,
    is_zero,
    mixing_weights,
    normalize,
    scale_factor,
)
from lightning_bln.kernels.batch_layer_norm import DenseSettings, dense, dense_in_modes, runs_compiled
from lightning_bln.kernels.library import bits_of
from lightning_bln.modes import HasMode
from lightning_bln.population import Observed, Population, check_state_dict

Uses = tuple["bool | Tensor", ...]


def choose(
    population: Statistics | None,
    uses: Uses,
    x: Tensor,
    over: tuple[int, ...],
    weights: tuple,
    mask: Tensor | None = None,
) -> Statistics:
    """The statistics to normalise ``x`` by: the population's where ``uses`` says so, else those of ``x``.

    An entry of ``uses`` may hold one answer for each group along the axis before the batch axis of ``x``.
    """
    if population is None:
        return complete(Statistics(), x, over, weights, mask)
    given = Statistics(*(value if use is True else None for value, use in zip(population, uses, strict=True)))
    group_axis = over[0] - 1
    is_same = mask is None and group_axis >= 0 and x.stride(group_axis) == 0
    current = complete(given, x.narrow(group_axis, 0, 1) if is_same else x, over, weights, mask)
    chosen = []
    for use, own, value in zip(uses, population, current, strict=True):
        if isinstance(use, Tensor) and value is not None:
            assert own is not None
            value = torch.where(use.view(-1, *[1] * (x.ndim - group_axis - 1)), own, value)
        chosen.append(value)
    return Statistics(*chosen)


def observe(statistics: Statistics, x: Tensor, places: tuple[int, ...], over: tuple[int, ...]) -> Observed:
    """A training batch's statistics as a population takes them; those its norm leaves unused are zero and one."""
    d, per_sample = x.shape[-1], (*x.shape[:-1], 1)
    unused = (x.new_zeros(d), x.new_ones(d), x.new_zeros(per_sample), x.new_ones(per_sample))
    batch_mean, batch_var, feature_mean, feature_var = (
        default if value is None else value for value, default in zip(statistics, unused, strict=True)
    )
    number = torch.Size(places).numel()
    return Observed(
        batch_mean.reshape(-1, d).expand(number, d).reshape(*places, d),
        batch_var.reshape(-1, d).expand(number, d).reshape(*places, d),
        feature_mean.squeeze(-1).mean(over).expand(places),
        feature_var.squeeze(-1).mean(over).expand(places),
        seen=torch.full(places, x.shape[:-1].numel() // number, device=x.device),
        batch_size=torch.full(places, len(x), device=x.device),
    )


def as_row(weight: float | Tensor, positions: int) -> Tensor:
    """A mixing weight at each position, in float64."""
    if isinstance(weight, Tensor):
        return weight.double().reshape(-1).expand(positions)
    return torch.full((positions,), float(weight), dtype=torch.float64)


def unused_as_constants(statistics: Statistics, weights: tuple) -> Statistics:
    """Zero and one in place of the statistics whose mixing weight switches them off."""
    w_feature, w_batch = weights
    batch, feature = tuple(statistics)[:2], tuple(statistics)[2:]
    if is_zero(w_batch):
        batch = torch.zeros_like(batch[0]), torch.ones_like(batch[0])  # type: ignore[arg-type]
    if is_zero(w_feature):
        feature = torch.zeros_like(feature[0]), torch.ones_like(feature[0])  # type: ignore[arg-type]
    return Statistics(*batch, *feature)


class Normalization(HasMode):
    """The equation of :func:`~lightning_bln.functional.batch_layer_norm`, whole or one half, with a population.

    ``norm="layer"`` and ``norm="batch"`` are its two halves on their own, on the same code path, so that comparisons
    between the three are fair. See :class:`BatchLayerNorm` for the other arguments.

    Args:
        num_features: Size ``d`` of the feature axis.
        norm: ``"bln"``, ``"layer"`` or ``"batch"``.
        bias: Whether an affine layer has a bias.

    Example:
        >>> layer = Normalization(8, norm="layer", scale=False)
        >>> x = torch.randn(4, 8)
        >>> torch.allclose(layer(x), nn.functional.layer_norm(x, (8,), eps=1e-3), atol=1e-6)
        True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        norm: str = "bln",
        eps: float = 1e-3,
        delta: float = 1e-4,
        affine: bool = True,
        bias: bool = True,
        channel_dim: int = -1,
        batch_dim: int = 0,
        positions: str = "separate",
        scale: bool | float = True,
        population: str = "pooled",
        momentum: float | None = None,
        sync_batch_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("positions", positions, ("separate", "shared"))
        if num_features < 1:
            raise ValueError(f"num_features={num_features}, but at least one feature is needed; pass a positive number")
        self.num_features, self.norm, self.eps, self.delta = num_features, norm, eps, delta
        self.channel_dim, self.batch_dim = channel_dim, batch_dim
        self.positions, self.scale = positions, scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self._register_affine(num_features, affine, affine and bias, factory)
        self.population = Population(num_features, estimator=population, momentum=momentum, **factory)
        self.population.is_joint = sync_batch_stats
        self.sync_batch_stats, self.takes_part = sync_batch_stats, True
        self._has_warned = False

    def _register_affine(self, size: int, weight: bool, bias: bool, factory: dict[str, Any]) -> None:
        self.register_parameter("weight", nn.Parameter(torch.ones(size, **factory)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size, **factory)) if bias else None)

    def reset_parameters(self) -> None:
        """Set weight and bias to where they start."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``; in training by its own statistics, which are gathered, else as ``mode`` says."""
        batch_dim, channel_dim = check_input(x, batch_dim=self.batch_dim, channel_dim=self.channel_dim)
        if x.shape[channel_dim] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features}, but the input's feature axis (dim {self.channel_dim}) has "
                f"{x.shape[channel_dim]}; change one of them, or channel_dim"
            )
        self._check_dtype(x)
        fan = None if self.training else self.fan
        canonical = x.movedim((batch_dim, channel_dim), (0, -1))
        if fan is not None:
            canonical = fan.enter(canonical, 0)
        y = self._normalize(canonical, groups=fan is not None)
        if fan is not None:
            y = y.flatten(0, 1)
        return y.movedim((0, -1), (batch_dim, channel_dim))

    def _normalize(self, x: Tensor, groups: bool) -> Tensor:
        """Normalise ``x``, shaped ``(m, *positions, d)`` or, with ``groups``, ``(modes, m, *positions, d)``."""
        batch_axis = 1 if groups else 0
        is_shared = self.positions == "shared" or x.ndim == batch_axis + 2
        places = (1,) if is_shared else tuple(x.shape[batch_axis + 1 : -1])
        over = tuple(range(batch_axis, x.ndim - 1)) if is_shared else (batch_axis,)
        if self.training and self.sync_batch_stats and is_distributed():
            return self._normalize_jointly(x, is_shared)
        population, uses, batch_size = self._source(places)
        weights = mixing_weights(x.shape[batch_axis] if batch_size is None else batch_size, self.delta, self.norm)
        if not (groups and torch.is_grad_enabled()) and runs_compiled(x, self.weight):
            return self._compiled(x, is_shared, places, population, uses, weights, groups)
        statistics = choose(population, uses, x, over, weights)
        if self.training:
            with torch.no_grad():
                self.population.gather(observe(statistics, x, places, over))
        scale = scale_factor(self.scale, self.num_features)
        return normalize(x, statistics, weights, self.weight, self.bias, scale=scale, eps=self.eps)

    def _normalize_jointly(self, x: Tensor, is_shared: bool) -> Tensor:
        """:meth:`_normalize` in training, with the batch that all ranks hold together; each gathers the same."""
        joint = joint_batch(x, is_shared, self.takes_part)
        weights = mixing_weights(joint.batch_size, self.delta, self.norm)
        statistics = complete(Statistics(joint.mean, joint.var), x, (), weights)
        used = unused_as_constants(Statistics(*joint[3:7]), weights)
        with torch.no_grad():
            self.population.gather(Observed(*used, seen=joint.seen, batch_size=joint.sizes))  # type: ignore[arg-type]
        scale = scale_factor(self.scale, self.num_features)
        return normalize(x, statistics, weights, self.weight, self.bias, scale=scale, eps=self.eps)

    def _compiled(
        self,
        x: Tensor,
        is_shared: bool,
        places: tuple[int, ...],
        population: Statistics | None,
        uses: Uses,
        weights: tuple,
        groups: bool,
    ) -> Tensor:
        """:meth:`_normalize` on the compiled kernels."""
        batch_axis = 1 if groups else 0
        flat = x.flatten(batch_axis, -2).unsqueeze(-2) if is_shared else x.flatten(batch_axis + 1, -2)
        rows, positions, _ = flat.shape[batch_axis:]
        given = None
        if population is not None and not all(use is False for use in uses):
            given = torch.cat([value.reshape(-1) for value in population]).to(x.dtype)  # type: ignore[union-attr]
        mixing = torch.stack([as_row(weight, positions) for weight in weights])
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        )
        scale = scale_factor(self.scale, self.num_features)
        if groups:
            assert self.fan is not None
            each = [bits_of(mode.uses_population) for mode in self.fan.modes]
            settings = DenseSettings(0, 0, scale, self.eps)
            return dense_in_modes(flat, self.weight, self.bias, mixing, given, settings, each).view(x.shape)
        bits = bits_of(uses) if given is not None else 0
        settings = DenseSettings(int(self.training or needs_grad), bits, scale, self.eps)
        y, seen = dense(flat, self.weight, self.bias, mixing, given, settings)
        if self.training:
            assert seen is not None
            used = unused_as_constants(seen, weights)
            mean, var, feature_mean, feature_var = (
                value.view(*places, *value.shape[1:]) for value in used if value is not None
            )
            counted = torch.full(places, rows), torch.full(places, x.shape[0])
            self.population.gather(Observed(mean, var, feature_mean, feature_var, *counted))
        return y.view(x.shape)

    def _source(self, positions: tuple[int, ...]) -> tuple[Statistics | None, Uses, Tensor | None]:
        """The population at ``positions``, which statistics it gives, and its batch size; nothing in training."""
        if self.training:
            return None, (False,) * 4, None
        uses: Uses
        if self.fan is not None:
            uses = self.fan.uses_population(self.population.batch_mean.device)
        else:
            uses = self.mode.uses_population
        if not self.population.is_frozen:
            self._warn_unfrozen(uses)
            return None, (False,) * 4, None
        population, batch_size = self.population.at(positions)
        return population, uses, batch_size

    def _warn_unfrozen(self, uses: Uses) -> None:
        relevant = {"bln": uses, "batch": uses[:2], "layer": uses[2:]}[self.norm]
        if self._has_warned or all(use is False for use in relevant):
            return
        self._has_warned = True
        warnings.warn(
            f"mode={str(self.mode)!r} needs a population, but none is frozen, so the current input's statistics are "
            "used; call recompute_population(model, batches) before eval(), or set momentum",
            stacklevel=2,
        )

    def _check_dtype(self, x: Tensor) -> None:
        if self.weight is not None and x.dtype != self.weight.dtype and not is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x has dtype {x.dtype}, but the layer's parameters have {self.weight.dtype}; convert one with .to()"
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        check_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, norm={self.norm!r}, scale={self.scale}, eps={self.eps}, "
            f"positions={self.positions!r}, mode={str(self.mode)!r}"
        )


class BatchLayerNorm(Normalization):
    r"""Batch layer normalization over a mini-batch of any rank.

    .. math::
        y = \gamma s \left( w_F \frac{x - \mu_F}{\sqrt{\sigma_F^2 + \epsilon}}
                          + w_B \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} \right) + \beta, \qquad
        w_F = \frac{1}{m} - \delta, \quad w_B = 1 - \frac{1}{m} - \delta

    In training the four statistics are the current batch's, and are gathered. In evaluation each comes from the
    population or from the current input, as :attr:`mode` says, and :math:`m` is the batch size seen in training.
    The population is frozen by :func:`~lightning_bln.recompute_population`, by the Lightning callback, or follows each
    batch with ``momentum``. Mode and population are part of the state dict.

    Args:
        num_features: Size ``d`` of the feature axis.
        eps: Added to the variances.
        delta: The authors' correction of the two weights.
        affine: Whether there are a weight :math:`\gamma` (one at the start) and a bias :math:`\beta` (zero).
        channel_dim: The feature axis: -1 for sequences, 1 for images as :class:`torch.nn.Conv2d` gives them.
        batch_dim: The batch axis.
        positions: ``"separate"`` keeps batch statistics of each position (time step, pixel), as the authors do;
            ``"shared"`` takes them over positions too, as BatchNorm does, and so serves inputs of any size.
        scale: ``True`` for the paper's :math:`s = 1/\sqrt{d}`, ``False`` for 1, or :math:`s` itself.
        population: ``"pooled"`` or ``"paper"``, see :class:`~lightning_bln.population.Population`.
        momentum: If given, the population follows each training batch this far, as BatchNorm's does.
        sync_batch_stats: In distributed training take batch statistics, and :math:`m`, over all ranks together, as if
            one process held the whole batch, with exact gradients. Ranks may hold different numbers of samples, but
            each has to run the layer equally often.
        device: Where parameters and statistics lie.
        dtype: Their dtype.

    Shape:
        Any with at least a batch and a feature axis; the output has the input's.

    Raises:
        ValueError: The input's feature axis is not ``num_features`` long, its rank does not fit, it is empty, or its
            positions do not fit the population's.
        TypeError: The input's dtype is not the parameters'.

    Example:
        >>> import lightning_bln
        >>> layer = BatchLayerNorm(3)
        >>> y = layer(torch.randn(8, 5, 3))                     # gathers in training
        >>> lightning_bln.recompute_population(layer, [torch.randn(8, 5, 3)])  # or freezes over batches of your choice
        >>> layer.eval().mode = "pppp"
        >>> layer(torch.randn(2, 5, 3)).shape
        torch.Size([2, 5, 3])

    Source:
        Ziaee and Cano, "Batch Layer Normalization, A new normalization layer for CNNs and RNNs", arXiv 2209.08898.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-3,
        delta: float = 1e-4,
        affine: bool = True,
        channel_dim: int = -1,
        batch_dim: int = 0,
        positions: str = "separate",
        scale: bool | float = True,
        population: str = "pooled",
        momentum: float | None = None,
        sync_batch_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            delta=delta,
            affine=affine,
            channel_dim=channel_dim,
            batch_dim=batch_dim,
            positions=positions,
            scale=scale,
            population=population,
            momentum=momentum,
            sync_batch_stats=sync_batch_stats,
            device=device,
            dtype=dtype,
        )
