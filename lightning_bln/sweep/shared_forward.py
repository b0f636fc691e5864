"""One forward for many modes: the part of a model that holds its BLN layers runs once, and each mode gets its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_bln import _torch
from lightning_bln.modes import StatisticsMode, assign_modes, mode_layers
from lightning_bln.sweep.forward_state import ForwardState
from lightning_bln.sweep.shared_module import UNDECIDED, SharedModule


class SharedForward:
    """Steps of many modes that share the forwards they have in common.

    During a step, the forward of each module that holds every BLN layer is replaced, and the outermost one that is
    called is shared. In the step of a chunk's first mode it lays all modes of the chunk out along the batch axis and
    runs once; in the steps of the others it returns their part of the output if its input is the same.

    On the verification batch every mode also runs unshared, and those outputs are used. A module whose outputs differ,
    that draws random numbers, changes state of its own or has hooks inside is not shared from then on; the next smaller
    one is tried.

    A step that can work with the :class:`PerMode` output of all modes runs once for all, see :meth:`step_jointly`.

    Args:
        model: The model whose layers have modes.
        chunk: The most modes of one forward; fewer where memory does not suffice.
    """

    def __init__(self, model: nn.Module, chunk: int = 16) -> None:
        self.state = ForwardState(mode_layers(model), chunk)
        self.modules = [SharedModule(module, self.state) for module in shareable(model)]
        self.following = ExitStack()
        self.is_verified = False
        """Whether the verification batch has shown that modes can be evaluated jointly."""
        self.reason: str | None = None
        """Why they cannot, or can no longer."""

    @property
    def chunk(self) -> int:
        """The most modes of one forward."""
        return self.state.chunk

    @property
    def is_active(self) -> bool:
        """Whether a module is shared, or may yet be."""
        return any(not module.has_failed for module in self.modules)

    @property
    def failure(self) -> str | None:
        """Reason that no module can be shared; None if one is, or may yet be."""
        if self.is_active:
            return None
        return self.state.failure or "there are forward hooks inside every module that holds all BLN layers"

    def install(self, stack: ExitStack) -> None:
        """Replace the modules' forwards until ``stack`` closes, which ends the batch."""
        stack.callback(self.state.end_batch)
        for module in self.modules:
            if not module.has_failed:
                module.install(stack)

    def step_per_mode(
        self,
        runs: Sequence[Any],
        step: Callable[[Any], Any],
        verify: bool = False,
        follows: StatisticsMode | None = None,
        records: bool = False,
    ) -> None:
        """Call ``step`` with each of ``runs``, which have a ``mode``, on one batch.

        Args:
            runs: One run for each mode; ``step`` sets the mode.
            step: The step of one run.
            verify: Whether to compare the shared output of the first mode with an unshared one again.
            follows: The mode of one more step on the batch, which the caller runs before it calls :meth:`close`.
            records: Whether :meth:`step_jointly` gives, on this batch, the outputs of these steps.
        """
        self.close()
        state = self.state
        state.outputs, state.records = {}, records
        if not self.is_active:
            for run in runs:
                step(run)
            return
        # on verification batches the modes run unshared, and so does the step that follows
        if verify or not any(module.was_checked and not module.has_failed for module in self.modules):
            follows = None
        state.is_verifying, state.in_chunks = verify, state.chunk < len(runs)
        with ExitStack() as stack:
            self.install(stack)
            left = list(runs)
            while left:
                modes = tuple(run.mode for run in left[: state.chunk])
                if follows is not None and len(left) <= state.chunk:
                    if len(left) < state.chunk:
                        modes += (follows,)
                    else:
                        follows = None
                state.begin_chunk(modes)
                while left and state.position < len(state.modes):  # the first mode may shorten the chunk
                    state.calls.clear()
                    step(left.pop(0))
                    state.position += 1
                state.is_verifying = False
            for module in self.modules:
                module.was_checked |= bool(module.axes)
            if follows is not None:
                state.calls.clear()
                self.following = stack.pop_all()

    def step_jointly(
        self,
        modes: Sequence[StatisticsMode],
        step: Callable[[], Any],
        verify: bool = False,
        follows: StatisticsMode | None = None,
    ) -> None:
        """Call ``step`` once for all ``modes``: shared modules return :class:`PerMode` tensors.

        Args:
            modes: The modes, in the order of the parts.
            step: The step; until it ends, no layer has a mode of its own.
            verify: See :meth:`step_per_mode`.
            follows: See :meth:`step_per_mode`.

        Raises:
            NotTogether: A shared module cannot compute all modes, or a layer is called outside of it; errors of
                ``step`` come through as they are.
        """
        self.close()
        state = self.state
        before = [layer.mode for layer in state.layers]
        with ExitStack() as stack:
            self.install(stack)
            state.joint_modes, state.follows, state.is_verifying = tuple(modes), follows, verify
            state.calls.clear()
            assign_modes(state.layers, [UNDECIDED] * len(state.layers))
            try:
                step()
            finally:
                assign_modes(state.layers, before)
                state.joint_modes, state.is_verifying = (), False
                state.outputs = {}
            if follows is not None:
                state.position = -1
                state.calls.clear()
                self.following = stack.pop_all()

    def close(self) -> None:
        """End the step that follows, if there is one."""
        self.following.close()


def shareable(model: nn.Module) -> list[nn.Module]:
    """The modules that hold every layer with a mode and no hooks inside, the outermost first."""
    layers = {id(layer) for layer in mode_layers(model)}
    found = []
    for module in model.modules():
        inside = list(module.modules())
        has_hooks = any(_torch.has_forward_hooks(part) for part in inside if part is not module)
        if not has_hooks and layers <= {id(part) for part in inside}:
            found.append(module)
    return found
