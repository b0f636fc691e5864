"""Results of a callback that ran in worker processes, brought to the process that started them.

``ddp_spawn`` and ``ddp_notebook`` bring the model and the metrics back, and no state of callbacks.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from lightning_bln._files import replacing
from lightning_bln.callbacks import _lightning

T = TypeVar("T")


class Mailbox:
    """A file that a worker's copy of a callback writes, and the original reads once."""

    def __init__(self) -> None:
        self.path = Path(tempfile.gettempdir()) / f"lightning-bln-{uuid4().hex}.json"
        self.owner = os.getpid()

    def send(self, trainer: Any, state: dict[str, Any]) -> None:
        """In a worker process, leave ``state`` for the process that started it."""
        is_worker = os.getpid() != self.owner and _lightning.starts_workers(trainer)
        if is_worker and trainer.local_rank == 0:
            with replacing(self.path) as file:
                file.write(json.dumps(state).encode())

    def receive(self) -> dict[str, Any] | None:
        """The state that a worker has left, read once; None without one, and in the workers themselves."""
        if os.getpid() != self.owner or not self.path.exists():
            return None
        state = json.loads(self.path.read_text())
        self.path.unlink()
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Mailbox:
        return Mailbox()  # a copy gets no mail of the original


class Arrived(Generic[T]):
    """Attribute of a callback that first loads what a worker has left in its ``mailbox``."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, callback: Any, owner: type) -> T:
        if callback is None:
            return self  # type: ignore[return-value]
        state = callback.mailbox.receive()
        if state is not None:
            callback.load_state_dict(state)
        return vars(callback)[self.name]

    def __set__(self, callback: Any, value: T) -> None:
        callback.mailbox.receive()  # which is older
        vars(callback)[self.name] = value
