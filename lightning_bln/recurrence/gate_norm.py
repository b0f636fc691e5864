"""Normalization of a recurrent cell's gates: statistics of each time step, and of each gate or of all at once."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from lightning_bln._checks import check_bool, check_choice, check_int
from lightning_bln._torch import own_buffers
from lightning_bln.equation import Equation, Source, Statistics, normalize_by
from lightning_bln.functional import NORMS
from lightning_bln.norm import Normalization
from lightning_bln.norm_warnings import warn_single
from lightning_bln.recurrence.sequences import Running

START_SCALES = {"bln": 0.3, "layer": 1.0, "batch": 0.1}


OF_NORM = attrgetter("norm", "eps", "delta", "scale", "groups", "mode", "fan", "training")
OF_POPULATION = attrgetter("is_stale", "estimator", "momentum", "merge_positions", "stands_for", "ignores_batch")


class SequenceNorm(NamedTuple):
    """A norm for the steps of one sequence.

    ``G'`` groups of gates share feature statistics over ``H'`` features each: ``(gates, hidden_size)`` for statistics
    of each gate, ``(1, gates * hidden_size)`` for joint ones.
    """

    equation: Equation
    """Weight and bias of shape ``(G' * H')``; mixing weights are numbers, or ``(T, 1)`` for one at each step."""
    source: Source
    """The population's statistics of each step, ``(T, G', H')`` and ``(T, G', 1)``; none in training."""
    groups: int
    observes: bool
    """Whether the statistics are gathered."""
    rows: Tensor | None = None
    """The mixing weights as kernels read them, where they are known."""

    def __call__(self, x: Tensor, t: int | slice, mask: Tensor | None = None) -> tuple[Tensor, Statistics | None]:
        """Normalise one step or all of them.

        Args:
            x: Step ``t``, ``(..., B, G, H)``, or all steps, ``(T, ..., B, G, H)``.
            t: The step, or a slice of all.
            mask: Running sequences at all steps, ``(T, B, 1)``.

        Returns:
            The normalised input, and if observed the statistics of each place, ``(G')`` or ``(T, G')``.
        """
        grouped = x.reshape(*x.shape[:-2], self.groups, -1)
        has_time = isinstance(t, slice)
        if has_time:  # time and groups are positions, which follow the batch axis
            grouped = grouped.movedim(0, -3)
            mask = None if mask is None else mask.movedim(0, -2).expand(grouped.shape[:-1])
        norm = self.at(t)
        weight, bias, scale, eps, *mixing = norm.equation
        mixing = [one[..., None] if has_time and isinstance(one, Tensor) and one.ndim else one for one in mixing]
        weight, bias = (None if p is None else p.view(self.groups, -1) for p in (weight, bias))
        equation, over = Equation(weight, bias, scale, eps, *mixing), (grouped.ndim - (4 if has_time else 3),)
        y, observed = normalize_by(grouped, equation, norm.source, over, mask, self.observes)
        return (y.movedim(-3, 0) if has_time else y).reshape(x.shape), observed

    def of_mode(self, index: int) -> SequenceNorm:
        """The norm in one of the modes of a fan-out."""
        uses = tuple(bool(use[index]) if isinstance(use, Tensor) else use for use in self.source.uses)
        return self._replace(source=self.source._replace(uses=uses))

    def at(self, t: int | slice) -> SequenceNorm:
        """The norm at some of its steps."""

        def cut(value: Any) -> Any:
            return value[t] if isinstance(value, Tensor) and value.ndim else value

        w_feature, w_batch = cut(self.equation.w_feature), cut(self.equation.w_batch)
        return self._replace(
            equation=self.equation._replace(w_feature=w_feature, w_batch=w_batch),
            source=self.source._replace(given=Statistics(*map(cut, self.source.given))),
            rows=None,
        )


class GateNorm(Normalization):
    """A norm inside a recurrent cell, with a weight for each gate and unit and statistics of each time step.

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
        check_choice("norm", norm, NORMS)
        check_choice("gate_statistics", gate_statistics, ("separate", "joint"))
        check_choice("time_statistics", time_statistics, ("separate", "shared"))
        hidden_size, gates = check_int("hidden_size", hidden_size, 1), check_int("gates", gates, 1)
        groups = gates if gate_statistics == "separate" else 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            gates * hidden_size // groups,
            norm=norm,
            eps=eps,
            delta=delta,
            affine=False,
            scale=START_SCALES[norm] if scale is None else scale,
            population=population,
            momentum=momentum,
            **factory,
        )
        self.groups, self.gates = groups, gates
        self._register_affine(gates * hidden_size, True, check_bool("bias", bias), factory)
        self.population.merge_positions = time_statistics == "shared"

    def sequence(self, running: Running) -> SequenceNorm:
        """The norm for the steps of a batch of sequences."""
        warn_single(self, running.samples)
        source, frozen_size = self._source((running.steps, self.groups), running.start)
        if frozen_size is None:
            steps = slice(running.start, running.start + running.steps)
            mixing = self._mixing(self._batch_size(running), steps=steps)
        else:
            mixing = self._mixing(running.samples, frozen_size[:, 0])  # groups have it in common
        return SequenceNorm(self._equation(mixing), source, self.groups, self.training, mixing.rows)

    @property
    def steps_known(self) -> int:
        """Steps of the frozen population."""
        return len(self.population.batch_size)

    def given(self) -> Mapping[str, Tensor | None]:
        """The frozen population's buffers by their names, as they are."""
        return own_buffers(self.population)

    def reads(self) -> tuple[str, ...] | None:
        """Names of those that evaluation reads, the batch sizes last; ``None`` where nothing is frozen."""
        if not self.population.is_frozen:
            return None
        uses = zip(Statistics._fields, self.mode.uses_population, strict=True)
        return (*(name for name, is_used in uses if is_used), "batch_size")

    def mixing_rows(self) -> Tensor | None:
        """The frozen population's mixing weights as kernels read them, ``(2, T)``."""
        return self.sequence(Running(self.steps_known, 1)).rows

    def options(self) -> tuple[Any, ...]:
        """All but tensors that the result, what is gathered and what is warned of hang on."""
        population = self.population
        known = OF_NORM(self), OF_POPULATION(population), population.training_sizes is None
        return (*known, ref(population))

    def _batch_size(self, running: Running) -> float | Tensor:
        """Running sequences, a number or one for each step, ``(T, 1)``."""
        if self.norm == "layer":
            return running.samples
        assert self.weight is not None
        sizes = running.counts(self.weight.device)
        if isinstance(sizes, Tensor):
            return sizes.to(torch.promote_types(self.weight.dtype, torch.float32))
        if torch.compiler.is_compiling():  # one graph for batches of any size
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return self.weight.new_full((running.steps, 1), sizes, dtype=dtype)
        return sizes

    def _broadcast(self, sizes: Tensor) -> Tensor:
        return sizes[:, :1]  # groups have it in common

    def gather_steps(self, observed: Statistics, running: Running) -> None:
        """Let the population take in all steps of a batch of training sequences."""
        assert observed.feature_mean is not None
        counts = running.counts(observed.feature_mean.device)
        self.gather(observed, counts, counts, start=running.start)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # cells know which sequences run
        """Normalise one step on its own, shaped ``(B, gates, hidden_size)``."""
        running = Running(1, x.shape[-3])
        y, observed = self.sequence(running)(x[None], slice(None))
        if observed is not None:
            self.gather_steps(observed, running)
        return y[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gates={self.gates}, groups={self.groups}"
