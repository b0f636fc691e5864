"""One forward for many modes: a step is run once for several, and what a model computed then is used again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bln import _torch
from lightning_bln._torch import OutOfMemoryError, eagerly, storage_address, tree_flatten, tree_map
from lightning_bln.modes import Stacked, StatisticsMode, mode_layers
from lightning_bln.per_mode import NotTogether, PerMode, holds, part_of, reason_of
from lightning_bln.per_mode.writes import WRITTEN
from lightning_bln.sweep.prefix_cache import Prefix, replacing_forward
from lightning_bln.sweep.pytree import is_same_input, kept, trees_match
from lightning_bln.sweep.random_state import RandomState
from lightning_bln.sweep.snapshot import isolated, snapshot

BYTES = 2**28
"""Upper bound of the largest activation, for all modes of a chunk."""

CPU_BYTES = 2**23
"""The same bound on the CPU, where larger arrays are returned to the system after each use and faulted in again."""

FEWEST = 4
"""Modes of a chunk on the CPU, if :data:`BYTES` allows, however large the activations: fewer share too little."""

UNKNOWN = 2
"""Modes of a chunk before the size of activations is known."""


class Undecided:
    """Sentinel mode while several run together; reading it raises :class:`NotTogether`."""

    @property
    def uses_population(self) -> Any:
        raise NotTogether("a layer is asked for its mode")

    def __str__(self) -> str:
        raise NotTogether("a layer is asked for its mode")

    __repr__ = __format__ = __eq__ = __hash__ = __str__  # type: ignore[assignment]


UNDECIDED: Any = Undecided()


class Recording(NamedTuple):
    """Output of one call of a module for several modes, its inputs, and the modes."""

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    modes: tuple[StatisticsMode, ...]
    memory: set[int]
    written: set[int]

    def serves(self, mode: StatisticsMode, inputs: Any) -> bool:
        """Whether the module would return the same in ``mode`` for ``inputs``."""
        return mode in self.modes and not self.memory & self.written and trees_match(self.inputs, inputs, is_same_input)


class Patience:
    """Tries that are worth their time: after each failure in a row twice as many are left out."""

    MOST = 32

    def __init__(self) -> None:
        self.failures = self.rest = 0

    def is_over(self) -> bool:
        """Whether this try is to be left out."""
        self.rest -= 1
        return self.rest >= 0

    def failed(self) -> None:
        self.rest = min(2**self.failures, self.MOST) - 1
        self.failures += 1

    def succeeded(self) -> None:
        self.failures = self.rest = 0


class SharedForward:
    """Steps of many modes on one batch that share the forwards they have in common.

    Within :meth:`together` a step runs once for several modes: from the first layer with a mode on, values are
    :class:`~lightning_bln.per_mode.PerMode` tensors. What a module that holds every layer with a mode returned then is
    recorded, if its forward did nothing but compute; within :meth:`alone`, the step of one mode gets its part where the
    module is called in the same way.

    Args:
        model: The model whose layers have modes.
        chunk: The most modes of one forward; fewer where memory does not suffice.
        fixed: Layers that keep the mode they have.

    Attributes:
        reason: Why modes were evaluated one after the other the last time; None where they never were.
    """

    def __init__(self, model: nn.Module, chunk: int = 16, fixed: Collection[nn.Module] = ()) -> None:
        every = mode_layers(model)
        self.fixed = [layer for layer in every if any(layer is one for one in fixed)]
        self.layers = [layer for layer in every if not any(layer is one for one in fixed)]
        self.device = next((one.device for layer in self.layers for one in layer.buffers()), torch.device("cpu"))
        self.modules = holders(model)
        self.most, self.largest = chunk, 0
        self.reason: str | None = None
        self.patience = Patience()
        self.recording_patience = Patience()
        self.recordings: dict[tuple[nn.Module, int], list[Recording]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.is_active = True
        self.is_inside = self.in_chunks = False
        self.prefix: Prefix | None = None
        self.may_record = True
        self.following = ExitStack()
        self.written: set[int] = set()

    @property
    def chunk(self) -> int:
        """The most modes of one forward, by the largest activation so far."""
        if not self.largest:
            return min(self.most, UNKNOWN)
        most = max(1, BYTES // self.largest)
        if self.device.type == "cpu":
            most = min(most, max(FEWEST, CPU_BYTES // self.largest))
        return max(1, min(self.most, most))

    def begin(self, modes: int) -> None:
        """Begin a batch, which is to be evaluated in so many modes."""
        self.close()
        self.in_chunks = self.chunk < modes
        self.written.clear()
        if not any(one is self.written for one in WRITTEN):
            WRITTEN.append(self.written)
        self.prefix, self.may_record = None, not self.recording_patience.is_over()

    def close(self) -> None:
        """End the batch, and the step that follows."""
        self.following.close()
        self.recordings.clear()
        self.prefix = None
        WRITTEN[:] = [one for one in WRITTEN if one is not self.written]

    @contextmanager
    def together(self, modes: Sequence[StatisticsMode]) -> Iterator[None]:
        """Within the context a step runs once for all ``modes``; an error that the step caught comes at the end.

        Raises:
            NotTogether: Modes differ where Python needs one answer.
        """
        made = NotTogether.made
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(replacing_forward(module, partial(self.recorded, tuple(modes), module)))
            stack.enter_context(self.stacked(modes))
            self.calls.clear()
            yield
        if NotTogether.made != made:
            raise NotTogether("its code caught the error that modes differ")

    @contextmanager
    def alone(self, mode: StatisticsMode, others: Sequence[StatisticsMode] = ()) -> Iterator[None]:
        """Within the context a step runs in ``mode``, which the caller has set.

        Args:
            mode: The mode.
            others: Modes whose steps on this batch follow, so that a forward may be run for them too.
        """
        wanted = (mode, *others)[: self.chunk]
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(replacing_forward(module, partial(self.replayed, wanted, module)))
            self.calls.clear()
            yield

    def follow(self, mode: StatisticsMode | None) -> None:
        """Let the caller's own step on this batch, in ``mode``, use what was recorded, until :meth:`close`."""
        if mode is not None and self.recordings:
            self.following.enter_context(self.alone(mode))

    @contextmanager
    def stacked(self, modes: Sequence[StatisticsMode]) -> Iterator[None]:
        """Within the context layers evaluate all of ``modes``; the largest activation is measured."""
        every = [*self.layers, *self.fixed]
        before = [(layer.__dict__["fan"], layer.mode) for layer in every]
        fan, largest, PerMode.largest = Stacked(modes), PerMode.largest, 0
        try:
            for layer in self.layers:
                layer.__dict__["fan"], layer.__dict__["_mode"] = fan, UNDECIDED
            for layer in self.fixed:
                layer.__dict__["fan"] = Stacked([layer.mode] * len(modes))
            with eagerly():
                yield
        finally:
            for layer, (own, mode) in zip(every, before, strict=True):
                layer.__dict__["fan"], layer.__dict__["_mode"] = own, mode
            self.largest, PerMode.largest = max(self.largest, PerMode.largest), largest

    def recorded(self, modes: Any, module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A module's output for all ``modes``, kept where the module did nothing but compute it."""
        if self.runs_alone(module) or holds(tree_flatten((args, kwargs))[0]):
            return plain(*args, **kwargs)
        call = module, self.calls[module]
        self.calls[module] += 1
        inputs, before, random = kept((args, kwargs)), snapshot(module), torch.get_rng_state()
        self.is_inside = True
        try:
            with self.sharing_prefix(module):
                output = plain(*args, **kwargs)
        finally:
            self.is_inside = False
        is_clean = torch.equal(random, torch.get_rng_state()) and before == snapshot(module)
        memory = memory_of(output, (args, kwargs))
        if is_clean and memory is not None:
            self.recordings.setdefault(call, []).append(
                Recording(inputs, with_own_plain(output), modes, memory, self.written)
            )
        return output

    def replayed(self, wanted: Any, module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A module's output in the first of ``wanted`` modes: its part of what was recorded, or is now."""
        if self.runs_alone(module):
            return plain(*args, **kwargs)
        call, mode = (module, self.calls[module]), wanted[0]
        self.calls[module] += 1
        if any(layer.mode != mode for layer in self.layers):  # the step has set another
            return plain(*args, **kwargs)
        found = self.recording(call, mode, (args, kwargs))
        is_recorded = any(mode in one.modes for one in self.recordings.get(call, ()))
        if found is None and len(wanted) > 1 and self.may_record and not is_recorded:
            found = self.record(call, wanted, plain, args, kwargs)
        if found is not None:
            return part_of(with_own_plain(found.output), found.modes.index(mode))
        self.is_inside = True
        try:
            return plain(*args, **kwargs)
        finally:
            self.is_inside = False

    def runs_alone(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` is neither recorded nor replayed; a step may change that."""
        return self.is_inside or module.training or torch.is_grad_enabled() or has_hooks(module)

    def recording(self, call: Any, mode: StatisticsMode, inputs: Any) -> Recording | None:
        return next((one for one in self.recordings.get(call, ()) if one.serves(mode, inputs)), None)

    def record(self, call: Any, wanted: Any, plain: Callable[..., Any], args: Any, kwargs: Any) -> Recording | None:
        """Run a module for several modes; None, and as it was, where that cannot be."""
        module, calls, random = call[0], self.calls.copy(), RandomState(self.device)
        self.calls[module] = call[1]
        try:
            with isolated(module), self.stacked(wanted):
                self.recorded(wanted, module, plain, *args, **kwargs)
            found = None if random.has_moved() else self.recording(call, wanted[0], (args, kwargs))
        except Exception as error:  # the user's own come again from the module by itself
            found = None
            self.note(error, len(wanted))
        self.calls = calls
        if found is None:
            random.restore()
            self.recordings.pop(call, None)
            self.may_record = False
            self.recording_patience.failed()
        else:
            self.recording_patience.succeeded()
        return found

    def note(self, error: Exception, modes: int) -> None:
        """Keep why modes part; where memory did not suffice for so many, run fewer at once from now on."""
        self.reason = reason_of(error)
        if is_out_of_memory(error):
            self.most = max(1, min(self.most, modes // 2))

    def sharing_prefix(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the context, what precedes the first layer with a mode is computed once for all chunks of a batch."""
        if not self.in_chunks:
            return nullcontext()
        if self.prefix is None or self.prefix.model is not module:
            self.prefix = Prefix(module, self.device)
        return self.prefix.shared()


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules that hold every layer with a mode and no hooks inside, the outermost first."""
    layers = {id(layer) for layer in mode_layers(model)}
    found: list[nn.Module] = []
    module: nn.Module | None = model
    while module is not None:
        if not has_hooks(module):
            found.append(module)
        module = next((one for one in module.children() if layers <= {id(part) for part in one.modules()}), None)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks look at what ``module`` or a part of it computes."""
    return any(_torch.has_forward_hooks(part) for part in module.modules())


def memory_of(output: Any, inputs: Any) -> set[int] | None:
    """The places where the memory of an output lies; None where its parts for each mode could not be told or kept."""
    given, found = {id(leaf) for leaf in tree_flatten(inputs)[0]}, set()
    for leaf in tree_flatten(output)[0]:
        value = leaf.data if isinstance(leaf, PackedSequence) else leaf
        if isinstance(value, Tensor):
            if id(leaf) in given:
                return None
            found |= {storage_address(one) for one in memory(value)}
        elif not isinstance(leaf, (int, float, str, bool, type(None))):
            return None
    return found


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def with_own_plain(output: Any) -> Any:
    """An output with copies of the tensors that all modes have, which a step may write into."""
    return tree_map(own_plain, output)


def own_plain(leaf: Any) -> Any:
    value = leaf.data if isinstance(leaf, PackedSequence) else leaf
    if not isinstance(value, Tensor) or isinstance(value, PerMode):
        return leaf
    return leaf._replace(data=value.clone()) if isinstance(leaf, PackedSequence) else value.clone()


def memory(value: Tensor) -> Sequence[Tensor]:
    """The plain tensors in which a tensor's numbers lie."""
    if not isinstance(value, PerMode):
        return (value,)
    return value.parts if value.stack is None else (value.stack,)
