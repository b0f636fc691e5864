"""Running averages that training has left in batch norms, kept while statistics computed stand in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln._torch import BatchNorm
from lightning_bln.batchnorm import batch_norms


class Running(NamedTuple):
    """Running statistics of a batch norm."""

    mean: Tensor
    var: Tensor

    @classmethod
    def of(cls, norm: BatchNorm) -> Running:
        """A copy of those that a layer has."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.inference_mode(False):  # whose tensors no training could go on with
            return cls(norm.running_mean.detach().clone(), norm.running_var.detach().clone())

    def write(self, norm: BatchNorm) -> None:
        """Write them into a layer's."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.inference_mode(False), torch.no_grad():
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.var)

    def equals(self, other: Running) -> bool:
        """Whether they are the same, bit for bit."""
        pairs = zip(self, other, strict=True)
        return all(torch.allclose(one, two, rtol=0, atol=0, equal_nan=True) for one, two in pairs)


class Exchange(NamedTuple):
    """Running statistics of a layer as training left them, and those that were put in their place."""

    trained: Running
    computed: Running


class RunningAverages:
    """Memory of the running averages that statistics computed have replaced, by the layer's name."""

    def __init__(self) -> None:
        self.kept: dict[str, Exchange] = {}

    def replace(self, module: nn.Module, computed: Mapping[str, Running]) -> None:
        """Put statistics computed into the layers of these names, and keep what those had."""
        norms = batch_norms(module)
        for name, values in computed.items():
            own, before = Running.of(norms[name]), self.kept.get(name)
            is_own = before is None or not own.equals(before.computed)
            self.kept[name] = Exchange(own if before is None or is_own else before.trained, values)
            values.write(norms[name])

    def put_back(self, module: nn.Module) -> None:
        """Give layers the averages back that training left, where they still have what was put in their place.

        Others have been given statistics since, by whatever exchanges a model's weights for those of an average.
        """
        norms = batch_norms(module)
        for name, (trained, computed) in self.kept.items():
            if name in norms and Running.of(norms[name]).equals(computed):
                trained.write(norms[name])
        self.kept = {}

    def state_dict(self) -> dict[str, list[Tensor]]:
        """All that is kept, in tensors."""
        return {name: [*trained, *computed] for name, (trained, computed) in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what :meth:`state_dict` gave."""
        self.kept = {name: Exchange(Running(*values[:2]), Running(*values[2:])) for name, values in state.items()}
