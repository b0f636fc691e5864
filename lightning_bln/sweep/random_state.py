"""State of every random generator that a step may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """States of torch's generators, the CPU's and that of a GPU in use, of numpy's and of Python's.

    Example:
        >>> state = RandomState(torch.device("cpu"))
        >>> number = random.random()
        >>> state.has_moved(), state.restore(), random.random() == number
        (True, None, True)
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = [torch.get_rng_state()]
        if device.type == "cuda":
            self.torch.append(torch.cuda.get_rng_state(device))
        self.numpy: Any = np.random.get_state()  # noqa: NPY002
        self.python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.torch[0])
        for state in self.torch[1:]:
            torch.cuda.set_rng_state(state, self.device)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState(self.device)
        return not (
            all(map(torch.equal, self.torch, now.torch))
            and np.array_equal(self.numpy[1], now.numpy[1])
            and self.numpy[2:] == now.numpy[2:]
            and self.python == now.python
        )
