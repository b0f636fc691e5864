"""A norm inside a recurrent cell whose statistics are all given: an affine map at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._torch import own_buffers
from lightning_bln.equation import Equation, Source, Statistics, mixing_rows
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.sequences import Running

BATCH_PART = (True, True, False, False)
"""Statistics that are given and used: mean and variance of the batch."""


class FrozenNorm(nn.Module):
    r"""An affine map of each gate and unit at each step, in the form of a batch norm.

    .. math::
        y = \mathrm{weight} \, (x - \mathrm{mean}_t) / \sqrt{\mathrm{var}_t} + \mathrm{bias}

    Args:
        weight: Factors, ``(G * H)``.
        bias: Summands, or ``None``.
        mean: Of each step, ``(T, G, H)``, or of all, ``(1, G, H)``; a step beyond the last uses the last one's.
        var: Likewise.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mean: Tensor
    var: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.gates = mean.shape[1]
        for name, value in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))
        self.register_buffer("mean", mean)
        self.register_buffer("var", var)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenNorm:
        super()._apply(fn, recurse)
        self.mean, self.var = (at_least_float(value) for value in (self.mean, self.var))
        return self

    @property
    def steps_known(self) -> int:
        """Steps that have a map of their own; one for all counts as one."""
        return len(self.mean)

    def sequence(self, running: Running) -> SequenceNorm:
        """The norm for the steps of a batch of sequences."""
        steps = torch.arange(running.start, running.start + running.steps, device=self.mean.device)
        mean, var = (value[steps.clamp(max=len(value) - 1)] for value in (self.mean, self.var))
        return self.by(mean, var)

    def by(self, mean: Tensor, var: Tensor) -> SequenceNorm:
        """The norm by the means and variances of some steps."""
        nothing = mean[..., :1]  # the features' own, which no part reads
        equation = Equation(self.weight, self.bias, 1.0, 0.0, None, 1.0)
        return SequenceNorm(equation, Source(Statistics(mean, var, nothing, nothing), BATCH_PART), self.gates, False)

    def given(self) -> Mapping[str, Tensor | None]:
        """As :meth:`~lightning_bln.recurrence.gate_norm.GateNorm.given`."""
        buffers = own_buffers(self)
        return {"batch_mean": buffers["mean"], "batch_var": buffers["var"]}

    def reads(self) -> tuple[str, ...] | None:
        """As :meth:`~lightning_bln.recurrence.gate_norm.GateNorm.reads`."""
        return "batch_mean", "batch_var"

    def mixing_rows(self) -> Tensor:
        """As :meth:`~lightning_bln.recurrence.gate_norm.GateNorm.mixing_rows`."""
        return mixing_rows(None, 1.0, self.steps_known)

    def options(self) -> tuple[Any, ...]:
        """As :meth:`~lightning_bln.recurrence.gate_norm.GateNorm.options`."""
        return (self.gates,)

    def extra_repr(self) -> str:
        steps, gates, units = self.mean.shape
        return f"{units}, gates={gates}, steps={steps}"


def at_least_float(value: Tensor) -> Tensor:
    """Statistics in a dtype no narrower than float32, as a population has them."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
