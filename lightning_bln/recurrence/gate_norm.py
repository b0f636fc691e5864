"""Normalization of a recurrent cell's gates: statistics of each time step, and of each gate or of all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln.functional import Statistics, mixing_weights, normalize, scale_factor
from lightning_bln.norm import Normalization, Uses, choose
from lightning_bln.population import Observed, Population

START_SCALES = {"bln": 0.3, "layer": 1.0, "batch": 0.1}


class SequenceNorm(NamedTuple):
    """All that a recurrence needs to know of a norm for the steps of one sequence.

    ``G'`` groups of gates share feature statistics over ``H'`` features each: ``(gates, hidden_size)`` for statistics
    of each gate, ``(1, gates * hidden_size)`` for joint ones.
    """

    weight: Tensor | None
    """``(G' * H')``"""
    bias: Tensor | None
    groups: int
    scale: float
    eps: float
    w_feature: float | Tensor
    """Weight of the feature part: a number, or one for each step, ``(T, 1)``."""
    w_batch: float | Tensor
    population: Statistics | None
    """Frozen statistics of each step, ``(T, G', H')`` and ``(T, G', 1)``; ``None`` in training."""
    uses: Uses
    observes: bool
    """Whether the statistics are gathered."""

    def __call__(self, x: Tensor, t: int | slice, mask: Tensor | None = None) -> tuple[Tensor, Statistics | None]:
        """Normalise step ``t``, shaped ``(..., B, G, H)``, or all steps, ``(T, ..., B, G, H)``.

        Returns:
            The normalised input, and if observed its statistics: ``(..., G', H')`` of the batch, ``(..., G')`` of the
            features, averaged over the samples.
        """
        grouped = x.reshape(*x.shape[:-2], self.groups, -1)
        between = (1,) * (x.ndim - 3) if isinstance(t, slice) else ()

        def at(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value[t]
            return value.view(*value.shape[:1], *between, *value.shape[1:]) if between else value

        population = None if self.population is None else Statistics(*map(at, self.population))
        weights = tuple(
            at(w)[..., None] if between and isinstance(w, Tensor) else at(w) for w in (self.w_feature, self.w_batch)
        )
        mask = None if mask is None else mask.expand(grouped.shape[:-1])
        over = (grouped.ndim - 3,)
        statistics = choose(population, self.uses, grouped, over, weights, mask)
        weight, bias = (None if p is None else p.view(self.groups, -1) for p in (self.weight, self.bias))
        y = normalize(grouped, statistics, weights, weight, bias, scale=self.scale, eps=self.eps)
        return y.reshape(x.shape), summarize(statistics, grouped, mask) if self.observes else None


def summarize(statistics: Statistics, x: Tensor, mask: Tensor | None) -> Statistics:
    """Statistics of ``(..., B, G', H')`` without their batch axis; those left unused are zero and one."""
    with torch.no_grad():
        zero, one = x.new_zeros(()), x.new_ones(())
        defaults = (zero, one, zero, one)
        filled = [default if value is None else value for value, default in zip(statistics, defaults, strict=True)]
        batch = (value.expand(*x.shape[:-3], 1, *x.shape[-2:]).squeeze(-3) for value in filled[:2])
        feature = [value.expand(*x.shape[:-1], 1).squeeze(-1) for value in filled[2:]]
        if mask is None:
            return Statistics(*batch, *(value.mean(-2) for value in feature))
        seen = mask.sum(-2)
        return Statistics(*batch, *(value.masked_fill(~mask, 0).sum(-2) / seen for value in feature))


class GateNorm(Normalization):
    """A norm inside a recurrent cell: one weight for each gate and unit, statistics of each time step.

    Args:
        hidden_size: Units of a gate.
        gates: How many gates there are.
        norm: ``"bln"``, ``"layer"`` or ``"batch"``.
        scale: As in :class:`~lightning_bln.BatchLayerNorm`; ``None`` for the norm's own start, 0.3, 1 or 0.1.
        bias: Whether there is a bias.
        gate_statistics: ``"separate"`` or ``"joint"`` feature statistics over the gates.
        time_statistics: ``"separate"`` or ``"shared"`` population over the time steps.
        eps: Added to the variances.
        delta: The authors' correction of the mixing weights.
        population: ``"pooled"`` or ``"paper"``.
        momentum: As in :class:`~lightning_bln.BatchLayerNorm`.
        device: Where parameters and statistics lie.
        dtype: Their dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        gates: int,
        *,
        norm: str = "bln",
        scale: bool | float | None = None,
        bias: bool = False,
        gate_statistics: str = "separate",
        time_statistics: str = "separate",
        eps: float = 1e-3,
        delta: float = 1e-4,
        population: str = "pooled",
        momentum: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        groups = gates if gate_statistics == "separate" else 1
        features = gates * hidden_size // groups
        if scale is None:
            scale = START_SCALES.get(norm, 1.0)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            features, norm=norm, eps=eps, delta=delta, affine=False, scale=scale, population=population, **factory
        )
        self.groups, self.gates = groups, gates
        self._register_affine(gates * hidden_size, True, bias, factory)
        self.population = Population(
            features,
            estimator=population,
            momentum=momentum,
            merge_positions=time_statistics == "shared",
            **factory,
        )

    def sequence(self, steps: int, sizes: Sequence[int]) -> SequenceNorm:
        """What a recurrence over ``steps`` steps needs, ``sizes[t]`` samples running at step ``t``."""
        population, uses, batch_size = self._source((steps, self.groups))
        weights: tuple = (1.0, 0.0)
        if self.norm != "layer":
            if batch_size is not None:
                weights = mixing_weights(batch_size[:, 0], self.delta, self.norm)
            elif torch.compiler.is_compiling() or sizes[0] != sizes[-1]:  # sizes fall
                sized = self.population.feature_mean.new_tensor(sizes)[:, None]
                weights = mixing_weights(sized, self.delta, self.norm)
            else:
                weights = mixing_weights(sizes[0], self.delta, self.norm)
        return SequenceNorm(
            weight=self.weight,
            bias=self.bias,
            groups=self.groups,
            scale=scale_factor(self.scale, self.num_features),
            eps=self.eps,
            w_feature=weights[0],
            w_batch=weights[1],
            population=population,
            uses=uses,
            observes=self.training,
        )

    def gather(self, summary: Statistics, sizes: Sequence[int]) -> None:
        """Take in the statistics of all steps of a training sequence, ``sizes[t]`` samples at step ``t``."""
        assert summary.feature_mean is not None
        device, places = summary.feature_mean.device, (len(sizes), self.groups)
        if sizes[0] == sizes[-1]:  # without a copy from the host, which no CUDA graph takes
            seen = torch.full(places, sizes[0], device=device)
        else:
            seen = torch.tensor(sizes, device=device)[:, None].expand(places)
        self.population.gather(Observed(*summary, seen=seen, batch_size=seen))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise one step on its own, shaped ``(B, gates, hidden_size)``."""
        sizes = (x.shape[-3],)
        y, summary = self.sequence(1, sizes)(x[None], slice(None))
        if summary is not None:
            self.gather(summary, sizes)
        return y[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gates={self.gates}, groups={self.groups}"
