"""The gates of a cell, read by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Gates:
    """A tensor ``(..., gates, hidden_size)`` whose gates are read by name; two of them add up.

    Example:
        >>> gates = Gates(torch.tensor([[1.0], [2.0]]), ("forget", "cell"))
        >>> (gates + gates).cell
        tensor([4.])
        >>> gates.replace(cell=gates.cell * 5).cell
        tensor([10.])
    """

    __slots__ = ("_names", "_parts", "_value")

    def __init__(self, value: Tensor | None, names: tuple[str, ...], parts: dict[str, Tensor] | None = None) -> None:
        self._value, self._names, self._parts = value, names, parts

    def __getattr__(self, name: str) -> Tensor:
        parts = self.split()
        if name not in parts:
            raise AttributeError(f"no gate {name!r}; there are {', '.join(self._names)}")
        return parts[name]

    def __add__(self, other: Gates) -> Gates:
        return Gates(self.joint() + other.joint(), self._names)

    def replace(self, **gates: Tensor) -> Gates:
        """The same gates with some of them changed."""
        return Gates(None, self._names, {**self.split(), **gates})

    def split(self) -> dict[str, Tensor]:
        """Each gate on its own, ``(..., hidden_size)``."""
        if self._parts is None:
            assert self._value is not None
            self._parts = dict(zip(self._names, self._value.unbind(-2), strict=True))
        return self._parts

    def joint(self) -> Tensor:
        """All gates, ``(..., gates, hidden_size)``."""
        if self._value is None:
            self._value = torch.stack(list(self.split().values()), -2)
        return self._value

    def steps(self, sizes: Sequence[int] | None) -> Iterator[Gates]:
        """The gates of each step, time being their first axis; those of the first ``sizes[t]`` samples."""
        return Steps(self, sizes)


class Steps:
    """Cuts gates at each step in the form that the step reads, all steps in one operation."""

    def __init__(self, gates: Gates, sizes: Sequence[int] | None) -> None:
        self.gates, self.sizes = gates, sizes
        self._joint: tuple[Tensor, ...] | None = None
        self._split: dict[str, tuple[Tensor, ...]] = {}

    def __iter__(self) -> Iterator[Gates]:
        first = next(iter(self.gates.split().values())) if self.gates._value is None else self.gates._value
        return (Step(self, t, None if self.sizes is None else self.sizes[t]) for t in range(len(first)))

    def joint(self, t: int, running: int | None) -> Tensor:
        """All gates of a step."""
        if self._joint is None:
            self._joint = self.gates.joint().unbind(0)
        value = self._joint[t]
        return value if running is None or running == value.shape[-3] else value[..., :running, :, :]

    def part(self, name: str, t: int, running: int | None) -> Tensor:
        """One gate of a step."""
        if name not in self._split:
            self._split[name] = getattr(self.gates, name).unbind(0)
        value = self._split[name][t]
        return value if running is None or running == value.shape[-2] else value[..., :running, :]


class Step(Gates):
    """The gates of one step."""

    __slots__ = ("_at", "_steps")

    def __init__(self, steps: Steps, t: int, running: int | None) -> None:
        super().__init__(None, steps.gates._names)
        self._steps, self._at = steps, (t, running)

    def __getattr__(self, name: str) -> Tensor:
        return self._steps.part(name, *self._at)

    def split(self) -> dict[str, Tensor]:
        """Each gate on its own."""
        return {name: getattr(self, name) for name in self._names}

    def joint(self) -> Tensor:
        """All gates."""
        return self._steps.joint(*self._at)
