"""Recurrent layers on the C++ kernels: one layer in one direction, forward or backward, is one call.

Everything is computed in float32 or float64; under autocast a layer with float32 parameters runs in float32.

For the gradient, a layer with ``G`` gates of ``H`` units keeps for each step and sequence ``2 G H`` numbers of both
products and ``H`` of the output, and an LSTM ``H`` more of the cell state. The backward pass computes the gates again,
which takes no longer than writing and reading them. With ``recompute`` it computes the products again too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bln.kernels.dispatch import EagerFunction, Operator, present
from lightning_bln.kernels.gate import admit
from lightning_bln.kernels.library import CELLS, NormArgs, RecurrenceArgs, call, pointer, set_moments, set_norm


class Inputs(NamedTuple):
    """Tensors that have a gradient."""

    x: Tensor
    """``(N, input_size)``: the rows of one step after those of the step before."""
    weight_ih: Tensor | None
    """None where ``x`` is the product already, with ``G * H`` columns."""
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    h: Tensor
    c: Tensor | None
    weight_norm_ih: Tensor | None
    """None without this norm, as the next two."""
    weight_norm_hh: Tensor | None
    weight_norm_cell: Tensor | None
    bias_norm_cell: Tensor | None


class Constants(NamedTuple):
    """Tensors that have none."""

    batch_sizes: Tensor | None
    hidden_mask: Tensor | None
    zoneout_mask: Tensor | None
    """``(2, N, H)``: 1 where a unit of h, and of c, keeps its value."""
    mixing: Tensor | None
    """``(3, 2, T)`` in float64: the weights of each norm's feature part and batch part."""
    given_ih: Tensor | None
    """Population of each step, ``(T, 2 D + 2 G')``: batch mean and variance, feature mean and variance, where ``D`` is
    the number of columns and ``G'`` that of groups which are normalised by themselves."""
    given_hh: Tensor | None
    given_cell: Tensor | None


class Settings(NamedTuple):
    """Numbers, passed to the operator as two lists."""

    cell: int
    steps: int
    keep: int
    """0: no gradient will follow; 1: keep what it needs; 2: keep little and compute the rest again."""
    joint: int
    uses_ih: int
    """A bit for each statistic that the population gives, batch mean lowest."""
    uses_hh: int
    uses_cell: int
    zoneout: float
    """Share of its value that a unit keeps over a step, as an expectation; zero with a mask."""
    scale_ih: float
    scale_hh: float
    scale_cell: float
    eps: float


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many gates each cell has."""

INTEGERS = 7
"""How many of the settings are integers."""

TEAMS = (0, 0)
"""How many threads share a step's rows, and how many its units; zeros leave the choice to the kernels."""

NARROW = 64
"""Products with inputs of fewer features are always computed again, which takes less time than reading them."""


class Outputs(NamedTuple):
    """Results of the forward pass; one that is not needed has no elements."""

    output: Tensor
    h: Tensor
    c: Tensor
    moments_ih: Tensor
    """Flat: batch means and variances, ``(T, 2, D)``, then feature means and variances, ``(T, 2, G', B)``."""
    moments_hh: Tensor
    moments_cell: Tensor
    input_part: Tensor
    hidden_part: Tensor
    cells: Tensor


class Sizes(NamedTuple):
    """Sizes of a call."""

    rows: int
    samples: int
    features: int
    units: int
    columns: int
    """Of the gates together."""
    groups: int
    """Groups of gates that are normalised by themselves."""

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings) -> Sizes:
        columns, units = inputs.weight_hh.shape
        groups = 1 if settings.joint else columns // units
        return cls(inputs.x.shape[0], inputs.h.shape[0], inputs.x.shape[1], units, columns, groups)


def output_shapes(inputs: Inputs, settings: Settings) -> tuple[tuple[int, ...], ...]:
    """Shape of each of :class:`Outputs`."""
    rows, samples, features, units, columns, groups = Sizes.of(inputs, settings)
    keep, lstm = settings.keep > 0, CELLS[settings.cell] == "lstm"
    all_kept = settings.keep == 1

    def moments(weight: Tensor | None, width: int, groups: int) -> tuple[int]:
        return (0 if weight is None or not keep else settings.steps * 2 * (width + groups * samples),)

    return (
        (rows, units),
        (samples, units),
        (samples, units) if lstm else (0,),
        moments(inputs.weight_norm_ih, columns, groups),
        moments(inputs.weight_norm_hh, columns, groups),
        moments(inputs.weight_norm_cell, units, 1),
        (rows, columns) if all_kept and features >= NARROW else (0,),
        (rows, columns) if all_kept else (0,),
        (rows, units) if keep and lstm else (0,),
    )


def allocate(inputs: Inputs, constants: Constants, settings: Settings) -> Outputs:
    """Empty outputs; moments of steps at which not all sequences run are zero beyond those."""
    new = inputs.weight_hh.new_empty
    outputs = Outputs(*(new(shape) for shape in output_shapes(inputs, settings)))
    if constants.batch_sizes is not None:
        for moments in outputs[3:6]:
            moments.zero_()
    return outputs


def admitted(inputs: Inputs, constants: Constants, settings: Settings) -> tuple[Inputs, Constants]:
    """The tensors as the library reads them.

    Raises:
        ValueError: A shape does not fit the others, or the running sequences are not those of the rows.
    """
    rows, samples, features, units, columns, groups = Sizes.of(inputs, settings)
    steps, dtype, name = settings.steps, inputs.weight_hh.dtype, CELLS[settings.cell]
    if columns != GATES[name] * units:
        raise ValueError(f"weight_hh has shape {(columns, units)}, but a {name} needs {(GATES[name] * units, units)}")
    if (name == "lstm") is (inputs.c is None):
        raise ValueError(f"c is {'missing' if inputs.c is None else 'given'}, but the cell is a {name}")
    if inputs.weight_ih is None and features != columns:
        raise ValueError(f"x has {features} columns, but a product of {columns} is needed without weight_ih")
    gates, state, cell = (columns,), (samples, units), (units,)
    weights = (columns, features), (columns, units)
    shapes = ((rows, features), *weights, gates, gates, state, state, gates, gates, cell, cell)
    of_gates, of_cell = (steps * 2 * (columns + groups),), (steps * 2 * (units + 1),)
    of_constants = ((steps,), state, (2, rows, units), (3, 2, steps), of_gates, of_gates, of_cell)
    kinds = (torch.int64, dtype, dtype, torch.float64, dtype, dtype, dtype)
    return (
        Inputs(*map(admit, Inputs._fields, inputs, shapes, repeat(dtype))),  # type: ignore[arg-type]
        Constants(*map(admit, Constants._fields, constants, of_constants, kinds)),
    )


def arguments(inputs: Inputs, constants: Constants, settings: Settings, outputs: Outputs) -> RecurrenceArgs:
    """The library's structure, complete for the forward pass."""
    args = sizes_and_numbers(inputs, settings)
    place(args, inputs, constants, settings, outputs)
    return args


def sizes_and_numbers(inputs: Inputs, settings: Settings) -> RecurrenceArgs:
    """The library's structure without a pointer."""
    rows, samples, features, units, _, _ = Sizes.of(inputs, settings)
    args = RecurrenceArgs(
        settings.cell, settings.steps, samples, rows, features, units, 0, *TEAMS, 0, settings.keep,
        settings.zoneout, settings.zoneout,
    )  # fmt: skip
    for norm, scale in zip(norms_of(args), (settings.scale_ih, settings.scale_hh, settings.scale_cell), strict=True):
        norm.joint, norm.scale, norm.eps = settings.joint, scale, settings.eps
    return args


def norms_of(args: RecurrenceArgs) -> tuple[NormArgs, NormArgs, NormArgs]:
    """The norms of the input's product, of the state's and of the cell state."""
    return args.norm_ih, args.norm_hh, args.norm_cell


def place(args: RecurrenceArgs, inputs: Inputs, constants: Constants, settings: Settings, outputs: Outputs) -> None:
    """Set the number of threads, and let ``args`` point at all tensors."""
    _, _, _, units, columns, groups = Sizes.of(inputs, settings)
    steps, masks, args.threads = settings.steps, constants.zoneout_mask, torch.get_num_threads()
    args.batch_sizes, args.hidden_mask = pointer(constants.batch_sizes), pointer(constants.hidden_mask)
    if masks is not None:
        args.zoneout_mask_h, args.zoneout_mask_c = pointer(masks[0]), pointer(masks[1])
    args.input, args.h0, args.c0 = pointer(inputs.x), pointer(inputs.h), pointer(inputs.c)
    args.weight_ih, args.weight_hh = pointer(inputs.weight_ih), pointer(inputs.weight_hh)
    args.output, args.hn, args.cn = pointer(outputs.output), pointer(outputs.h), pointer(outputs.c)
    args.input_part, args.hidden_part = pointer(outputs.input_part), pointer(outputs.hidden_part)
    args.cells = pointer(outputs.cells)
    for index, (norm, weight, bias, given, uses, moments, places) in enumerate(
        zip(
            norms_of(args),
            (inputs.weight_norm_ih, inputs.weight_norm_hh, inputs.weight_norm_cell),
            (inputs.bias_ih, inputs.bias_hh, inputs.bias_norm_cell),
            (constants.given_ih, constants.given_hh, constants.given_cell),
            (settings.uses_ih, settings.uses_hh, settings.uses_cell),
            (outputs.moments_ih, outputs.moments_hh, outputs.moments_cell),
            ((columns, groups), (columns, groups), (units, 1)),
            strict=True,
        )
    ):
        norm.bias = pointer(bias)
        if weight is not None:
            assert constants.mixing is not None
            mixing = constants.mixing.data_ptr() + index * 2 * steps * 8
            set_norm(norm, weight, mixing, given, uses, steps, *places)
            set_moments(norm, moments, steps * places[0])


def forward(inputs: Inputs, constants: Constants, settings: Settings) -> Outputs:
    """Run a layer over a sequence."""
    inputs, constants = admitted(inputs, constants, settings)
    outputs = allocate(inputs, constants, settings)
    call("forward", arguments(inputs, constants, settings, outputs), outputs.output.dtype)
    return outputs


def backward(
    grads: Sequence[Tensor | None],
    inputs: Inputs,
    constants: Constants,
    settings: Settings,
    saved: Sequence[Tensor],
    needs_x: bool,
) -> Inputs:
    """Gradients of ``inputs`` from those of output, h and c; one that does not exist has no elements."""
    inputs, constants = admitted(inputs, constants, settings)
    outputs = admitted_outputs(saved, inputs, settings)
    return differentiate(arguments(inputs, constants, settings, outputs), grads, inputs, settings, needs_x)


def admitted_outputs(saved: Sequence[Tensor], inputs: Inputs, settings: Settings) -> Outputs:
    """Outputs of a forward pass as the library reads them."""
    shapes = output_shapes(inputs, settings)
    return Outputs(*map(admit, Outputs._fields, saved, shapes, repeat(inputs.weight_hh.dtype)))  # type: ignore[arg-type]


def differentiate(
    args: RecurrenceArgs, grads: Sequence[Tensor | None], inputs: Inputs, settings: Settings, needs_x: bool
) -> Inputs:
    """:func:`backward` by the arguments of the forward pass, whose tensors are those of ``inputs``."""
    dtype, shapes = inputs.weight_hh.dtype, output_shapes(inputs, settings)
    # kept until the call, since a pointer keeps nothing alive
    of_outputs = [*map(admit, ("grad_output", "grad_h", "grad_c"), grads, shapes, repeat(dtype))]
    args.grad_output, args.grad_hn, args.grad_cn = map(pointer, of_outputs)
    result = empty_gradients(inputs, settings, needs_x)
    args.grad_input, args.grad_weight_ih, args.grad_weight_hh = map(pointer, result[:3])
    args.grad_h0, args.grad_c0 = pointer(result.h), pointer(result.c)
    for norm, weight, bias in (
        (args.norm_ih, result.weight_norm_ih, result.bias_ih),
        (args.norm_hh, result.weight_norm_hh, result.bias_hh),
        (args.norm_cell, result.weight_norm_cell, result.bias_norm_cell),
    ):
        norm.grad_weight, norm.grad_bias = pointer(weight), pointer(bias)
    call("backward", args, dtype)
    return result


def empty_gradients(inputs: Inputs, settings: Settings, needs_x: bool) -> Inputs:
    """Tensors that the backward pass fills in."""
    empty = inputs.weight_hh.new_empty
    result = Inputs(*(empty(0) if value is None else torch.empty_like(value) for value in inputs))
    if not needs_x:
        result = result._replace(x=empty(0))
    # Both biases of an LSTM or a simple network have the same gradient, which is computed once.
    if CELLS[settings.cell] != "gru" and inputs.bias_ih is not None:
        result = result._replace(bias_hh=empty(0))
    return result


def as_gradients(found: Sequence[Tensor], inputs: Inputs) -> list[Tensor | None]:
    """One gradient for each input, that of both biases twice where they share it."""
    grads = present(found, inputs)
    bias_ih, bias_hh = 3, 4
    shared = grads[bias_ih]
    if inputs.bias_hh is not None and grads[bias_hh] is None and shared is not None:
        grads[bias_hh] = shared.clone()  # else what is done to one of them in place is done to both
    return grads


class Recurrence(EagerFunction):
    """One recurrent layer in one direction."""


RECURRENCE = Operator(
    name="recurrence",
    inputs=Inputs,
    constants=Constants,
    settings=Settings,
    integers=INTEGERS,
    outputs=len(Outputs._fields),
    returned=6,
    gradients="Tensor? grad_output, Tensor? grad_h, Tensor? grad_c",
    saved="Tensor[] outputs",
    first_saved=0,
    forward=forward,
    allocate=allocate,
    backward=backward,
    empty_gradients=empty_gradients,
    as_gradients=as_gradients,
    node=Recurrence,
)
