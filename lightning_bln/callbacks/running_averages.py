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

    def are_in(self, norm: BatchNorm) -> bool:
        """Whether a layer has them, number by number, on its device and in its dtype."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        pairs = zip(self, (norm.running_mean, norm.running_var), strict=True)
        return all(one.shape == own.shape and are_same(one.to(own), own) for one, own in pairs)

    def fit(self, norm: BatchNorm) -> bool:
        """Whether a layer can have them."""
        return norm.running_mean is not None and self.mean.shape == norm.running_mean.shape


def are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, NaN among them."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


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
            before = self.kept.get(name)
            # unless training has gone on since, those in the layer are what was put there
            is_unchanged = before is not None and before.computed.are_in(norms[name])
            trained = before.trained if before is not None and is_unchanged else Running.of(norms[name])
            self.kept[name] = Exchange(trained, values)
            values.write(norms[name])

    def put_back(self, module: nn.Module) -> None:
        """Give layers the averages back that training left, where they still have what was put in their place.

        Others have been given statistics since, by whatever exchanges a model's weights for those of an average.
        """
        norms = batch_norms(module)
        for name, (trained, computed) in self.kept.items():
            if name in norms and computed.are_in(norms[name]):
                trained.write(norms[name])
        self.kept = {}

    def state_dict(self) -> dict[str, list[Tensor]]:
        """All that is kept, in tensors."""
        return {name: [*trained, *computed] for name, (trained, computed) in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what :meth:`state_dict` gave."""
        self.kept = {name: Exchange(Running(*values[:2]), Running(*values[2:])) for name, values in state.items()}
