"""Batch layer normalization of images whose channels come first in memory, as they are, on the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_bln.equation import Equation, Source, Statistics, normalize_by, weight_of
from lightning_bln.kernels.batch_layer_norm import (
    DENSE,
    DenseConstants,
    DenseInputs,
    empty_gradients,
)
from lightning_bln.kernels.dispatch import AnyOperator, EagerFunction
from lightning_bln.kernels.gate import admit, checked
from lightning_bln.kernels.library import DenseArgs, call, pointer, set_moments, set_norm


class PlanesSettings(NamedTuple):
    """Numbers, as in :class:`~lightning_bln.kernels.batch_layer_norm.DenseSettings`."""

    keep: int
    uses: int
    shared: int
    """Whether the batch's statistics run over positions too; mixing weights and population have one position then."""
    scale: float
    eps: float


def has_planes(x: Tensor, first: int) -> bool:
    """Whether the kernels take ``x``, shaped ``(..., *positions, features)``, as it is: its positions are contiguous.

    Args:
        x: The input.
        first: The first position axis.
    """
    if torch.compiler.is_compiling() or x.ndim < first + 2 or (x.stride(-1) == 1 and x.shape[-1] > 1):
        return False
    stride = 1
    for size, own in zip(reversed(x.shape[first:-1]), reversed(x.stride()[first:-1]), strict=True):
        if size > 1 and own != stride:
            return False
        stride *= size
    return stride > 1


def planes(inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings) -> tuple[Tensor, Tensor]:
    """Normalise an input, ``(rows, positions, features)``, whose positions are contiguous.

    Args:
        inputs: The input and its affine map.
        constants: Mixing weights and the population.
        settings: Numbers.

    Returns:
        The output in the input's layout, and if kept the current moments: ``(2, features, places)`` of the batch, then
        ``(2, rows, places)`` of the features, flat, where shared positions are one place and rows of it.
    """
    output, moments = PLANES.run(inputs._replace(x=contiguous_planes(inputs.x)), constants, settings, on_torch)
    return output, moments


def statistics_of_planes(moments: Tensor, places: int, rows: int, features: int) -> Statistics:
    """Moments as statistics of each place, those of the features averaged over the rows."""
    batch, feature = moments.split([2 * features * places, 2 * rows * places])
    means, variances = batch.view(2, features, places).mT.contiguous()
    feature_means, feature_variances = feature.view(2, rows, places).mean(1)
    return Statistics(means, variances, feature_means, feature_variances)


def planes_in_modes(
    inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings, uses: Sequence[int]
) -> Tensor:
    """:func:`planes` for each group of ``x``, shaped ``(groups, rows, positions, features)``, without gradients.

    Groups differ in ``uses``. One array expanded to all groups is not repeated in memory.
    """
    x = checked("x", inputs.x, inputs.x.shape, inputs.x.dtype).mT
    parts = [x[0].contiguous()] * len(uses) if x.stride(0) == 0 else list(x.contiguous())
    output, moments = x.new_empty(x.shape).mT, x.new_empty(0)
    first, given = admitted(inputs._replace(x=parts[0].mT), constants, settings)
    for part, one, bits in zip(parts, output, uses, strict=True):
        args = arguments(first._replace(x=part.mT), given, settings._replace(uses=bits), moments)
        args.output = pointer(one)
        call("planes_forward", args, x.dtype)
    return output


def on_torch(inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings) -> tuple[Tensor]:
    """The output by torch operations."""
    places, over = places_of(inputs.x, settings), (0, 1) if settings.shared else (0,)
    source = Source.of(constants.given, settings.uses, (places,), inputs.x.shape[-1])
    mixing = (weight_of(row, inputs.x.dtype) for row in constants.mixing)
    equation = Equation(inputs.weight, inputs.bias, settings.scale, settings.eps, *mixing)
    return (normalize_by(inputs.x, equation, source, over)[0],)


def places_of(x: Tensor, settings: PlanesSettings) -> int:
    """The number of positions that have statistics of their own."""
    return 1 if settings.shared else x.shape[1]


def contiguous_planes(x: Tensor) -> Tensor:
    """``x`` with contiguous positions, and rows and features that neither overlap nor lie apart."""
    if x.mT.is_contiguous() or (x.stride(1) == 1 and torch.empty_like(x).stride() == x.stride()):
        return x
    return x.mT.contiguous().mT


def admitted(
    inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings
) -> tuple[DenseInputs, DenseConstants]:
    """The tensors as the library reads them."""
    x, weight, bias = inputs
    dtype, features, places = x.dtype, x.shape[-1], places_of(x, settings)
    x = contiguous_planes(checked("x", x, x.shape, dtype))
    weight, bias = (admit(name, value, (features,), dtype) for name, value in (("weight", weight), ("bias", bias)))
    mixing = admit("mixing", constants.mixing, (2, places), torch.float64)
    given = admit("given", constants.given, (places * (2 * features + 2),), dtype)
    assert mixing is not None
    return DenseInputs(x, weight, bias), DenseConstants(mixing, given)


def arguments(inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings, moments: Tensor) -> DenseArgs:
    """The library's structure, without the arrays that only one of the passes reads or writes."""
    x, weight, bias = inputs
    args, places = DenseArgs(), places_of(x, settings)
    args.rows, args.positions, args.features = x.shape
    args.groups, args.threads, args.shared = 1, torch.get_num_threads(), settings.shared
    args.row_stride, args.position_stride, args.feature_stride = x.stride()
    args.x = pointer(x)
    norm, mixing = args.norm, constants.mixing.data_ptr()
    norm.scale, norm.eps, norm.bias = settings.scale, settings.eps, pointer(bias)
    set_norm(norm, weight, mixing, constants.given, settings.uses, places, x.shape[-1], 1)
    set_moments(norm, moments, places * x.shape[-1])
    return args


def moments_size(x: Tensor, settings: PlanesSettings) -> int:
    """The number of moments: mean and variance of each feature at each place, and of each row and position."""
    rows, positions, features = x.shape
    return 2 * (features * places_of(x, settings) + rows * positions)


def allocate(inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings) -> tuple[Tensor, Tensor]:
    """Empty output and moments."""
    x = inputs.x
    return torch.empty_like(x), x.new_empty(moments_size(x, settings) if settings.keep else 0)


def forward(inputs: DenseInputs, constants: DenseConstants, settings: PlanesSettings) -> tuple[Tensor, Tensor]:
    """Output and moments."""
    inputs, constants = admitted(inputs, constants, settings)
    output, moments = allocate(inputs, constants, settings)
    args = arguments(inputs, constants, settings, moments)
    args.output = pointer(output)
    call("planes_forward", args, output.dtype)
    return output, moments


def backward(
    grads: Sequence[Tensor | None],
    inputs: DenseInputs,
    constants: DenseConstants,
    settings: PlanesSettings,
    saved: Sequence[Tensor],
    needs_x: bool,
) -> DenseInputs:
    """Gradients of ``inputs`` from that of the output; one that does not exist has no elements."""
    inputs, constants = admitted(inputs, constants, settings)
    (grad,), dtype = grads, inputs.x.dtype
    moments = admit("moments", saved[0], (moments_size(inputs.x, settings),), dtype)
    assert grad is not None
    assert moments is not None
    grad = checked("grad", grad, inputs.x.shape, dtype)
    if grad.stride(1) != 1 or 0 in grad.stride():
        grad = grad.mT.contiguous().mT
    found = empty_gradients(inputs, None, needs_x)
    args = arguments(inputs, constants, settings, moments)
    args.grad = pointer(grad)
    args.grad_row_stride, args.grad_position_stride, args.grad_feature_stride = grad.stride()
    args.grad_x, args.norm.grad_weight, args.norm.grad_bias = map(pointer, found)
    call("planes_backward", args, moments.dtype)
    return found


class DensePlanes(EagerFunction):
    """Batch layer normalization of an array whose positions are contiguous."""


PLANES: AnyOperator = replace(
    cast(AnyOperator, DENSE),
    name="planes",
    settings=PlanesSettings,
    integers=3,
    forward=forward,
    allocate=allocate,
    backward=backward,
    empty_gradients=empty_gradients,
    node=DensePlanes,
)
"""Not registered with torch's dispatcher: compiled graphs have ``DENSE``, or torch operations."""
