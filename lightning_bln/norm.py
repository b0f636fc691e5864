"""Batch layer normalization as a module: the equation, an affine map and a population."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._checks import (
    check_bool,
    check_choice,
    check_eps,
    check_floating,
    check_int,
    check_number,
    check_scale,
)
from lightning_bln.distributed import is_distributed, joint_batch
from lightning_bln.equation import Equation, Source, Statistics, Uses, normalize_by, observation, widen
from lightning_bln.functional import NORMS, check_dtype, check_input, parts, scale_factor
from lightning_bln.fused_norm import BACKENDS, kernels_for, normalize_fused
from lightning_bln.kernels.gate import serves
from lightning_bln.masks import blank, check_mask, counts_of, sizes_of
from lightning_bln.mixing import Mixing, mixing_of
from lightning_bln.modes import FanOut, HasMode
from lightning_bln.norm_warnings import warn_fixed, warn_single, warn_stale, warn_unfrozen
from lightning_bln.per_mode import NotTogether, PerMode
from lightning_bln.population import Observed, Population, check_state_dict

NONE_USED: Uses = (False,) * 4
"""All statistics are the current input's."""


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
    backend = "auto"

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
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NORMS)
        check_choice("positions", positions, ("separate", "shared"))
        check_choice("backend", backend, BACKENDS)
        check_floating(dtype)
        self.num_features, self.norm = check_int("num_features", num_features), norm
        if self.num_features < 1:
            raise ValueError(f"num_features={num_features}, but at least one feature is needed; pass a positive number")
        self.eps, self.delta = check_eps(eps), check_number("delta", delta)
        self.channel_dim, self.batch_dim = check_int("channel_dim", channel_dim), check_int("batch_dim", batch_dim)
        self.positions, self.scale, self.backend = positions, check_scale(scale), backend
        sync_batch_stats = check_bool("sync_batch_stats", sync_batch_stats)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        affine, bias = check_bool("affine", affine), check_bool("bias", bias)
        self._register_affine(self.num_features, affine, affine and bias, factory)
        self.population = Population(self.num_features, estimator=population, momentum=momentum, **factory)
        self.population.is_joint = sync_batch_stats
        if self.batch_dim == 0:
            self.population.channel_dim = self.channel_dim
        self.sync_batch_stats, self.takes_part = sync_batch_stats, True

    @property
    def reads_letters(self) -> tuple[bool, bool, bool, bool]:
        """Whether each letter of the mode has an effect: batch letters for batch statistics, feature letters alike."""
        has_batch, has_feature = self.norm != "layer", self.norm != "batch"
        return has_batch, has_batch, has_feature, has_feature

    def _register_affine(self, size: int, weight: bool, bias: bool, factory: dict[str, Any]) -> None:
        self.register_parameter("weight", nn.Parameter(torch.ones(size, **factory)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size, **factory)) if bias else None)

    def reset_parameters(self) -> None:
        """Set weight and bias to where they start, and empty the population."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.population.reset(frozen=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x``; in training by its own statistics, which are gathered, else as ``mode`` says.

        Args:
            x: The input.
            mask: True where ``x`` holds data, bool, of its shape without the feature axis, batch first. Padding,
                whatever it holds, enters no statistic and no gradient, and its output is zero.
        """
        batch_dim, channel_dim = check_input(x, batch_dim=self.batch_dim, channel_dim=self.channel_dim)
        if x.shape[channel_dim] != self.num_features:
            raise ValueError(
                f"num_features={self.num_features}, but the input's feature axis (dim {self.channel_dim}) has "
                f"{x.shape[channel_dim]}; change one of them, or channel_dim"
            )
        self._check_parameters(x)
        fan = None if self.training else self.fan
        if fan is None and isinstance(x, PerMode):
            raise NotTogether(f"{type(self).__name__} in training gathers what differs between modes")
        canonical = x.movedim((batch_dim, channel_dim), (0, -1))
        if mask is not None:
            self._check_mask(mask, canonical)
        if fan is None:
            y = self._normalize(canonical, None, mask)
        else:
            mask = None if mask is None else fan.enter_mask(mask, canonical.shape[0])
            y = fan.leave(self._normalize(fan.enter(canonical, 0), fan, mask), 0)
        return y.movedim((0, -1), (batch_dim, channel_dim))

    def _check_parameters(self, x: Tensor) -> None:
        """Raise unless parameters and population fit ``x``; they may have been assigned from elsewhere."""
        for name, parameter in (("weight", self.weight), ("bias", self.bias)):
            if parameter is not None and parameter.shape != (self.num_features,):
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, but num_features={self.num_features}; assign one of "
                    f"shape ({self.num_features},)"
                )
        check_dtype(x, self.weight)
        # where torch.compile traces in training, not even the device of a population that grows may be looked at
        gathers = self.training and torch.compiler.is_compiling()
        for owner, value in (("bias", self.bias), ("population", None if gathers else self.population.mean)):
            if value is not None and value.device != x.device:
                raise RuntimeError(
                    f"x is on {x.device}, but the layer's {owner} is on {value.device}; move one with .to()"
                )

    def _check_mask(self, mask: Tensor, x: Tensor) -> None:
        """Raise unless ``mask`` fits ``x``, batch first and features last, and the layer takes one."""
        fan = None if self.training else self.fan
        check_mask(mask if fan is None else fan.repeat_mask(mask, x.shape[0]), x)
        serves(self.backend, f"mask is given, and the {self.backend} kernels take all of x")

    def _normalize(self, x: Tensor, fan: FanOut | None, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x``, shaped ``(m, *positions, d)``, or ``(modes, m, *positions, d)`` under a fan-out."""
        batch_axis = 0 if fan is None else 1
        is_shared = self.positions == "shared" or x.ndim == batch_axis + 2
        if self.training and self.sync_batch_stats and is_distributed():
            return self._normalize_jointly(x, is_shared, mask)
        over = tuple(range(batch_axis, x.ndim - 1)) if is_shared else (batch_axis,)
        places = (1,) if is_shared else tuple(x.shape[batch_axis + 1 : -1])
        source, batch_size = self._source(places)
        seen = math.prod(x.shape[:-1]) // math.prod(places)
        warn_single(self, seen)
        own_size = x.shape[batch_axis] if mask is None else sizes_of(mask, batch_axis, widen(x).dtype)
        mixing = self._mixing(own_size, batch_size, slice(places[0]))
        equation = self._equation(mixing)
        if mask is not None:
            y, observed = normalize_by(x, equation, source, over, mask, self.training)
            if observed is not None:
                self.gather(observed, *counts_of(mask, over, widen(x).dtype), has_gaps=True)
            return blank(y, mask)
        kernels = None
        if fan is None or not torch.is_grad_enabled():
            kernels = kernels_for(self.backend, x, (self.weight, self.bias, source.given.batch_mean))
        if kernels is not None:
            modes = None if fan is None else fan.modes
            y, batch = normalize_fused(x, equation, source, over, self.training, modes, mixing.rows, kernels)
            observed = None if batch is None or batch.merge_into(self.population) else batch.statistics()
        else:
            y, observed = normalize_by(x, equation, source, over, observes=self.training)
        if observed is not None:
            self.gather(observed, x.shape[0], seen)
        return y

    def _normalize_jointly(self, x: Tensor, is_shared: bool, mask: Tensor | None) -> Tensor:
        """Normalise in training by the batch that all ranks hold together; each rank gathers the same."""
        joint = joint_batch(x, is_shared, self.takes_part, mask)
        equation = self._equation(self._mixing(joint.batch_size))
        own = Statistics(joint.mean[: x.shape[1]], joint.var[: x.shape[1]])
        y, _ = normalize_by(x, equation, Source(own, (True, True, False, False)), (), mask)
        observed = Statistics(joint.mean, joint.var, joint.feature_mean, joint.feature_var)
        with torch.no_grad():
            observed = observation(observed, equation, tuple(joint.seen.shape), x)
        self.gather(observed, joint.sizes, joint.seen, has_gaps=joint.has_gaps)
        return y if mask is None else blank(y, mask)

    def gather(
        self,
        observed: Statistics,
        batch_size: int | Tensor,
        seen: int | Tensor,
        *,
        start: int = 0,
        has_gaps: bool = False,
    ) -> None:
        """Let the population take in a training batch.

        Args:
            observed: What :func:`~lightning_bln.equation.observation` gives.
            batch_size: Samples of the batch, a number or one for each position.
            seen: How many rows of features each position's statistics are taken over.
            start: How many positions along the first axis come before.
            has_gaps: Whether there may be positions at which nothing was seen.
        """
        assert observed.feature_mean is not None
        places, device = tuple(observed.feature_mean.shape), observed.feature_mean.device

        def counts(number: int | Tensor) -> Tensor:
            # from a number without a copy from the host, which no CUDA graph takes
            return number.expand(places) if isinstance(number, Tensor) else torch.full(places, number, device=device)

        with torch.no_grad():
            taken = Observed(*observed, counts(seen), counts(batch_size))  # type: ignore[arg-type]
            self.population.gather(taken, start, has_gaps)

    def _mixing(
        self, batch_size: float | Tensor, frozen_size: Tensor | None = None, steps: slice | None = None
    ) -> Mixing:
        """The mixing weights for batches of this size, or of the population's where there is one to use.

        Args:
            batch_size: Samples, a number or one for each position.
            frozen_size: The population's.
            steps: Places of the input among the positions.
        """
        if frozen_size is None:
            return self._mixing_in_training(batch_size, steps)
        return mixing_of(self.population, frozen_size, self.delta, self.norm)

    def _mixing_in_training(self, batch_size: float | Tensor, steps: slice | None = None) -> Mixing:
        """The mixing weights of a batch, which may stand for many training batches, or of each sample by itself."""
        if self.population.ignores_batch:  # by its features, which BatchNorm has in place of a constant, too
            return Mixing(1.0, None if self.norm == "layer" else 0.0)
        sizes = self.population.training_sizes
        if sizes is None or steps is None:
            batch_size = self.population.share(batch_size)
        else:
            batch_size = self._broadcast(sizes[steps])
        return Mixing(*parts(batch_size, self.delta, self.norm))

    def _broadcast(self, sizes: Tensor) -> Tensor:
        """Batch sizes of each position as the equation takes them."""
        return sizes[..., None]

    def _equation(self, mixing: Mixing) -> Equation:
        """The equation with these mixing weights."""
        scale = scale_factor(self.scale, self.num_features)
        return Equation(self.weight, self.bias, scale, self.eps, mixing.w_feature, mixing.w_batch)

    def _source(self, positions: tuple[int, ...], start: int = 0) -> tuple[Source, Tensor | None]:
        """Origin of the statistics at ``positions``, and the population's batch size where there is one to use."""
        if self.training:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self.population.is_stale = True
            return Source(Statistics(), NONE_USED), None
        # a fanned-out layer may have no mode of its own: in joint evaluation, to read one is an error
        fan, device = self.fan, self.population.batch_mean.device
        uses: Uses = self.mode.uses_population if fan is None else fan.uses_population(device)
        if not self.population.is_frozen:
            warn_unfrozen(self, uses)
            return Source(Statistics(), NONE_USED), None
        if self.population.is_stale:
            warn_stale(self, uses)
        warn_fixed(self, positions)
        population, batch_size = self.population.at(positions, start)
        return Source(population, uses), batch_size

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
        backend: ``"auto"`` for the fastest that is measured, ``"reference"`` for plain torch operations, ``"cpu"`` for
            the compiled kernels or an error, ``"triton"`` for Triton's kernels on a CUDA device or an error.
        device: Where parameters and statistics lie.
        dtype: Their dtype.

    Shape:
        Any with at least a batch and a feature axis; the output has the input's. A ``mask`` for the call has the
        input's without the feature axis, batch first, and is true where there is data.

    Raises:
        ValueError: An argument is out of range; or the input's feature axis is not ``num_features`` long, its rank does
            not fit, it is empty, its positions do not fit the population's, or its mask does not fit.
        TypeError: An argument's type is wrong, the input's dtype is not the parameters', or a mask holds no bools.

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
        backend: str = "auto",
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
            backend=backend,
            device=device,
            dtype=dtype,
        )
