"""Steps of several modes on several ranks, so that all of them take part in the same collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NoReturn

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_bln._scoped import setting
from lightning_bln.per_mode import NotTogether
from lightning_bln.sweep.snapshot import state_of

COLLECTIVES = frozenset(
    [
        "all_gather",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
        "all_reduce_coalesced",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "batch_isend_irecv",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "irecv",
        "isend",
        "monitored_barrier",
        "recv",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "scatter",
        "scatter_object_list",
        "send",
    ]
)
"""Functions of torch.distributed in which every rank has to take part."""


class Ranks:
    """What the steps of one validation do on several ranks.

    A joint step is one step where others take sixteen, and ranks may differ in which they take. So none may take part
    in a collective: one that the user's code calls parts the modes, on each rank that comes to it, before it is called,
    and DDP does not broadcast buffers while none has changed. Once one has, all ranks run mode after mode.

    Args:
        trainer: The Trainer.
        module: The module it validates.
    """

    def __init__(self, trainer: Any, module: Any) -> None:
        self.trainer, self.module = trainer, module
        self.names: list[str] = []
        wrapped = trainer.strategy.model
        if trainer.world_size > 1 and isinstance(wrapped, DistributedDataParallel) and wrapped.broadcast_buffers:
            ignored = wrapped.parameters_to_ignore
            self.names = [name for name, _ in module.named_buffers() if name not in ignored]
        self.before, self.has_moved = self.buffers(), False

    def buffers(self) -> list[Any]:
        """State of the buffers that DDP broadcasts."""
        return [state_of(self.module.get_buffer(name)) for name in self.names]

    def agree(self) -> bool:
        """Whether modes may be together on this batch, on every rank; one collective if there are such buffers."""
        if self.names and not self.has_moved:
            moved = self.buffers() != self.before
            self.has_moved = self.trainer.strategy.reduce_boolean_decision(moved, all=False)
        return not self.has_moved

    def in_step(self) -> AbstractContextManager[None]:
        """Within the context, DDP broadcasts no buffers where they are the same on all ranks."""
        wrapped = self.trainer.strategy.model
        if not isinstance(wrapped, DistributedDataParallel) or self.has_moved:
            return nullcontext()
        return setting([wrapped], require_forward_param_sync=False)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Within the context, no collective is called."""
        with ExitStack() as stack:
            if self.trainer.world_size > 1:
                names = [name for name in COLLECTIVES if hasattr(dist, name)]
                places = [dist, dist.distributed_c10d]
                for name in names:
                    owners = [place for place in places if hasattr(place, name)]
                    stack.enter_context(setting(owners, **{name: refuse}))
            yield


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for a collective."""
    raise NotTogether("ranks exchange something in a step")
