"""Batch layer normalization of an array on the C++ kernels: forward and backward in few passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS, is_autocast_enabled
from lightning_bln.equation import Equation, Source, Statistics, normalize_by, weight_of
from lightning_bln.kernels.dispatch import AnyOperator, EagerFunction, Operator, present
from lightning_bln.kernels.gate import admit, checked, reason_against
from lightning_bln.kernels.library import DenseArgs, call, pointer, set_moments, set_norm
from lightning_bln.masks import blank


class DenseInputs(NamedTuple):
    """Tensors that have a gradient."""

    x: Tensor
    """``(rows, positions, features)``: each position is a batch of its own."""
    weight: Tensor | None
    bias: Tensor | None


class DenseConstants(NamedTuple):
    """Tensors that have none."""

    mixing: Tensor
    """Weights of the feature part and of the batch part, ``(2, positions)`` in float64."""
    given: Tensor | None
    """The population's statistics, ``(positions, 2 features + 2)``, one kind after the other, flat."""


class DenseSettings(NamedTuple):
    """Numbers, passed to the operator as two lists."""

    keep: int
    """Whether the moments of the current batch are returned; the gradient needs them."""
    uses: int
    """A bit for each statistic that the population gives, batch mean lowest."""
    scale: float
    eps: float


class StepsConstants(NamedTuple):
    """:class:`DenseConstants` of the steps of a batch of sequences, which are the positions."""

    mixing: Tensor
    given: Tensor | None
    """As above, but with ``2 groups`` in place of 2."""
    batch_sizes: Tensor | None
    """Rows of each position that hold data, never becoming more; ``None`` if all do."""


class StepsSettings(NamedTuple):
    """:class:`DenseSettings` where groups of features are normalised by themselves."""

    keep: int
    uses: int
    groups: int
    scale: float
    eps: float


def reason_against_fused(x: Tensor, tensors: Iterable[Tensor | None]) -> str | None:
    """Obstacle to the fused kernels for the input ``x`` and the layer's ``tensors``; ``None`` if they serve."""
    if is_autocast_enabled("cpu"):
        return "under autocast norms run on torch operations"
    if torch.compiler.is_compiling() and not HAS_CUSTOM_OPS:
        return "torch.compile takes the compiled kernels from torch 2.4 on"
    return reason_against(x.dtype, (x, *tensors))


def dense(
    inputs: DenseInputs,
    constants: DenseConstants,
    settings: DenseSettings,
) -> tuple[Tensor, Tensor]:
    """Normalise an input.

    Args:
        inputs: The input and its affine map.
        constants: Mixing weights and the population.
        settings: Numbers.

    Returns:
        The output, and if kept the current moments: ``(positions, 2, features)`` of the batch, then ``(positions, 2,
        rows)`` of the features, flat.
    """
    inputs = inputs._replace(x=contiguous_features(inputs.x))
    output, moments = DENSE.run(inputs, constants, settings, of_array(on_torch))
    return output, moments


def statistics_of(moments: Tensor, positions: int, rows: int, features: int) -> Statistics:
    """Moments as statistics of each position, those of the features averaged over the rows."""
    batch, feature = moments.split([positions * 2 * features, positions * 2 * rows])
    batch, feature = batch.view(positions, 2, features), feature.view(positions, 2, rows).mean(-1)
    return Statistics(batch[:, 0], batch[:, 1], feature[:, 0], feature[:, 1])


def on_torch(inputs: DenseInputs, constants: StepsConstants, settings: StepsSettings) -> tuple[Tensor]:
    """The output by torch operations."""
    (rows, positions, features), groups = inputs.x.shape, settings.groups
    source = Source.of(constants.given, settings.uses, (positions, groups), features)
    weights = (weight_of(row, inputs.x.dtype) for row in constants.mixing)
    mixing = (None if weight is None else weight[..., None] for weight in weights)
    weight, bias = (None if value is None else value.view(groups, -1) for value in (inputs.weight, inputs.bias))
    equation, mask = Equation(weight, bias, settings.scale, settings.eps, *mixing), None
    if constants.batch_sizes is not None:
        mask = torch.arange(rows)[:, None, None] < constants.batch_sizes[:, None].expand(-1, groups)
    y, _ = normalize_by(inputs.x.unflatten(-1, (groups, -1)), equation, source, (0,), mask)
    return ((y if mask is None else blank(y, mask)).flatten(-2),)


def has_adjacent_features(x: Tensor) -> bool:
    """Whether the kernels read ``x`` without a copy, and so give back the layout that came in."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def contiguous_features(x: Tensor) -> Tensor:
    """``x`` with contiguous features, and rows that neither overlap nor lie apart, as after expand() or a slice."""
    if x.is_contiguous() or (x.stride(-1) == 1 and torch.empty_like(x).stride() == x.stride()):
        return x
    return x.contiguous()


def dense_in_modes(
    inputs: DenseInputs, constants: DenseConstants, settings: DenseSettings, uses: Sequence[int]
) -> Tensor:
    """:func:`dense` for each group of ``x``, shaped ``(groups, rows, positions, features)``, without gradients.

    Groups differ in ``uses``. One array expanded to all groups is not repeated in memory.
    """
    x = inputs.x
    x = checked("x", x, x.shape, x.dtype)
    parts = [x[0].contiguous()] * len(uses) if x.stride(0) == 0 else list(x.contiguous())
    output, moments = x.new_empty(x.shape), x.new_empty(0)
    first, given = admitted(inputs._replace(x=parts[0]), StepsConstants(*constants, None), 1)
    for part, one, bits in zip(parts, output, uses, strict=True):
        own = StepsSettings(settings.keep, bits, 1, settings.scale, settings.eps)
        args = arguments(first._replace(x=part), given, own, moments)
        args.output = pointer(one)
        call("dense_forward", args, x.dtype)
    return output


def admitted(inputs: DenseInputs, constants: StepsConstants, groups: int) -> tuple[DenseInputs, StepsConstants]:
    """The tensors as the library reads them."""
    x, weight, bias = inputs
    (_, positions, features), dtype = x.shape, x.dtype
    x = contiguous_features(checked("x", x, x.shape, dtype))
    weight, bias = (admit(name, value, (features,), dtype) for name, value in (("weight", weight), ("bias", bias)))
    mixing = admit("mixing", constants.mixing, (2, positions), torch.float64)
    given = admit("given", constants.given, (positions * (2 * features + 2 * groups),), dtype)
    assert mixing is not None
    sizes = admit("batch_sizes", constants.batch_sizes, (positions,), torch.int64)
    return DenseInputs(x, weight, bias), StepsConstants(mixing, given, sizes)


def arguments(inputs: DenseInputs, constants: StepsConstants, settings: StepsSettings, moments: Tensor) -> DenseArgs:
    """The library's structure, without the arrays that only one of the passes reads or writes."""
    x, weight, bias = inputs
    rows, positions, features = x.shape
    args = DenseArgs()
    args.rows, args.positions, args.features, args.groups = rows, positions, features, settings.groups
    args.threads = torch.get_num_threads()
    args.row_stride, args.position_stride = x.stride(0), x.stride(1)
    args.x, args.batch_sizes = pointer(x), pointer(constants.batch_sizes)
    norm, mixing = args.norm, constants.mixing.data_ptr()
    norm.scale, norm.eps, norm.bias = settings.scale, settings.eps, pointer(bias)
    set_norm(norm, weight, mixing, constants.given, settings.uses, positions, features, settings.groups)
    set_moments(norm, moments, positions * features)
    return args


def allocate(inputs: DenseInputs, constants: StepsConstants, settings: StepsSettings) -> tuple[Tensor, Tensor]:
    """Empty output and moments; zero where rows hold no data."""
    x = inputs.x
    make = torch.empty_like if constants.batch_sizes is None else torch.zeros_like
    size = moments_of(x, settings.groups) if settings.keep else 0
    return make(x), make(x.new_empty(size))


def moments_of(x: Tensor, groups: int) -> int:
    """The number of moments: mean and variance of each feature, and of each row and group."""
    rows, positions, features = x.shape
    return positions * 2 * (features + groups * rows)


def forward(inputs: DenseInputs, constants: StepsConstants, settings: StepsSettings) -> tuple[Tensor, Tensor]:
    """Output and moments."""
    inputs, constants = admitted(inputs, constants, settings.groups)
    output, moments = allocate(inputs, constants, settings)
    args = arguments(inputs, constants, settings, moments)
    args.output = pointer(output)
    call("dense_forward", args, output.dtype)
    return output, moments


def backward(
    grads: Sequence[Tensor | None],
    inputs: DenseInputs,
    constants: StepsConstants,
    settings: StepsSettings,
    saved: Sequence[Tensor],
    needs_x: bool,
) -> DenseInputs:
    """Gradients of ``inputs`` from that of the output; one that does not exist has no elements."""
    inputs, constants = admitted(inputs, constants, settings.groups)
    (grad,), dtype = grads, inputs.x.dtype
    moments = admit("moments", saved[0], (moments_of(inputs.x, settings.groups),), dtype)
    assert grad is not None
    assert moments is not None
    grad = checked("grad", grad, inputs.x.shape, dtype)
    if grad.stride(-1) != 1 or 0 in grad.stride():
        grad = grad.contiguous()
    found = empty_gradients(inputs, settings, needs_x)
    if constants.batch_sizes is not None:
        found.x.zero_()
    args = arguments(inputs, constants, settings, moments)
    args.grad, args.grad_row_stride, args.grad_position_stride = pointer(grad), grad.stride(0), grad.stride(1)
    args.grad_x, args.norm.grad_weight, args.norm.grad_bias = map(pointer, found)
    call("dense_backward", args, moments.dtype)
    return found


def empty_gradients(inputs: DenseInputs, _: Any, needs_x: bool) -> DenseInputs:
    """Tensors that the backward pass fills in."""
    x, weight, bias = inputs
    empty = x.new_empty
    return DenseInputs(
        torch.empty_like(x) if needs_x else empty(0),
        empty(0) if weight is None else torch.empty_like(weight),
        empty(0) if bias is None else torch.empty_like(bias),
    )


def of_array(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for an array whose features are one group and whose rows all hold data."""

    def widened(value: Any) -> Any:
        if isinstance(value, DenseConstants):
            return StepsConstants(*value, None)
        if isinstance(value, DenseSettings):
            return StepsSettings(value.keep, value.uses, 1, value.scale, value.eps)
        return value

    return lambda *args: function(*map(widened, args))


class Dense(EagerFunction):
    """Batch layer normalization of an array."""


class Steps(EagerFunction):
    """Batch layer normalization of all steps of a batch of sequences."""


DENSE = Operator(
    name="dense",
    inputs=DenseInputs,
    constants=DenseConstants,
    settings=DenseSettings,
    integers=2,
    outputs=2,
    returned=2,
    gradients="Tensor grad",
    saved="Tensor moments",
    first_saved=1,
    forward=of_array(forward),
    allocate=of_array(allocate),
    backward=of_array(backward),
    empty_gradients=of_array(empty_gradients),
    as_gradients=present,
    node=Dense,
)

STEPS: AnyOperator = replace(
    cast(AnyOperator, DENSE),
    name="steps",
    constants=StepsConstants,
    settings=StepsSettings,
    integers=3,
    forward=forward,
    allocate=allocate,
    backward=backward,
    empty_gradients=empty_gradients,
    node=Steps,
)
"""Not registered with torch's dispatcher, since what it is for compiles on torch operations."""
