"""Batch layer normalization of an array on Triton kernels: one operator for every layout, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_bln.equation import Equation, Source, normalize_by
from lightning_bln.kernels.batch_layer_norm import DENSE, DenseInputs
from lightning_bln.kernels.dispatch import AnyOperator, EagerFunction
from lightning_bln.masks import blank


class NormConstants(NamedTuple):
    """Tensors that have no gradient, on the input's device; statistics in float32, or float64 as the input."""

    mixing: Tensor
    """Weights of the feature part and of the batch part, ``(2, places)``; of no meaning where there is no such part."""
    given: Tensor | None
    """The population's statistics, flat, as :meth:`~lightning_bln.equation.Source.flat` gives them."""
    batch_sizes: Tensor | None
    """Rows of each position that hold data, never becoming more; ``None`` if all do."""


class NormSettings(NamedTuple):
    """Numbers, passed to the operator as two lists."""

    keep: int
    """Whether the moments of the current batch are returned; the gradient needs them."""
    uses: int
    """A bit for each statistic that the population gives, batch mean lowest."""
    groups: int
    """Groups of features that are normalised by themselves."""
    shared: int
    """Whether the batch's statistics run over positions too; mixing weights and population have one place then."""
    halves: int
    """1 for a batch part, 2 for a feature part, 3 for both."""
    scale: float
    eps: float

    @property
    def has_batch(self) -> bool:
        return bool(self.halves & 1)

    @property
    def has_feature(self) -> bool:
        return bool(self.halves & 2)


def norm(inputs: DenseInputs, constants: NormConstants, settings: NormSettings) -> tuple[Tensor, Tensor]:
    """Normalise an input.

    Args:
        inputs: ``(samples, positions, features of all groups)`` with any strides, and its affine map.
        constants: Mixing weights, the population, and how many samples hold data.
        settings: Numbers.

    Returns:
        The output in the input's layout, and if kept the current moments: ``(places, 2, features)`` of the batch, then
        ``(places, 2, groups, rows)`` of the features, flat. Positions are places; shared ones are one place, and rows
        of it. Moments that the output does not hang on may be any numbers.
    """
    output, moments = TRITON_NORM.run(inputs._replace(x=dense(inputs.x)), constants, settings, on_torch)
    return output, moments


def mixing_rows_like(
    w_feature: float | Tensor | None, w_batch: float | Tensor | None, places: int, like: Tensor
) -> Tensor:
    """Mixing weights as the kernels read them, made on the device of ``like``, of :func:`~.equation.widen`'s dtype."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = [
        one.to(like.device, dtype).reshape(-1).expand(places)
        if isinstance(one, Tensor)
        else torch.full((places,), 0.0 if one is None else one, dtype=dtype, device=like.device)
        for one in (w_feature, w_batch)
    ]
    return torch.stack(rows)


def dense(x: Tensor) -> Tensor:
    """``x`` with numbers that neither overlap nor lie apart, in any order."""
    return x if x.is_contiguous() or torch.empty_like(x).stride() == x.stride() else x.clone()


def on_torch(inputs: DenseInputs, constants: NormConstants, settings: NormSettings) -> tuple[Tensor]:
    """The output by torch operations."""
    (rows, positions, width), groups = inputs.x.shape, settings.groups
    places = 1 if settings.shared else positions
    source = Source.of(constants.given, settings.uses, (places, groups), width)
    w_feature, w_batch = constants.mixing[..., None, None]
    weight, bias = (None if value is None else value.view(groups, -1) for value in (inputs.weight, inputs.bias))
    mixing = w_feature if settings.has_feature else None, w_batch if settings.has_batch else None
    equation, mask = Equation(weight, bias, settings.scale, settings.eps, *mixing), None
    if constants.batch_sizes is not None:
        index = torch.arange(rows, device=inputs.x.device)
        mask = index[:, None, None] < constants.batch_sizes[:, None].expand(-1, groups)
    over = (0, 1) if settings.shared else (0,)
    y, _ = normalize_by(inputs.x.unflatten(-1, (groups, -1)), equation, source, over, mask)
    return ((y if mask is None else blank(y, mask)).flatten(-2),)


def allocate(inputs: DenseInputs, constants: NormConstants, settings: NormSettings) -> tuple[Tensor, Tensor]:
    """Empty output and moments."""
    x = inputs.x
    return like(x), x.new_empty(moments_of(x, settings) if settings.keep else 0, dtype=widen_dtype(x))


def like(x: Tensor) -> Tensor:
    """An empty tensor with the shape and strides of a dense one."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def widen_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics."""
    return torch.promote_types(x.dtype, torch.float32)


def moments_of(x: Tensor, settings: NormSettings) -> int:
    """The number of moments: mean and variance of each feature of each place, and of each row and group."""
    rows, positions, width = x.shape
    return 2 * (width * (1 if settings.shared else positions) + settings.groups * rows * positions)


def forward(inputs: DenseInputs, constants: NormConstants, settings: NormSettings) -> tuple[Tensor, Tensor]:
    """Output and moments."""
    from lightning_bln.kernels.triton.launch import Launch  # imports Triton

    inputs = inputs._replace(x=dense(inputs.x))
    output, moments = allocate(inputs, constants, settings)
    launch = Launch.of(inputs, constants, settings)
    found = launch.statistics(moments)
    launch.apply(output, found)
    return output, moments


def backward(
    grads: Sequence[Tensor | None],
    inputs: DenseInputs,
    constants: NormConstants,
    settings: NormSettings,
    saved: Sequence[Tensor],
    needs_x: bool,
) -> DenseInputs:
    """Gradients of ``inputs`` from that of the output; one that does not exist has no elements."""
    from lightning_bln.kernels.triton.launch import Launch  # imports Triton

    inputs = inputs._replace(x=dense(inputs.x))
    (grad,), x = grads, inputs.x
    assert grad is not None
    if grad.stride() != x.stride():
        grad = like(x).copy_(grad)
    found = empty_gradients(inputs, settings, needs_x)
    launch = Launch.of(inputs, constants, settings)
    launch.gradients(grad, saved[0].contiguous(), found, needs_x)
    return found


def empty_gradients(inputs: DenseInputs, _: NormSettings, needs_x: bool) -> DenseInputs:
    """Tensors that the backward pass fills in."""
    x, weight, bias = inputs
    empty = x.new_empty
    return DenseInputs(
        like(x) if needs_x else empty(0),
        empty(0) if weight is None else torch.empty_like(weight),
        empty(0) if bias is None else torch.empty_like(bias),
    )


class TritonNorm(EagerFunction):
    """Batch layer normalization of an array by Triton kernels."""


TRITON_NORM: AnyOperator = replace(
    cast(AnyOperator, DENSE),
    name="triton_norm",
    constants=NormConstants,
    settings=NormSettings,
    integers=5,
    forward=forward,
    allocate=allocate,
    backward=backward,
    empty_gradients=empty_gradients,
    node=TritonNorm,
)
