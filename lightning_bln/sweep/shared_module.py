"""A module whose forward all modes share: found out on the first batch, computed once for all from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln._torch import OutOfMemoryError, tree_flatten, tree_map, tree_unflatten
from lightning_bln.modes import FanOut, assign_modes, fan_out, mode_layers
from lightning_bln.sweep.per_mode_tensor import NotTogether, PerMode, holds, join_trees
from lightning_bln.sweep.prefix_cache import Prefix, replacing_forward
from lightning_bln.sweep.pytree import close_tree, find_axes, repeated, same_tree

if TYPE_CHECKING:
    from lightning_bln.sweep.shared_forward import SharedForward

BYTES = 2**28
"""What the largest activation may take once it is there for all modes of a chunk."""

CPU_BYTES = 2**23
"""The same on the CPU, whose larger arrays go back to the system after each use and come again page by page."""

FEWEST = 4
"""Modes of a chunk on the CPU, if memory allows, however large their activations: fewer share too little."""

MODULE_INTERNALS = frozenset(nn.Module().__dict__)


class Undecided:
    """The mode of a layer while all modes go together: it has none, and who asks for it cannot go along."""

    @property
    def uses_population(self) -> Any:
        raise NotTogether("a layer is called outside of what the modes share")


UNDECIDED: Any = Undecided()


class Shared(NamedTuple):
    """What one call gave for all modes of a chunk."""

    inputs: tuple[tuple, dict]
    leaves: list[Any]
    spec: Any
    size: int
    """Of the chunk."""


class Site:
    """A module whose forward may be shared."""

    def __init__(self, owner: SharedForward, module: nn.Module) -> None:
        self.owner, self.module = owner, module
        self.failed = False
        self.fans_early = False
        self.was_checked = False
        self.axes: dict[int, list[int | None]] = {}
        self.shared: dict[int, Shared] = {}
        self.outputs: dict[int, list[Any]] = {}
        self.prefixes: dict[int, Prefix] = {}
        self.records = False
        self.calls = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        with replacing_forward(self.module, self.forward) as self.plain:
            yield

    def forward(self, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if owner.is_inside or self.failed or self.module.training:
            return plain(*args, **kwargs)
        call, self.calls = self.calls, self.calls + 1
        if owner.together_modes:
            return self.all_turns(call, args, kwargs)
        output = self.one_turn(call, args, kwargs) if len(owner.modes) > 1 else self.run_plain(args, kwargs)
        if self.records:
            self.outputs.setdefault(call, []).append(output)
        return output

    def one_turn(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The output of the mode whose turn it is, which the first turn computes for all."""
        owner = self.owner
        if owner.turn == 0:
            return self.first_turn(call, args, kwargs)
        shared = self.shared.get(call)
        if shared is None:
            return self.run_plain(args, kwargs)
        if not same_tree(shared.inputs, (args, kwargs)):
            if not self.was_checked:
                owner.give_up(self, "its input depends on the mode")
            return self.run_plain(args, kwargs)
        if self.was_checked:
            return self.part(call, owner.turn)
        output = self.run_plain(args, kwargs)
        if not close_tree(output, self.part(call, owner.turn)):
            owner.give_up(self, "modes in one forward give other results")
        return output

    def first_turn(self, call: int, args: tuple, kwargs: dict) -> Any:
        if self.was_checked and not self.owner.is_rechecking:
            if call not in self.axes:
                return self.run_plain(args, kwargs)
            output = self.fan(call, args, kwargs)
            if output is None:
                return self.run_plain(args, kwargs)
            self.shared[call] = Shared((args, kwargs), *tree_flatten(output), len(self.owner.modes))
            return self.part(call, 0)
        return self.learn(call, args, kwargs)

    def learn(self, call: int, args: tuple, kwargs: dict) -> Any:
        """Run the plain way, then all modes at once; use the first, and find out whether the second will do."""
        before, random = self.state(), torch.get_rng_state()
        with measured(self.module) as largest:
            output = self.run_plain(args, kwargs)
        if not torch.equal(random, torch.get_rng_state()) or before != self.state():
            self.owner.give_up(self, "it draws random numbers or changes state of its own")
            return output
        self.owner.is_learning = True
        try:
            self.owner.shrink(modes_at_once(largest[0], output))
            self.check_in_one_forward(call, args, kwargs, output)
        finally:
            self.owner.is_learning = False
        return output

    def check_in_one_forward(self, call: int, args: tuple, kwargs: dict, output: Any) -> None:
        """Find out how the modes of the chunk go into one forward, of which the first one's own ``output`` is known."""
        owner = self.owner
        if len(owner.modes) < 2:
            return  # they never do
        for early in (False, True) if not self.was_checked else (self.fans_early,):
            self.fans_early = early
            fanned = self.fan_what_fits(call, args, kwargs)
            if fanned is None:
                continue
            axes = find_axes(output, fanned, len(owner.modes))
            if axes is None:
                continue
            self.axes[call] = axes
            self.shared[call] = Shared((args, kwargs), *tree_flatten(fanned), len(owner.modes))
            if close_tree(output, self.part(call, 0)):
                return
        owner.give_up(self, "modes in one forward give other results")

    def fan_what_fits(self, call: int, args: tuple, kwargs: dict) -> Any:
        """:meth:`fan` for fewer modes of the chunk if memory does not do for all."""
        while True:
            asked = len(self.owner.modes)
            fanned = self.fan(call, args, kwargs)
            if fanned is not None or len(self.owner.modes) == asked:
                return fanned

    def all_turns(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The outputs of all modes as one."""
        owner, modes = self.owner, self.owner.together_modes
        if any(holds(leaf) for leaf in tree_flatten((args, kwargs))[0]):
            raise NotTogether("its input depends on the mode")
        if len(self.outputs.get(call, [])) == len(modes):
            return join_trees(self.outputs[call])
        if call not in self.axes:
            raise NotTogether("it is called in another way than before")
        wanted = modes if owner.follows is None else (*modes, owner.follows)
        chunks, leaves = [], []
        owner.in_chunks = owner.chunk < len(wanted)
        start = 0
        while start < len(wanted):
            owner.modes = wanted[start : start + owner.chunk]
            fanned = self.fan(call, args, kwargs)
            if fanned is not None:
                self.shared[call] = Shared((args, kwargs), *tree_flatten(fanned), len(owner.modes))
                chunks.append(self.stacks(call))
                start += len(owner.modes)
            elif owner.chunk < len(owner.modes):
                owner.in_chunks = True
            else:
                raise NotTogether("modes in one forward give no output")
        for axis, *parts in zip(self.axes[call], *chunks, strict=True):
            stack = parts[0] if len(parts) == 1 or axis is None else torch.cat(parts)
            leaves.append(stack if axis is None else PerMode.of_stack(stack[: len(modes)]))
        if owner.is_rechecking:
            assign_modes(owner.layers, modes[:1] * len(owner.layers))
            plain = self.run_plain(args, kwargs)
            assign_modes(owner.layers, [UNDECIDED] * len(owner.layers))
            first = [leaf.parts[0] if isinstance(leaf, PerMode) else leaf for leaf in leaves]
            if not close_tree(plain, tree_unflatten(first, self.shared[call].spec)):
                owner.give_up(self, "modes in one forward give other results")
                raise NotTogether("modes in one forward give other results")
        return tree_unflatten(leaves, self.shared[call].spec)

    def stacks(self, call: int) -> list[Any]:
        """The output of the chunk, each tensor with a first axis of modes."""
        shared = self.shared[call]
        return [
            leaf if axis is None else leaf.unflatten(axis, (shared.size, -1)).movedim(axis, 0).contiguous()
            for leaf, axis in zip(shared.leaves, self.axes[call], strict=True)
        ]

    def run_plain(self, args: tuple, kwargs: dict) -> Any:
        self.owner.is_inside = True
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.owner.is_inside = False

    def fan(self, call: int, args: tuple, kwargs: dict) -> Any:
        """The output for all modes of the chunk, or None where that cannot be had."""
        modes = self.owner.modes
        self.owner.is_inside = True
        try:
            with fan_out(self.module, modes) as fan, self.prefix(call, fan):
                if self.fans_early:
                    fan.is_fanned = True
                    args, kwargs = tree_map(lambda one: repeated(one, len(modes)), (args, kwargs))
                return self.plain(*args, **kwargs)
        except Exception as error:
            # whatever it is, the plain way comes next, and raises what is the user's
            if is_out_of_memory(error) and len(modes) > 3:
                self.owner.shrink(len(modes) // 2)
            elif not self.owner.is_learning:
                self.owner.give_up(self, f"it raised {type(error).__name__}")
            return None
        finally:
            self.owner.is_inside = False

    def prefix(self, call: int, fan: FanOut) -> AbstractContextManager[None]:
        """Within the context, one chunk's forward takes from another's what comes before the modes."""
        if not self.owner.in_chunks:
            return nullcontext()
        return self.prefixes.setdefault(call, Prefix(self.module)).shared(fan)

    def part(self, call: int, turn: int) -> Any:
        """The output of the mode whose turn it is; the last of the chunk has turn -1 too."""
        shared, leaves = self.shared[call], []
        for leaf, axis in zip(shared.leaves, self.axes[call], strict=True):
            if axis is not None:
                length = leaf.shape[axis] // shared.size
                leaf = leaf.narrow(axis, turn % shared.size * length, length).contiguous()
            leaves.append(leaf)
        return tree_unflatten(leaves, shared.spec)

    def state(self) -> list[tuple[int, int]]:
        """What a forward could leave behind in plain attributes and buffers, to be compared."""
        found = []
        for module in self.module.modules():
            values = [value for name, value in module.__dict__.items() if name not in MODULE_INTERNALS]
            for value in [*values, *module._buffers.values()]:
                size = len(value) if isinstance(value, (list, dict, set)) else 0
                found.append((id(value), value._version if is_versioned(value) else size))
        return found


def modes_at_once(largest: int, output: Any) -> int:
    """How many modes of a model with that largest activation, in bytes, a chunk should have."""
    most = BYTES // max(1, largest)
    is_on_cpu = all(leaf.device.type == "cpu" for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))
    return min(most, max(FEWEST, CPU_BYTES // max(1, largest))) if is_on_cpu else most


def is_versioned(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextmanager
def measured(module: nn.Module) -> Iterator[list[int]]:
    """Within the context, the bytes of the largest tensor that a module inside returns from the first mode layer on."""
    largest = [0]
    has_begun = False

    def note(part: nn.Module, _: Any, output: Any) -> None:
        nonlocal has_begun
        has_begun = has_begun or bool(mode_layers(part))
        sizes = [leaf.nbytes for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        largest[0] = max(largest[0], *sizes, 0) if has_begun else 0

    hooks = [part.register_forward_hook(note) for part in module.modules() if part is not module]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
