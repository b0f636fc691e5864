"""Programs of torch.export with as many open axes as the model leaves."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_bln._torch import open_recurrences, tree_map
from lightning_bln.exporting.calls import Call, arguments_of, named
from lightning_bln.exporting.conditions import doubtful_sizes, limits_of
from lightning_bln.exporting.errors import ExportError, first_line, quiet

BATCH = "batch"
"""The name of the axis of the samples."""

LARGEST = 2**24
"""The most numbers in a tensor whose size was chosen here."""

Place = tuple[int, int]
"""A tensor's number among those of a call, and an axis of it."""


@dataclass(frozen=True)
class Axes:
    """Axes of a program's inputs.

    Args:
        names: The inputs' names.
        sizes: For each input its axes: a number where the size is fixed, or a name.
        open: For each name the places where the size is that one.
        notes: Sentences on why axes are fixed.
        limits: For names the largest size, where the program has one.
        doubtful: For names sizes at which a condition in the program may have been decided otherwise.
        special: For names sizes at which some size becomes 1, so that torch's programs may refuse them.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | str, ...], ...]
    open: dict[str, list[Place]]
    notes: tuple[str, ...] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    doubtful: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    special: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        each = [f"{name} ({', '.join(map(str, sizes))})" for name, sizes in zip(self.names, self.sizes, strict=True)]
        return ", ".join(each)

    def label(self, name: str) -> str:
        """The first axis of a name, in words."""
        number, axis = self.open[name][0]
        return f"axis {axis} of {self.names[number]}"

    def ends(self) -> list[str]:
        """Sentences on axes that the model itself takes up to some size."""
        return [f"{self.label(name)} goes up to {limit}, as in the model" for name, limit in self.limits.items()]


@dataclass(frozen=True)
class Program:
    """A program of torch.export, and the axes of its inputs."""

    program: Any
    axes: Axes


def most_open(model: nn.Module, calls: Sequence[Call]) -> Program:
    """Export a model with all axes open that it takes at another size, and that no condition limits."""
    every = {(number, axis) for number, x in enumerate(calls[0].tensors()) for axis in range(x.ndim)}
    closed = dict[Place, str]()
    while True:
        program = capture(model, calls, every - closed.keys())
        found = to_close(program.axes, model, calls)
        if not found:
            break
        closed |= found
    fixed = every - {place for places in program.axes.open.values() for place in places}
    for number, axis in sorted(fixed - closed.keys()):
        if any(takes(calls[0], model, [(number, axis)], "")) and not program.axes.notes:
            closed[number, axis] = f"axis {axis} of {program.axes.names[number]} is fixed by torch.export"
    notes = dict.fromkeys(closed[place] for place in sorted(closed) if closed[place])
    return replace(program, axes=replace(program.axes, notes=(*program.axes.notes, *notes)))


def to_close(axes: Axes, model: nn.Module, calls: Sequence[Call]) -> dict[Place, str]:
    """Open axes that need not be open and should not: each with a sentence, or none where the model fixes the size."""
    needed, found = places_needed(calls), dict[Place, str]()
    for name, places in axes.open.items():
        if is_conditional(axes, name, model, calls[0]):
            reason = f"{axes.label(name)} is fixed, since a condition of forward ends at {axes.limits[name]}"
            found |= dict.fromkeys(places, f"{reason} and the model takes more")
        elif not any(takes(calls[0], model, places, name)):
            found |= dict.fromkeys(places, "")
    return {place: reason for place, reason in found.items() if place not in needed}


def is_conditional(axes: Axes, name: str, model: nn.Module, call: Call) -> bool:
    """Whether a program limits an axis where the model does not: by a branch that it has taken for all sizes."""
    limit, places = axes.limits.get(name), axes.open[name]
    if limit is None:
        return False
    return any(is_small(call, places, size) and accepts(call, model, places, size) for size in (limit + 1, 2 * limit))


def is_small(call: Call, places: Sequence[Place], size: int) -> bool:
    """Whether tensors of another size along an axis are of a size to try."""
    tensors = call.tensors()
    return all(tensors[number].numel() // tensors[number].shape[axis] * size <= LARGEST for number, axis in places)


def accepts(call: Call, model: nn.Module, places: Sequence[Place], size: int) -> bool:
    """Whether a model takes another size along an axis."""
    try:
        with torch.no_grad():
            call.resized(places, size).run(model)
    except Exception:  # of any layer
        return False
    return True


def takes(call: Call, model: nn.Module, places: Sequence[Place], name: str) -> Iterator[bool]:
    """Whether a model takes each of the other sizes along an axis."""
    return (accepts(call, model, places, size) for size in other_sizes(call, places, name))


def other_sizes(call: Call, places: Sequence[Place], name: str) -> tuple[int, int]:
    """Two other sizes to try along an axis: of samples one and twice as many, else half and twice as many."""
    number, axis = places[0]
    size = call.tensors()[number].shape[axis]
    half = size // 2 if size > 3 else size + 1  # one is special to torch, and to convolutions
    return (1 if size > 1 else 3) if name == BATCH else half, 2 * size


def capture(model: nn.Module, calls: Sequence[Call], places: Collection[Place]) -> Program:
    """Export a model with some axes open.

    Args:
        model: A model in evaluation.
        calls: What it is called with; the first is the example.
        places: Axes to leave open where the model does.

    Raises:
        ExportError: It cannot be exported, or not with those axes open in which samples lie or calls differ.
    """
    call, batch = calls[0], sorted(batch_places(calls))
    if batch and call.size() == 1:
        call = call.resized(batch, 2)  # a size of one would be taken for a constant
    silent = (quiet(), torch.no_grad(), open_recurrences(), named(call, model))
    with ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
        for one in silent:
            stack.enter_context(one)
        warnings.simplefilter("always")
        try:
            shapes = shapes_of(model, call, dict.fromkeys(places, torch.export.Dim.AUTO))
            program = torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch raises errors of all kinds
            raise ExportError(f"torch.export: {first_line(error)}") from error
    own = [str(one.message) for one in caught if "positions=" in str(one.message)]  # the layer's reason
    axes = axes_of(program, calls, tuple(dict.fromkeys(own)))
    check_open(axes, model, calls)
    return Program(program, axes)


def check_open(axes: Axes, model: nn.Module, calls: Sequence[Call]) -> None:
    """Raise unless those axes are open that have to be, as far as the model takes them."""
    call, needed = calls[0], places_needed(calls)
    is_open = {place for each in axes.open.values() for place in each}
    for number, axis in sorted(needed - is_open):
        size = call.tensors()[number].shape[axis]
        mend = "; if samples do not lie on axis 0 of the first tensor, pass Call((x,), samples=number)"
        is_guess = (number, axis) in batch_places(calls) and call.samples is None
        raise ExportError(
            f"axis {axis} of {axes.names[number]} is a constant of the program, {size}{mend if is_guess else ''}"
        )
    for name, places in axes.open.items():
        if needed.isdisjoint(places):
            continue
        which = axes.label(name)
        if is_conditional(axes, name, model, call):
            raise ExportError(
                f"{which} is open up to {axes.limits[name]} alone, by a condition of forward, and the model takes more"
            )
        sizes = {one.tensors()[places[0][0]].shape[places[0][1]] for one in calls}
        if len(sizes) == 1 and not any(takes(call, model, places, name)):
            tried = " nor ".join(map(str, other_sizes(call, places, name)))
            raise ExportError(f"{which} cannot be open, since the model takes neither {tried} in place of {max(sizes)}")


def places_needed(calls: Sequence[Call]) -> set[Place]:
    """Axes in which calls differ, and that of the samples."""
    shapes = [[tuple(x.shape) for x in call.tensors()] for call in calls]
    found = {
        (number, axis)
        for number, first in enumerate(shapes[0])
        for axis, size in enumerate(first)
        if any(other[number][axis] != size for other in shapes)
    }
    return found | batch_places(calls)


def batch_places(calls: Sequence[Call]) -> set[Place]:
    """The axis of the samples in each tensor, if all calls agree on one."""
    each = zip(*(call.batch_axes() for call in calls), strict=True)
    return {(number, axes[0]) for number, axes in enumerate(each) if axes[0] is not None and len({*axes}) == 1}


def shapes_of(model: nn.Module, call: Call, kinds: Mapping[Place, Any]) -> dict[str, Any]:
    """Kinds or names of axes, in the structure of the arguments as :func:`torch.export.export` takes them."""
    numbers = iter(range(len(call.leaves())))

    def shape(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        number = next(numbers)
        return {axis: kinds[number, axis] for axis in range(value.ndim) if (number, axis) in kinds}

    return {name: tree_map(shape, value) for name, value in arguments_of(call, model).items()}


def axes_of(program: Any, calls: Sequence[Call], notes: tuple[str, ...]) -> Axes:
    """Axes of a program, by names for those that are open: ``batch``, or the input's name and the axis."""
    nodes = inputs_of(program)
    batch, names, found = batch_places(calls), dict[str, str](), dict[str, list[Place]]()
    every, symbols = [], dict[str, Any]()
    for number, node in enumerate(nodes):
        sizes: list[int | str] = []
        for axis, size in enumerate(node.meta["val"].shape):
            if str(size).isdigit():  # also a symbol that has turned out to be a constant
                sizes.append(int(size))
                continue
            is_batch = (number, axis) in batch and BATCH not in names.values()
            name = names.setdefault(str(size), BATCH if is_batch else f"{node.name}_{axis}")
            found.setdefault(name, []).append((number, axis))
            symbols.setdefault(name, size)
            sizes.append(name)
        every.append(tuple(sizes))
    example = {name: calls[0].tensors()[places[0][0]].shape[places[0][1]] for name, places in found.items()}
    doubtful, special = (doubtful_sizes(symbols, example, special=one) for one in (False, True))
    limits = limits_of(program, symbols)
    return Axes(tuple(node.name for node in nodes), tuple(every), found, notes, limits, doubtful, special)


def inputs_of(program: Any) -> list[Any]:
    """Nodes of a program's input tensors, in order."""
    inputs = {*program.graph_signature.user_inputs}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
