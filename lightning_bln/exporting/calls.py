"""Calls of a model: their tensors, how many samples these hold, and calls of another size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln._torch import tree_flatten, tree_unflatten
from lightning_bln.exporting.errors import ExportError


class Call(NamedTuple):
    """Arguments that a model is called with.

    Args:
        args: Positional ones: tensors, or tuples, lists and dictionaries of tensors; ``None`` may be among them.
        kwargs: Those given by name.
        samples: How many samples they hold; by default the size of the first tensor's first axis.

    Example:
        >>> Call((torch.zeros(7, 3, 5),), samples=3).batch_axes()
        [1]
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    samples: int | None = None

    def leaves(self) -> list[Any]:
        """Tensors and other values, in order."""
        return tree_flatten((self.args, dict(self.kwargs)))[0]

    def tensors(self) -> list[Tensor]:
        """The tensors, in order."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, Tensor)]

    def structure(self) -> str:
        """Text that is the same for calls that one program serves."""
        leaves, structure = tree_flatten((self.args, dict(self.kwargs)))
        return f"{structure} {[(one.dtype, one.ndim) if isinstance(one, Tensor) else one for one in leaves]}"

    def size(self) -> int:
        """The number of samples."""
        return self.tensors()[0].shape[0] if self.samples is None else self.samples

    def batch_axes(self) -> list[int | None]:
        """The first axis of each tensor that has as many entries as there are samples."""
        return [next((axis for axis, n in enumerate(x.shape) if n == self.size()), None) for x in self.tensors()]

    def map(self, change: Callable[[int, Tensor], Tensor]) -> Call:
        """The call with each tensor changed; the function gets its number and the tensor."""
        leaves, structure = tree_flatten((self.args, dict(self.kwargs)))
        numbers = iter(range(len(leaves)))
        made = [change(next(numbers), one) if isinstance(one, Tensor) else one for one in leaves]
        args, kwargs = tree_unflatten(made, structure)
        return Call(args, kwargs, self.samples)

    def resized(self, places: Sequence[tuple[int, int]], size: int) -> Call:
        """The call with another size along axes, each given by a tensor's number and the axis."""

        def change(number: int, x: Tensor) -> Tensor:
            for owner, axis in places:
                if owner == number:
                    times = -(-size // x.shape[axis])
                    x = torch.cat([x] * times, axis).narrow(axis, 0, size)
            return x

        return self.map(change)._replace(samples=None)

    def run(self, function: Callable[..., Any]) -> Any:
        """Call a function with these arguments."""
        return function(*self.args, **self.kwargs)


def as_call(example: Any, model: nn.Module) -> Call:
    """An example as a call on the CPU, with arguments in the order of ``forward``.

    A tuple holds positional arguments, a dictionary arguments by name, and all else is the one argument.

    Raises:
        ExportError: It has no tensor, an empty one, or values that a file cannot take.
    """
    if isinstance(example, Call):
        call = example
    elif isinstance(example, dict):
        call = Call((), example)
    else:
        call = Call(example if isinstance(example, tuple) else (example,))
    bound = signature(model.forward).bind(*call.args, **call.kwargs)
    call = Call(bound.args, bound.kwargs, call.samples)
    others = {type(one).__name__ for one in call.leaves() if not isinstance(one, Tensor) and one is not None}
    if others:
        raise ExportError(
            f"{type(model).__name__}.forward is called with values of type {' and '.join(sorted(others))}, where a "
            "file takes tensors alone; export a module whose forward takes tensors and sets the rest"
        )
    if not any(x.ndim and x.numel() for x in call.tensors()):
        raise ExportError(f"{type(model).__name__}.forward is called without a tensor that holds samples")
    with torch.inference_mode(False):
        return call.map(lambda _, x: x.detach().cpu().clone())


def arguments_of(call: Call, model: nn.Module) -> dict[str, Any]:
    """Arguments by the names that ``forward`` gives them, as :func:`torch.export.export` names their shapes."""
    bound = signature(model.forward).bind(*call.args, **call.kwargs)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = bound.signature.parameters[name].kind is Parameter.VAR_KEYWORD
        found.update(value if is_rest else {name: value})
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors of a model's result, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def filled(like: Any, tensors: Sequence[Tensor]) -> Any:
    """A result of the structure of ``like`` with other tensors."""
    leaves, structure = tree_flatten(like)
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def of_one_kind(calls: Sequence[Call]) -> list[Call]:
    """Those calls that have the structure which most have."""
    if not calls:
        raise ExportError("examples is empty; pass at least one input of the model")
    kinds = [call.structure() for call in calls]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    return [call for call, kind in zip(calls, kinds, strict=True) if kind == most]
