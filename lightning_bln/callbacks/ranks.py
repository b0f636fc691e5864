"""Steps of several modes on several ranks, so that all of them take part in the same collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NoReturn

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_bln._scoped import setting
from lightning_bln.per_mode import NotTogether

METHODS = frozenset(
    [
        *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced", "allreduce"),
        *("allreduce_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier"),
        *("recv", "recv_anysource", "reduce", "reduce_scatter", "_reduce_scatter_base", "scatter", "send"),
    ]
)
"""Methods of a process group in which every rank has to take part, which all functions for that call."""


class Ranks:
    """Conduct of the steps of one validation on several ranks.

    A joint step is one step where others take sixteen, and ranks may differ in which they take. So none may take part
    in a collective: one that the user's code calls parts the modes, on each rank that comes to it, before it is called.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def in_step(self) -> AbstractContextManager[None]:
        """Within the context, DDP broadcasts no buffers, as it does in a validation at the first step alone."""
        wrapped = self.trainer.strategy.model
        is_ddp = isinstance(wrapped, DistributedDataParallel)
        return setting([wrapped] if is_ddp else [], require_forward_param_sync=False)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Within the context, no collective is called."""
        with ExitStack() as stack:
            if self.trainer.world_size > 1:
                for name in METHODS & vars(dist.ProcessGroup).keys():
                    stack.callback(setattr, dist.ProcessGroup, name, vars(dist.ProcessGroup)[name])
                    setattr(dist.ProcessGroup, name, refuse)
            yield


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for a collective."""
    raise NotTogether("ranks exchange something in a step")
