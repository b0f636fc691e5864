"""A module whose forward all modes share: verified on the first batch, computed once for all modes from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln import _torch
from lightning_bln._scoped import setting
from lightning_bln._torch import MODULE_INTERNALS, OutOfMemoryError, tree_flatten, tree_map, tree_unflatten
from lightning_bln.modes import FanOut, assign_modes, fan_out, mode_layers
from lightning_bln.sweep.forward_state import ForwardState, SharedOutput
from lightning_bln.sweep.per_mode_tensor import NotTogether, first_part, holds, join_stacks, join_trees, reason_of
from lightning_bln.sweep.prefix_cache import Prefix, replacing_forward
from lightning_bln.sweep.pytree import (
    find_axes,
    have_parts,
    is_close,
    is_same_input,
    part_of,
    repeated,
    stack_of,
    tensors,
    trees_match,
)

BYTES = 2**28
"""Upper bound of the largest activation, fanned out for all modes of a chunk."""

CPU_BYTES = 2**23
"""The same bound on the CPU, where larger arrays are returned to the system after each use and faulted in again."""

FEWEST = 4
"""Modes of a chunk on the CPU, if :data:`BYTES` allows, however large the activations: fewer share too little."""

INPUT_DIFFERS = "its input depends on the mode"
OUTPUT_DIFFERS = "modes in one forward give other results"


class Undecided:
    """Sentinel mode during joint evaluation; reading it raises :class:`NotTogether`."""

    @property
    def uses_population(self) -> Any:
        raise NotTogether("a layer is called outside of what the modes share")


UNDECIDED: Any = Undecided()


class SharedModule:
    """Replacement of a module's forward that computes the modes of a chunk in one.

    Args:
        module: The module, with every layer that has a mode inside.
        state: The state it has in common with other modules of the model.
    """

    def __init__(self, module: nn.Module, state: ForwardState) -> None:
        self.module, self.state = module, state
        self.has_failed = False
        self.was_checked = False
        self.fans_early = False
        """Whether modes are laid out along the input's batch axis, not by the first layer with a mode."""
        self.axes: dict[int, list[int | None]] = {}
        """For each call, the axes along which the leaves of its output hold modes."""
        self.error = ""

    def install(self, stack: ExitStack) -> None:
        """Replace the module's forward until ``stack`` closes."""
        self.plain = stack.enter_context(replacing_forward(self.module, self.forward))

    def forward(self, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.is_inside or self.has_failed or self.module.training:
            return plain(*args, **kwargs)
        call = state.calls[self]
        state.calls[self] = call + 1
        if state.joint_modes:
            return self.joint_output(call, args, kwargs)
        output = self.mode_output(call, args, kwargs) if len(state.modes) > 1 else self.run_plain(args, kwargs)
        if state.records:
            state.outputs.setdefault((self, call), []).append(output)
        return output

    def mode_output(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The output in the current mode; the chunk's first mode computes it for all."""
        position = self.state.position
        if position == 0:
            return self.first_output(call, args, kwargs)
        shared = self.state.shared.get((self, call))
        if shared is None:
            return self.run_plain(args, kwargs)
        if not trees_match(shared.inputs, (args, kwargs), is_same_input):
            if not self.was_checked:
                self.give_up(INPUT_DIFFERS)
            return self.run_plain(args, kwargs)
        if self.was_checked:
            return self.part(call, position)
        output = self.run_plain(args, kwargs)
        if not trees_match(output, self.part(call, position), is_close):
            self.give_up(OUTPUT_DIFFERS)
        return output

    def first_output(self, call: int, args: tuple, kwargs: dict) -> Any:
        if not self.was_checked or self.state.is_verifying:
            return self.learn(call, args, kwargs)
        if call not in self.axes or self.fan(call, args, kwargs) is None:
            return self.run_plain(args, kwargs)
        return self.part(call, 0)

    def learn(self, call: int, args: tuple, kwargs: dict) -> Any:
        """Return the output of an unshared forward, and find out whether a shared one gives the same."""
        before, random = self.snapshot(), torch.get_rng_state()
        with measured(self.module) as largest:
            output = self.run_plain(args, kwargs)
        if not torch.equal(random, torch.get_rng_state()) or before != self.snapshot():
            self.give_up("it draws random numbers or changes state of its own")
            return output
        with setting([self.state], is_learning=True):
            self.state.shrink(modes_at_once(largest[0], output))
            self.check_shared_forward(call, args, kwargs, output)
        return output

    def check_shared_forward(self, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        """Find a way to compute the chunk's modes in one forward that gives ``output`` for the first mode."""
        state = self.state
        if len(state.modes) < 2:
            return
        reason = OUTPUT_DIFFERS
        for early in (False, True) if not self.was_checked else (self.fans_early,):
            self.fans_early = early
            fanned = self.fan_what_fits(call, args, kwargs)
            if fanned is None:
                reason = f"all modes in one forward raise {self.error}"
                continue
            reason = OUTPUT_DIFFERS
            axes = find_axes(output, fanned, len(state.modes))
            if axes is None:
                continue
            self.axes[call] = axes
            if trees_match(output, self.part(call, 0), is_close):
                return
        self.give_up(reason)

    def fan_what_fits(self, call: int, args: tuple, kwargs: dict) -> Any:
        """:meth:`fan`, repeated for a smaller chunk as long as memory does not suffice."""
        while True:
            asked = len(self.state.modes)
            fanned = self.fan(call, args, kwargs)
            if fanned is not None or len(self.state.modes) == asked:
                return fanned

    def joint_output(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The output with a :class:`PerMode` for each tensor that differs between modes."""
        state, modes = self.state, self.state.joint_modes
        if holds(tree_flatten((args, kwargs))[0]):
            raise NotTogether(self.refusal(INPUT_DIFFERS))
        recorded = state.outputs.get((self, call), [])
        if len(recorded) == len(modes):
            return join_trees(recorded)
        if call not in self.axes:
            # on the verification batch an outer module was tried instead, or nothing was called here
            raise NotTogether(
                state.failure or self.refusal("it is called in another way than on the verification batch")
            )
        leaves = [
            parts[0] if axis is None else join_stacks(parts, len(modes))
            for axis, *parts in zip(self.axes[call], *self.chunk_outputs(call, args, kwargs), strict=True)
        ]
        spec = state.shared[self, call].spec
        if state.is_verifying:
            assign_modes(state.layers, modes[:1] * len(state.layers))
            plain = self.run_plain(args, kwargs)
            assign_modes(state.layers, [UNDECIDED] * len(state.layers))
            first = [first_part(leaf) for leaf in leaves]
            if not trees_match(plain, tree_unflatten(first, spec), is_close):
                self.give_up(OUTPUT_DIFFERS)
                raise NotTogether(self.refusal(OUTPUT_DIFFERS))
        return tree_unflatten(leaves, spec)

    def chunk_outputs(self, call: int, args: tuple, kwargs: dict) -> list[list[Any]]:
        """The leaves of each chunk's output, tensors with a first axis of modes; the mode that follows comes last."""
        state = self.state
        wanted = state.joint_modes if state.follows is None else (*state.joint_modes, state.follows)
        state.in_chunks = state.chunk < len(wanted)
        chunks, start = [], 0
        while start < len(wanted):
            state.modes = wanted[start : start + state.chunk]
            if self.fan(call, args, kwargs) is not None:
                chunks.append(self.stacks(call))
                start += len(state.modes)
            elif state.chunk < len(state.modes):
                state.in_chunks = True
            else:
                raise NotTogether(self.refusal(f"it raised {self.error}"))
        return chunks

    def stacks(self, call: int) -> list[Any]:
        """The leaves of the chunk's output, tensors with a first axis of modes."""
        shared = self.state.shared[self, call]
        return [stack_of(*pair, shared.size) for pair in zip(shared.leaves, self.axes[call], strict=True)]

    def part(self, call: int, position: int) -> Any:
        """The output in the mode at ``position`` in the chunk."""
        shared = self.state.shared[self, call]
        pairs = zip(shared.leaves, self.axes[call], strict=True)
        return tree_unflatten([part_of(*pair, shared.size, position) for pair in pairs], shared.spec)

    def run_plain(self, args: tuple, kwargs: dict) -> Any:
        """The unshared forward."""
        with setting([self.state], is_inside=True):
            return self.plain(*args, **kwargs)

    def fan(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The output for all modes of the chunk, also kept; None after an error, which :attr:`error` then tells."""
        state, modes, inputs = self.state, self.state.modes, (args, kwargs)
        try:
            with fan_out(self.module, modes) as fan, self.prefix(call, fan):
                if self.fans_early:
                    fan.is_fanned = True
                    args, kwargs = tree_map(lambda one: repeated(one, len(modes)), inputs)
                output = self.run_plain(args, kwargs)
            leaves, spec = tree_flatten(output)
            if not state.is_learning and not have_parts(leaves, self.axes[call], len(modes)):
                raise ValueError("its output has another form than on the verification batch")
            state.shared[self, call] = SharedOutput(inputs, leaves, spec, len(modes))
            return output
        except Exception as error:
            # fall back to unshared forwards; user errors resurface there
            self.error = reason_of(error)
            if is_out_of_memory(error) and len(modes) > 3:
                state.shrink(len(modes) // 2)
            elif not state.is_learning:
                self.give_up(f"it raised {self.error}")
            return None

    def prefix(self, call: int, fan: FanOut) -> AbstractContextManager[None]:
        """Within the context, a chunk's forward reuses what the batch's other chunks computed before the modes."""
        if not self.state.in_chunks:
            return nullcontext()
        return self.state.prefixes.setdefault((self, call), Prefix(self.module)).shared(fan)

    def give_up(self, reason: str) -> None:
        """Run the module unshared for good."""
        self.has_failed = True
        self.state.fail(self, self.refusal(reason))

    def refusal(self, reason: str) -> str:
        return f"{type(self.module).__name__} cannot be shared, since {reason}"

    def snapshot(self) -> list[tuple[int, int]]:
        """Identity, and version or size, of every plain attribute and buffer, one of which changes where state does."""
        found = []
        for module in self.module.modules():
            values = [value for name, value in module.__dict__.items() if name not in MODULE_INTERNALS]
            for value in [*values, *module.buffers(recurse=False)]:
                is_counted = isinstance(value, Tensor) and not value.is_inference()
                size = len(value) if isinstance(value, (list, dict, set)) else 0
                found.append((id(value), _torch.writes(value) if is_counted else size))
        return found


def modes_at_once(largest: int, output: Any) -> int:
    """The number of modes in a chunk, for a model whose largest activation has ``largest`` bytes."""
    most = BYTES // max(1, largest)
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in tensors(output))
    return min(most, max(FEWEST, CPU_BYTES // max(1, largest))) if is_on_cpu else most


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextmanager
def measured(module: nn.Module) -> Iterator[list[int]]:
    """Within the context, record the bytes of the largest tensor that a part returns, from the first mode layer on."""
    largest = [0]
    has_begun = False

    def note(part: nn.Module, _: Any, output: Any) -> None:
        nonlocal has_begun
        has_begun = has_begun or bool(mode_layers(part))
        if has_begun:
            largest[0] = max(largest[0], *(tensor.nbytes for tensor in tensors(output)), 0)

    hooks = [part.register_forward_hook(note) for part in module.modules() if part is not module]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
