"""Calls of a model: their tensors, how many samples these hold, and calls of another size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import BoundArguments, Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln._scoped import setting
from lightning_bln._torch import tree_flatten, tree_unflatten
from lightning_bln.exporting.errors import ExportError


class Call(NamedTuple):
    """Arguments that a model is called with.

    Args:
        args: Positional ones: tensors, or tuples, lists and dictionaries of tensors; ``None`` may be among them.
        kwargs: Those given by name.
        samples: The number of samples that they hold, such as ``x.size(1)`` where these lie on the second axis; by
            default the size of the first tensor's first axis.

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
        leaves, structure = tree_flatten(in_order((self.args, dict(self.kwargs))))
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
        """Call a function with copies of these arguments, into which it may write."""
        copy = self.map(lambda _, x: x.clone())
        return function(*copy.args, **copy.kwargs)

    def like(self, other: Call) -> Call:
        """The call with dictionaries in the order of those in another one, by which files know tensors."""
        if self.structure() != other.structure():
            raise ExportError(
                f"arguments are of the structure {self.structure()}, where those of {other.structure()} fit"
            )
        args, kwargs = in_order((self.args, dict(self.kwargs)), (other.args, dict(other.kwargs)))
        return Call(args, kwargs, self.samples)


def as_call(example: Any, model: nn.Module) -> Call:
    """An example as a call on the CPU, with arguments in the order of ``forward``.

    A tuple holds positional arguments, a dictionary arguments by name, and all else is the one argument.

    Raises:
        ExportError: It does not fit ``forward``, has no tensor, an empty one, or values that a file cannot take.
    """
    if isinstance(example, Call):
        call = example
    elif isinstance(example, dict):
        call = Call((), example)
    else:
        call = Call(example if isinstance(example, tuple) else (example,))
    bound = bind(call, model)
    call = Call(bound.args, bound.kwargs, call.samples)
    others = {type(one).__name__ for one in call.leaves() if not isinstance(one, Tensor) and one is not None}
    if others:
        raise ExportError(
            f"{type(model).__name__}.forward is called with values of type {' and '.join(sorted(others))}, where a "
            "file takes tensors alone; export a module whose forward takes tensors and sets the rest"
        )
    if not any(x.ndim and x.numel() for x in call.tensors()):
        raise ExportError(f"{type(model).__name__}.forward is called without a tensor that holds samples")
    check_samples(call)
    with torch.inference_mode(False):
        return call.map(lambda _, x: x.detach().cpu().clone())


def bind(call: Call, model: nn.Module) -> BoundArguments:
    """Arguments by the names that ``forward`` gives them; raise where they do not fit."""
    own = signature(model.forward)
    try:
        return own.bind(*call.args, **call.kwargs)
    except TypeError as error:
        given = ", ".join([*(type(one).__name__ for one in call.args), *(f"{name}=" for name in call.kwargs)])
        names = ", ".join(own.parameters)
        raise ExportError(
            f"the example ({given}) does not fit {type(model).__name__}.forward({names}): {error}; a tuple holds "
            "positional arguments, a dictionary those by name"
        ) from error


def check_samples(call: Call) -> None:
    """Raise unless the number of samples, where it is given, is the size of an axis."""
    if call.samples is None:
        return
    if isinstance(call.samples, bool) or not isinstance(call.samples, int) or not has_samples(call):
        shapes = " and ".join(str(tuple(x.shape)) for x in call.tensors())
        raise ExportError(
            f"samples={call.samples!r} is the size of no axis of the example, whose shape is {shapes}; pass the number "
            "of samples, such as samples=x.size(1)"
        )


def has_samples(call: Call) -> bool:
    """Whether an axis has as many entries as there are samples."""
    return any(axis is not None for axis in call.batch_axes())


def arguments_of(call: Call, model: nn.Module) -> dict[str, Any]:
    """Arguments by their names, further ones by name among them, as :func:`torch.export.export` names their shapes."""
    bound = bind(call, model)
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = bound.signature.parameters[name].kind is Parameter.VAR_KEYWORD
        found.update(value if is_rest else {name: value})
    return found


@contextmanager
def named(call: Call, model: nn.Module) -> Iterator[None]:
    """Context in which the signature of ``forward`` names the arguments that go into its ``**kwargs``.

    Torch 2.13 counts these twice otherwise.
    """
    bound = bind(call, model)
    own = [*bound.signature.parameters.values()]
    rest = next((one.name for one in own if one.kind is Parameter.VAR_KEYWORD), None)
    if rest is None:
        yield
        return
    forward = model.forward

    def explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    names = bound.arguments.get(rest, {})
    extra = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    explicit.__signature__ = bound.signature.replace(  # type: ignore[attr-defined]
        parameters=[*(one for one in own if one.name != rest), *extra]
    )
    with setting([model], forward=explicit):
        yield


def in_order(value: Any, like: Any = None) -> Any:
    """A nested value whose dictionaries have the order of those in ``like``, or that of their keys."""
    if type(value) is dict:
        keys = like if isinstance(like, dict) else sorted(value, key=repr)
        return {key: in_order(value[key], None if like is None else like[key]) for key in keys}
    if type(value) in (tuple, list):
        others = [None] * len(value) if like is None else like
        return type(value)(in_order(one, other) for one, other in zip(value, others, strict=True))
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors of a model's result, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def filled(like: Any, tensors: Sequence[Tensor]) -> Any:
    """A result of the structure of ``like`` with other tensors."""
    leaves, structure = tree_flatten(like)
    rest = iter(tensors)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def of_one_kind(calls: Sequence[Call]) -> tuple[list[Call], list[str]]:
    """Those calls that have the structure which most have, and a sentence on the others."""
    if not calls:
        raise ExportError("examples is empty; pass at least one input of the model")
    kinds = [call.structure() for call in calls]
    most = max(dict.fromkeys(kinds), key=kinds.count)
    found = [call for call, kind in zip(calls, kinds, strict=True) if kind == most]
    others = len(calls) - len(found)
    note = f"{others} of {len(calls)} examples are left out, which have another structure or dtype than the rest"
    return [call.like(found[0]) for call in found], [note] if others else []
