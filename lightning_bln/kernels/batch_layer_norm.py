"""Batch layer normalization of an array on the compiled kernels: forward and backward in few passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS, is_autocast_enabled
from lightning_bln.functional import Statistics
from lightning_bln.kernels.library import DTYPES, DenseArgs, call, is_built, pointer, set_given


class DenseSettings(NamedTuple):
    """Numbers, passed to the operator as two lists."""

    keep: int
    """Whether the moments of the current batch are written down."""
    uses: int
    """Four bits: which statistics are given, batch mean first."""
    scale: float
    eps: float


def runs_compiled(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the compiled kernels take ``x``, shaped ``(rows, positions, features)``."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and (weight is None or weight.dtype == x.dtype)
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        and not is_autocast_enabled("cpu")
        and (HAS_CUSTOM_OPS or not torch.compiler.is_compiling())
        and is_built()
    )


def dense(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor,
    given: Tensor | None,
    settings: DenseSettings,
) -> tuple[Tensor, Statistics | None]:
    """Normalise ``x``, shaped ``(rows, positions, features)``.

    Args:
        x: The input, each position a batch of its own.
        weight: ``(features,)``
        bias: ``(features,)``
        mixing: Weights of the feature part and of the batch part, ``(2, positions)`` in float64.
        given: ``(positions, 2 features + 2)`` statistics of the population, one kind after the other, flat.
        settings: Numbers.

    Returns:
        The output, and if kept the current statistics: ``(positions, features)`` of the batch, ``(positions,)`` of the
        features, averaged over the rows.
    """
    if torch.empty_like(x).stride() != x.stride():  # rows that overlap or lie apart, as after expand() or a slice
        x = x.contiguous()
    if torch.compiler.is_compiling() and HAS_CUSTOM_OPS:
        found = torch.ops.lightning_bln.dense(x, weight, bias, mixing, given, [*settings][:2], [*settings][2:])
    else:
        found = Dense.apply(settings, x, weight, bias, mixing, given)
    if not settings.keep:
        return found[0], None
    rows, positions, features = x.shape
    batch, feature = found[1].detach().split([positions * 2 * features, positions * 2 * rows])
    batch, feature = batch.view(positions, 2, features), feature.view(positions, 2, rows).mean(-1)
    return found[0], Statistics(batch[:, 0], batch[:, 1], feature[:, 0], feature[:, 1])


def arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor,
    given: Tensor | None,
    settings: DenseSettings,
    moments: Tensor,
) -> DenseArgs:
    """The library's structure, but for what a pass reads and writes."""
    rows, positions, features = x.shape
    args = DenseArgs()
    args.rows, args.positions, args.features = rows, positions, features
    args.threads = torch.get_num_threads()
    args.row_stride, args.position_stride = x.stride(0), x.stride(1)
    args.x = pointer(x)
    norm = args.norm
    norm.enabled, norm.joint, norm.scale, norm.eps = 1, 1, settings.scale, settings.eps
    norm.w_feature, norm.w_batch = pointer(mixing[0]), pointer(mixing[1])
    norm.weight, norm.bias = pointer(weight), pointer(bias)
    set_given(norm, given, settings.uses, positions, features, 1)
    norm.batch_moments = pointer(moments)
    if norm.batch_moments:
        norm.feature_moments = norm.batch_moments + positions * 2 * features * x.element_size()
    return args


def allocate(x: Tensor, settings: DenseSettings) -> tuple[Tensor, Tensor]:
    """Where the forward pass writes."""
    rows, positions, features = x.shape
    return torch.empty_like(x), x.new_empty(positions * 2 * (features + rows) if settings.keep else 0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor,
    given: Tensor | None,
    settings: DenseSettings,
) -> tuple[Tensor, Tensor]:
    """Output and moments."""
    output, moments = allocate(x, settings)
    args = arguments(x, weight, bias, mixing, given, settings, moments)
    args.output = pointer(output)
    call("dense_forward", args, x.dtype)
    return output, moments


def dense_in_modes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor,
    given: Tensor | None,
    settings: DenseSettings,
    uses: Sequence[int],
) -> Tensor:
    """:func:`dense` for each group of ``x``, shaped ``(groups, rows, positions, features)``, without gradients.

    Groups differ in their choice of given statistics. One array expanded to all groups is not repeated in memory.
    """
    parts = [x[0].contiguous()] * len(uses) if x.stride(0) == 0 else list(x.contiguous())
    output, moments = x.new_empty(x.shape), x.new_empty(0)
    for part, one, bits in zip(parts, output, uses, strict=True):
        args = arguments(part, weight, bias, mixing, given, settings._replace(uses=bits), moments)
        args.output = pointer(one)
        call("dense_forward", args, x.dtype)
    return output


def empty_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, needs_x: bool) -> tuple[Tensor, ...]:
    """Where the backward pass writes."""
    empty = x.new_empty
    return (
        torch.empty_like(x) if needs_x else empty(0),
        empty(0) if weight is None else torch.empty_like(weight),
        empty(0) if bias is None else torch.empty_like(bias),
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mixing: Tensor,
    given: Tensor | None,
    settings: DenseSettings,
    moments: Tensor,
    needs_x: bool,
) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; what is not there has no elements."""
    if grad.stride(-1) != 1 or 0 in grad.stride():
        grad = grad.contiguous()
    found = empty_gradients(x, weight, bias, needs_x)
    args = arguments(x, weight, bias, mixing, given, settings, moments)
    args.grad, args.grad_row_stride, args.grad_position_stride = pointer(grad), grad.stride(0), grad.stride(1)
    args.grad_x, args.norm.grad_weight, args.norm.grad_bias = map(pointer, found)
    call("dense_backward", args, x.dtype)
    return found


class Dense(torch.autograd.Function):
    """The operator where nothing is traced."""

    @staticmethod
    def forward(ctx: Any, settings: DenseSettings, *tensors: Any) -> tuple[Tensor, Tensor]:
        output, moments = forward(*tensors, settings)  # type: ignore[call-arg]
        ctx.settings = settings
        ctx.save_for_backward(*tensors, moments)
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        return output, moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        *tensors, moments = ctx.saved_tensors
        found = backward(grad, *tensors, ctx.settings, moments, ctx.needs_input_grad[1])  # type: ignore[call-arg]
        return (None, *as_gradients(found), None, None)


def as_gradients(found: Sequence[Tensor]) -> list[Tensor | None]:
    """What autograd takes: None where there is nothing."""
    return [grad if grad.numel() else None for grad in found]
