"""Gates of a cell, read by name, of all steps or of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Gates:
    """A tensor ``(..., gates * hidden_size)`` whose gates are read by name; ``+`` adds gate by gate.

    Example:
        >>> gates = Gates(torch.tensor([1.0, 2.0]), ("forget", "cell"))
        >>> (gates + gates).cell
        tensor([4.])
        >>> gates.replace(cell=gates.cell * 5).cell
        tensor([10.])
    """

    def __init__(self, value: Tensor | None, names: tuple[str, ...], parts: dict[str, Tensor] | None = None) -> None:
        self._value, self._names, self._parts = value, names, parts
        self._first: tuple[Tensor, ...] = ()

    def __getattr__(self, name: str) -> Tensor:
        parts = self.split()
        if name not in parts:
            raise AttributeError(f"no gate {name!r}; there are {', '.join(self._names)}")
        return parts[name]

    def __add__(self, other: Gates) -> Gates:
        if other._names != self._names[: len(other._names)]:
            raise TypeError(
                f"{', '.join(other._names)} are not the first of {', '.join(self._names)}; add them by name"
            )
        return Gates(other.plus(self), other._names)

    def plus(self, other: Gates) -> Tensor:
        """The sum of these gates and the first gates of ``other``, side by side."""
        return other.first(len(self._names)) + self.joint()

    def replace(self, **gates: Tensor) -> Gates:
        """Gates with some of them exchanged or added."""
        kept = next((k for k, name in enumerate(self._names) if name in gates), len(self._names))
        first = self.first(kept) if kept else None
        new = Gates(None, self._names, {**self.split(), **gates})
        new._first = () if first is None else (first,)
        return new

    def first(self, number: int) -> Tensor:
        """The first gates side by side, ``(..., number * hidden_size)``, split off so that they get one gradient."""
        if number == len(self._names):
            return self.joint()
        if self._first and self._first[0].shape[-1] * len(self._names) == self._width() * number:
            return self._first[0]
        if self._parts is not None:
            return self.joint()[..., : self._width() * number // len(self._names)]
        size = self._width() // len(self._names)
        first, rest = self.joint().split([number * size, self._width() - number * size], -1)
        parts = (*first.chunk(number, -1), *rest.chunk(len(self._names) - number, -1))
        self._parts, self._first = dict(zip(self._names, parts, strict=True)), (first,)
        return first

    def segments(self) -> dict[tuple[str, ...], Tensor]:
        """All gates in as few tensors as possible, by the names of the gates in each."""
        if self._value is not None:
            return {self._names: self._value}
        parts = dict(self.split())
        found = {}
        for first in self._first:
            names = self._names[: len(self._names) * first.shape[-1] // self._width()]
            found[names] = first
            parts = {name: part for name, part in parts.items() if name not in names}
        return found | {(name,): part for name, part in parts.items()}

    def _width(self) -> int:
        """Features of all gates together."""
        if self._value is not None:
            return self._value.shape[-1]
        parts = self.split()
        return sum(parts[name].shape[-1] for name in self._names)

    def split(self) -> dict[str, Tensor]:
        """Gates by name, ``(..., hidden_size)`` each."""
        if self._parts is None:
            self._parts = dict(zip(self._names, self.joint().chunk(len(self._names), -1), strict=True))
        return self._parts

    def joint(self) -> Tensor:
        """All gates side by side, ``(..., gates * hidden_size)``."""
        if self._value is None:
            parts = self.split()
            self._value = torch.cat([parts[name] for name in self._names], -1)
        return self._value


class Steps:
    """Gates of one step after the other; time is split once, in the form in which the cell reads its gates."""

    def __init__(self, gates: Gates, steps: int, sizes: Sequence[int] | None) -> None:
        self.gates, self.steps, self.sizes = gates, steps, sizes
        self._first: dict[int, tuple[Tensor, ...]] = {}
        self._split: dict[str, tuple[Tensor, ...]] = {}

    def __iter__(self) -> Iterator[Step]:
        return (Step(self, t, None if self.sizes is None else self.sizes[t]) for t in range(self.steps))

    def first(self, number: int, t: int) -> Tensor:
        """The first gates of a step, of all sequences."""
        if number not in self._first:
            self._first[number] = self.gates.first(number).unbind(0)
        return self._first[number][t]

    def part(self, name: str, t: int) -> Tensor:
        """One gate of a step, of all sequences."""
        if name not in self._split:
            self._split[name] = getattr(self.gates, name).unbind(0)
        return self._split[name][t]


class Step(Gates):
    """The gates of step ``t``, of the first ``running`` sequences."""

    def __init__(self, steps: Steps, t: int, running: int | None) -> None:
        super().__init__(None, steps.gates._names)
        self.steps, self.t, self.running = steps, t, running

    def __getattr__(self, name: str) -> Tensor:
        return self.cut(self.steps.part(name, self.t))

    def split(self) -> dict[str, Tensor]:
        """Gates by name."""
        return {name: getattr(self, name) for name in self._names}

    def joint(self) -> Tensor:
        """All gates side by side."""
        return self.first(len(self._names))

    def first(self, number: int) -> Tensor:
        """The first gates side by side."""
        return self.cut(self.steps.first(number, self.t))

    def cut(self, value: Tensor) -> Tensor:
        """The running sequences of ``value``."""
        return value if self.running is None else value[..., : self.running, :]
