"""Programs of torch.export with as many open axes as the model leaves."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_bln._torch import open_recurrences, tree_map
from lightning_bln.exporting.calls import Call, arguments_of
from lightning_bln.exporting.errors import ExportError, first_line, quiet

BATCH = "batch"
"""The name of the axis of the samples."""

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
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int | str, ...], ...]
    open: dict[str, list[Place]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        each = [f"{name} ({', '.join(map(str, sizes))})" for name, sizes in zip(self.names, self.sizes, strict=True)]
        return ", ".join(each)


@dataclass(frozen=True)
class Program:
    """A program of torch.export, and the axes of its inputs."""

    program: Any
    axes: Axes


def most_open(model: nn.Module, calls: Sequence[Call]) -> Program:
    """Export a model with all axes open that it takes at another size."""
    every = {(number, axis) for number, x in enumerate(calls[0].tensors()) for axis in range(x.ndim)}
    program = capture(model, calls, every)
    found = program.axes.open
    refused = {place for name in found if not any(takes(calls[0], model, found[name], name)) for place in found[name]}
    if refused - places_needed(calls):
        program = capture(model, calls, every - refused)
    fixed = sorted(every - {place for places in program.axes.open.values() for place in places})
    constant = [place for place in fixed if any(takes(calls[0], model, [place], ""))]
    notes = [f"axis {axis} of {program.axes.names[number]} is fixed by torch.export" for number, axis in constant]
    return replace(program, axes=replace(program.axes, notes=program.axes.notes or tuple(notes)))


def takes(call: Call, model: nn.Module, places: Sequence[Place], name: str) -> Iterator[bool]:
    """Whether a model takes each of the other sizes along an axis."""
    for size in other_sizes(call, places, name):
        try:
            with torch.no_grad():
                call.resized(places, size).run(model)
        except Exception:  # of any layer
            yield False
        else:
            yield True


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
    with quiet(), warnings.catch_warnings(record=True) as caught, torch.no_grad(), open_recurrences():
        warnings.simplefilter("always")
        try:
            shapes = shapes_of(model, call, dict.fromkeys(places, torch.export.Dim.AUTO))
            program = torch.export.export(model, call.args, dict(call.kwargs), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch raises errors of all kinds
            raise ExportError(f"torch.export: {first_line(error)}") from error
    own = [str(one.message) for one in caught if "positions=" in str(one.message)]  # the layer's reason
    axes = axes_of(program, calls, tuple(dict.fromkeys(own)))
    is_open = {place for each in axes.open.values() for place in each}
    for number, axis in sorted(places_needed(calls) - is_open):
        size = call.tensors()[number].shape[axis]
        raise ExportError(f"axis {axis} of {axes.names[number]} is a constant of the program, {size}")
    return Program(program, axes)


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
    inputs = {*program.graph_signature.user_inputs}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    batch, names, found = batch_places(calls), dict[str, str](), dict[str, list[Place]]()
    every = []
    for number, node in enumerate(nodes):
        sizes: list[int | str] = []
        for axis, size in enumerate(node.meta["val"].shape):
            if str(size).isdigit():  # also a symbol that has turned out to be a constant
                sizes.append(int(size))
                continue
            is_batch = (number, axis) in batch and BATCH not in names.values()
            name = names.setdefault(str(size), BATCH if is_batch else f"{node.name}_{axis}")
            found.setdefault(name, []).append((number, axis))
            sizes.append(name)
        every.append(tuple(sizes))
    return Axes(tuple(node.name for node in nodes), tuple(every), found, notes)
