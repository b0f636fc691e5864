"""Distributions of hyperparameters, independent of the engine that draws from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_bln.functional import NORMS
from lightning_bln.modes import ALL_MODES, StatisticsMode


def suggest_mode(trial: Any, name: str = "mode", modes: Sequence[str] = ALL_MODES) -> StatisticsMode:
    """A statistics mode as a hyperparameter of an Optuna trial.

    It is meant for an objective that evaluates a model in one mode. :class:`~lightning_bln.tuning.Objective` needs no
    such hyperparameter, since it evaluates each model in every mode.

    Args:
        trial: An Optuna trial.
        name: The hyperparameter's name.
        modes: The modes to choose from.

    Example:
        >>> from optuna.trial import FixedTrial
        >>> suggest_mode(FixedTrial({"mode": "pccp"})).uses_population
        (True, False, False, True)
    """
    return StatisticsMode(trial.suggest_categorical(name, [str(StatisticsMode(mode)) for mode in modes]))


def suggest_norm(trial: Any, name: str = "norm", norms: Sequence[str | None] = NORMS) -> str | None:
    """A normalization as a hyperparameter of an Optuna trial: ``"bln"``, ``"layer"`` or ``"batch"``.

    Args:
        trial: An Optuna trial.
        name: The hyperparameter's name.
        norms: The norms to choose from; ``None`` among them stands for no normalization.

    Example:
        >>> from optuna.trial import FixedTrial
        >>> suggest_norm(FixedTrial({"norm": "layer"}))
        'layer'
    """
    return trial.suggest_categorical(name, list(norms))


@dataclass(frozen=True)
class Distribution:
    """The distribution of a hyperparameter: a list of choices, or a range.

    Args:
        choices: The values to choose from.
        low: The smallest value of a range, which is one of integers if both ends are.
        high: The largest value.
        log: Whether the logarithm is distributed uniformly.
        step: The distance between neighbouring values.

    Raises:
        ValueError: The arguments make neither a list of choices nor a range, or both.

    Example:
        >>> Distribution(low=1e-4, high=1e-2, log=True).is_integer
        False
    """

    choices: tuple[Any, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        if self.choices is not None:
            object.__setattr__(self, "choices", tuple(self.choices))
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError(f"choices={self.choices}, but there must be some, and then neither low nor high")
        elif self.low is None or self.high is None:
            raise ValueError(f"low={self.low} and high={self.high}, but a range needs both; or give choices")
        elif not self.low <= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low}, but it must be at most high={self.high}, and positive where log is set")
        elif self.log and self.step is not None:
            raise ValueError(f"step={self.step}, but a logarithmic range has none; take one of the two away")

    @classmethod
    def parse(cls, name: str, spec: Any) -> Distribution:
        """The distribution of ``name`` as YAML gives it: a list of choices, or a mapping of the arguments above."""
        if isinstance(spec, (list, tuple)):
            return cls(choices=tuple(spec))
        try:
            return cls(**{key: number(value) for key, value in spec.items()})
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"search.{name}={spec!r} is no distribution ({error}); write [a, b], {{choices: [a, b]}} or "
                "{low: 1, high: 9, log: false, step: 1}"
            ) from None

    @property
    def is_integer(self) -> bool:
        """Whether it is a range of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def first(self) -> Any:
        """The first choice, or the lower end of the range."""
        return self.low if self.choices is None else self.choices[0]

    def suggest(self, trial: Any, name: str) -> Any:
        """Draw a value by an Optuna trial."""
        if self.choices is not None:
            return trial.suggest_categorical(name, list(self.choices))
        if self.is_integer:
            return trial.suggest_int(name, self.low, self.high, log=self.log, step=int(self.step or 1))
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)


def number(value: Any) -> Any:
    """``value``, converted where it is a string such as ``1e-3``, a number that YAML 1.1 reads as text."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def suggest(trial: Any, space: Mapping[str, Distribution]) -> dict[str, Any]:
    """Draw a value of every hyperparameter in ``space`` by an Optuna trial."""
    return {name: distribution.suggest(trial, name) for name, distribution in space.items()}
