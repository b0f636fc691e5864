"""State that the shared modules of one model have in common."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_bln.modes import HasMode, StatisticsMode
from lightning_bln.sweep.prefix_cache import Prefix

Call = tuple[Any, int]
"""A shared module, and the index of one of its calls within a step."""


class SharedOutput(NamedTuple):
    """Output of one call for all modes of a chunk, as leaves and structure."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    leaves: list[Any]
    spec: Any
    size: int
    """Number of modes in the chunk."""


@dataclass(eq=False)
class ForwardState:
    """Progress through the modes at one batch, and what has been computed for them.

    :class:`~lightning_bln.sweep.shared_forward.SharedForward` leads through modes and chunks, each
    :class:`~lightning_bln.sweep.shared_module.SharedModule` looks up whose output is asked for and stores what it has.

    Args:
        layers: The layers that have a mode.
        chunk: The most modes of one forward; lowered for good where memory does not suffice.
    """

    layers: list[HasMode]
    chunk: int
    modes: tuple[StatisticsMode, ...] = ()
    """Modes of the current chunk."""
    position: int = 0
    """Index of the current mode in the chunk, -1 for the last one."""
    joint_modes: tuple[StatisticsMode, ...] = ()
    """Modes of a joint evaluation; empty during per-mode evaluation."""
    follows: StatisticsMode | None = None
    """Mode of the caller's own step after a joint evaluation."""
    in_chunks: bool = False
    """Whether the batch needs several chunks, which then share what precedes the first layer with a mode."""
    is_inside: bool = False
    """Whether a shared module is running; the shared modules inside it then run unshared."""
    is_verifying: bool = False
    """Whether the first mode also runs unshared, to be compared."""
    is_learning: bool = False
    """Whether a module is trying out its first shared forward; an error in it is no failure yet."""
    records: bool = False
    """Whether to keep each mode's output for the joint evaluation of the same batch."""
    failure: str | None = None
    """Why the module that failed last cannot be shared."""
    calls: Counter[Any] = field(default_factory=Counter)
    """How often each module was called in the current step."""
    shared: dict[Call, SharedOutput] = field(default_factory=dict)
    outputs: dict[Call, list[Any]] = field(default_factory=dict)
    """The recorded outputs, mode by mode."""
    prefixes: dict[Call, Prefix] = field(default_factory=dict)

    def begin_chunk(self, modes: tuple[StatisticsMode, ...]) -> None:
        self.modes, self.position = modes, 0
        self.shared.clear()

    def end_batch(self) -> None:
        self.modes, self.records = (), False
        self.shared.clear()
        self.prefixes.clear()

    def shrink(self, size: int) -> None:
        """Run at most ``size`` modes in one forward from now on."""
        self.chunk = max(1, min(self.chunk, size))
        if self.is_learning and self.chunk < len(self.modes):
            self.modes, self.in_chunks = self.modes[: self.chunk], True
            self.shared.clear()

    def fail(self, module: Any, reason: str) -> None:
        """Drop the outputs of ``module``, which is not shared any more."""
        self.failure = reason
        self.shared = {call: output for call, output in self.shared.items() if call[0] is not module}
