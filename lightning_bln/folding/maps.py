"""The affine map that a norm computes where all of its statistics are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln._torch import BatchNorm
from lightning_bln.norm import Normalization
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.sequences import Running


class Map(NamedTuple):
    """Factors and summands of each feature, of each step where a norm knows several, in float64 on the CPU."""

    factor: Tensor
    summand: Tensor


def map_of(norm: nn.Module) -> Map:
    """The affine map of a norm whose statistics are all given.

    The norm's own evaluation in float64 gives it: at zero the summands, and at one, where means and bias are zero, the
    factors. A difference of two outputs would lose the factors' digits to large means.
    """
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a stale population, which the report names
        if isinstance(norm, BatchNorm):
            evaluate, features = evaluation_of_torchs(norm)
        else:
            assert isinstance(norm, Normalization)
            evaluate, features = evaluation_of_ours(norm)
        zeros = torch.zeros(features, dtype=torch.float64)
        return Map(evaluate(zeros + 1.0, True).flatten(), evaluate(zeros, False).flatten())


Evaluation = Callable[[Tensor, bool], Tensor]
"""Evaluation of a norm on an input in float64; the flag says whether to take means and bias as zero."""


def evaluation_of_torchs(norm: BatchNorm) -> tuple[Evaluation, tuple[int, ...]]:
    """Evaluation of a BatchNorm and its input's shape."""
    tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    mean, var, weight, bias = (None if one is None else one.detach().to("cpu", torch.float64) for one in tensors)
    assert mean is not None

    def evaluate(x: Tensor, is_linear: bool) -> Tensor:
        centre = torch.zeros_like(mean) if is_linear else mean
        return F.batch_norm(x, centre, var, weight, None if is_linear else bias, False, 0.0, norm.eps)

    return evaluate, (1, norm.num_features)


def evaluation_of_ours(norm: Normalization) -> tuple[Evaluation, tuple[int, ...]]:
    """Evaluation of a norm of this package and its input's shape."""
    exact = deepcopy(norm).to("cpu", torch.float64).eval()
    exact.fan, exact.backend, exact.batch_dim, exact.channel_dim = None, "reference", 0, -1
    linear = deepcopy(exact)
    linear.bias = None
    for mean in (linear.population.batch_mean, linear.population.feature_mean):
        mean.zero_()

    def evaluate(x: Tensor, is_linear: bool) -> Tensor:
        # not by a call, which would run hooks
        layer = linear if is_linear else exact
        if isinstance(layer, GateNorm):
            return layer.sequence(Running(layer.steps_known, 1))(x, slice(None))[0]
        return layer.forward(x)

    if isinstance(norm, GateNorm):
        assert norm.weight is not None
        return evaluate, (norm.steps_known, 1, norm.gates, norm.weight.numel() // norm.gates)
    return evaluate, (1, *norm.population.feature_mean.shape, norm.num_features)
