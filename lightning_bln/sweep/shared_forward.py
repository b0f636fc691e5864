"""One forward for many modes: the part of a model that holds its BLN layers runs once, and each mode gets its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_bln.modes import StatisticsMode, assign_modes, mode_layers
from lightning_bln.sweep.shared_module import UNDECIDED, Site


class SharedForward:
    """Lets steps that are run once for each mode share what they have in common.

    Within :meth:`installed`, the forward of each module that holds every BLN layer is replaced. In the first mode's
    turn at a batch it fans all modes of the chunk out along the batch axis and runs once; in the turns of the others it
    hands out their part of the result, if it is called with the same input. The outermost module called is the one
    that is shared.

    On the first batch every mode is run the plain way too, and the plain results are used. Where the two differ, where
    the module draws random numbers, changes state of its own or has hooks inside, it is left alone for good, and the
    next smaller one is tried.

    Where a step can do with the :class:`PerMode` output of all modes, :meth:`together` takes
    all turns at once.

    Args:
        model: The model whose layers have modes.
        chunk: How many modes to run at once at most; less where memory would not do.
    """

    def __init__(self, model: nn.Module, chunk: int = 16) -> None:
        self.layers = mode_layers(model)
        self.sites = [Site(self, module) for module in holders(model)]
        self.chunk = chunk
        self.modes: tuple[StatisticsMode, ...] = ()
        self.turn = 0
        self.is_inside = False
        self.is_rechecking = False
        self.is_learning = False
        self.in_chunks = False
        self.together_modes: tuple[StatisticsMode, ...] = ()
        self.follows: StatisticsMode | None = None
        self.goes_together: bool | None = None
        self.reason: str | None = None
        self.following = ExitStack()

    @property
    def is_active(self) -> bool:
        """Whether any module is, or may yet be, shared."""
        return any(not site.failed for site in self.sites)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the modules' forwards are shared."""
        with ExitStack() as stack:
            for site in self.sites:
                if not site.failed:
                    stack.enter_context(site.installed())
            yield

    def each(
        self,
        runs: Sequence[Any],
        step: Callable[[Any], Any],
        recheck: bool = False,
        follows: StatisticsMode | None = None,
        records: bool = False,
    ) -> None:
        """Call ``step`` with each of ``runs``, which have a ``mode``, on one batch.

        Args:
            runs: Whose turn it is, one after the other; ``step`` sets the mode.
            step: What to do in a turn.
            recheck: Compare the first turn with the plain way again.
            follows: The mode of one more turn at the batch, which the caller takes before it calls :meth:`close`.
            records: Keep what every turn gets: the next :meth:`together` will give the same, to be compared with.
        """
        self.close()
        for site in self.sites:
            site.outputs, site.records = {}, records
        if not self.is_active:
            for run in runs:
                step(run)
            return
        # a batch that checks has every mode run the plain way, and so has to leave that turn alone
        if recheck or not any(site.was_checked and not site.failed for site in self.sites):
            follows = None
        self.is_rechecking = recheck
        self.in_chunks = self.chunk < len(runs)
        with ExitStack() as stack:
            stack.enter_context(self.installed())
            stack.callback(self.forget)
            left = list(runs)
            while left:
                self.modes = tuple(run.mode for run in left[: self.chunk])
                if follows is not None and len(left) <= self.chunk:
                    if len(left) < self.chunk:
                        self.modes += (follows,)
                    else:
                        follows = None
                for site in self.sites:
                    site.shared = {}
                self.turn = 0
                while left and self.turn < len(self.modes):  # the first turn may find that fewer fit
                    self.begin_turn()
                    step(left.pop(0))
                    self.turn += 1
                self.is_rechecking = False
            for site in self.sites:
                site.was_checked |= bool(site.axes)
            if follows is not None:
                self.begin_turn()
                self.following = stack.pop_all()

    def together(
        self,
        modes: Sequence[StatisticsMode],
        step: Callable[[], Any],
        recheck: bool = False,
        follows: StatisticsMode | None = None,
    ) -> None:
        """Call ``step`` once for all of ``modes``: what is shared gives an output that each mode has a part in.

        Args:
            modes: The modes, in the order of the parts.
            step: What to do; no layer has a mode of its own meanwhile.
            recheck: As for :meth:`each`.
            follows: As for :meth:`each`.

        Raises:
            NotTogether: What is shared cannot be had for all modes at once; whatever ``step`` raises comes through too.
        """
        self.close()
        before = [layer.mode for layer in self.layers]
        with ExitStack() as stack:
            stack.enter_context(self.installed())
            stack.callback(self.forget)
            self.together_modes, self.follows, self.is_rechecking = tuple(modes), follows, recheck
            self.begin_turn()
            assign_modes(self.layers, [UNDECIDED] * len(self.layers))
            try:
                step()
            finally:
                assign_modes(self.layers, before)
                self.together_modes, self.is_rechecking = (), False
                for site in self.sites:
                    site.outputs = {}
            if follows is not None:
                self.turn = -1
                self.begin_turn()
                self.following = stack.pop_all()

    def begin_turn(self) -> None:
        for site in self.sites:
            site.calls = 0

    def close(self) -> None:
        """End the turn that followed, if there was one."""
        self.following.close()

    def forget(self) -> None:
        self.modes = ()
        for site in self.sites:
            site.shared, site.prefixes, site.records = {}, {}, False

    def shrink(self, size: int) -> None:
        """Run fewer modes at once from now on."""
        self.chunk = max(1, min(self.chunk, size))
        if self.is_learning and self.chunk < len(self.modes):
            self.modes, self.in_chunks = self.modes[: self.chunk], True
            for site in self.sites:
                site.shared = {}

    def give_up(self, site: Site, reason: str) -> None:
        site.failed = True
        site.shared = {}
        if not self.is_active:
            self.reason = f"{type(site.module).__name__} cannot be shared, since {reason}"


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules that hold every layer with a mode, the outermost first, none with hooks inside."""
    layers = {id(layer) for layer in mode_layers(model)}
    found = []
    for module in model.modules():
        inside = list(module.modules())
        has_hooks = any(part._forward_hooks or part._forward_pre_hooks for part in inside if part is not module)
        if not has_hooks and layers <= {id(part) for part in inside}:
            found.append(module)
    return found
