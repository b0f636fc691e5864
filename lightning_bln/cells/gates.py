"""The gates of a cell, read by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Gates:
    """A tensor ``(..., gates * hidden_size)`` whose gates are read by name; two of them add up.

    Example:
        >>> gates = Gates(torch.tensor([1.0, 2.0]), ("forget", "cell"))
        >>> (gates + gates).cell
        tensor([4.])
        >>> gates.replace(cell=gates.cell * 5).cell
        tensor([10.])
    """

    def __init__(self, value: Tensor | None, names: tuple[str, ...], parts: dict[str, Tensor] | None = None) -> None:
        self._value, self._names, self._parts = value, names, parts

    def __getattr__(self, name: str) -> Tensor:
        parts = self.split()
        if name not in parts:
            raise AttributeError(f"no gate {name!r}; there are {', '.join(self._names)}")
        return parts[name]

    def __add__(self, other: Gates) -> Gates:
        return Gates(other.plus(self), self._names)

    def plus(self, other: Gates) -> Tensor:
        """All gates of the sum."""
        return other.joint() + self.joint()

    def replace(self, **gates: Tensor) -> Gates:
        """The same gates with some of them changed."""
        return Gates(None, self._names, {**self.split(), **gates})

    def split(self) -> dict[str, Tensor]:
        """Each gate on its own, ``(..., hidden_size)``."""
        if self._parts is None:
            self._parts = dict(zip(self._names, self.joint().chunk(len(self._names), -1), strict=True))
        return self._parts

    def joint(self) -> Tensor:
        """All gates, ``(..., gates * hidden_size)``."""
        if self._value is None:
            parts = self.split()
            self._value = torch.cat([parts[name] for name in self._names], -1)
        return self._value


class Steps:
    """The gates of each step, time being their first axis; cut in the form that the step reads, once for all steps."""

    def __init__(self, gates: Gates, steps: int, sizes: Sequence[int] | None) -> None:
        self.gates, self.steps, self.sizes = gates, steps, sizes
        self._joint: tuple[Tensor, ...] | None = None
        self._split: dict[str, tuple[Tensor, ...]] = {}

    def __iter__(self) -> Iterator[Step]:
        return (Step(self, t, None if self.sizes is None else self.sizes[t]) for t in range(self.steps))

    def joint(self, t: int) -> Tensor:
        """All gates of a step, of all samples."""
        if self._joint is None:
            self._joint = self.gates.joint().unbind(0)
        return self._joint[t]

    def part(self, name: str, t: int) -> Tensor:
        """One gate of a step, of all samples."""
        if name not in self._split:
            self._split[name] = getattr(self.gates, name).unbind(0)
        return self._split[name][t]


class Step(Gates):
    """The gates of step ``t``, of the first ``running`` samples."""

    def __init__(self, steps: Steps, t: int, running: int | None) -> None:
        super().__init__(None, steps.gates._names)
        self.steps, self.t, self.running = steps, t, running

    def __getattr__(self, name: str) -> Tensor:
        return self.cut(self.steps.part(name, self.t))

    def split(self) -> dict[str, Tensor]:
        """Each gate on its own."""
        return {name: getattr(self, name) for name in self._names}

    def joint(self) -> Tensor:
        """All gates."""
        return self.cut(self.steps.joint(self.t))

    def cut(self, value: Tensor) -> Tensor:
        """Those samples of ``value`` that still run."""
        return value if self.running is None else value[..., : self.running, :]
