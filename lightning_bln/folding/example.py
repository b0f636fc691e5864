"""An example input: what a model's norms see of it, and whether a folded model gives the same outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._torch import BatchNorm
from lightning_bln.norm import Normalization
from lightning_bln.sweep.plot import number
from lightning_bln.sweep.pytree import kept
from lightning_bln.sweep.random_state import RandomState

COARSE = 2.0**-10
"""Relative rounding of products of float32 on devices that multiply with fewer bits."""


class Example:
    """An example input of a model, and what the model makes of it.

    Args:
        model: The model in evaluation mode, a copy of which is run.
        given: The one argument to call it with, or a tuple of positional or a dict of keyword arguments.

    Attributes:
        axes: For each norm the numbers of axes of the inputs that it is called with.

    Raises:
        ValueError: A key of a dict is no name of an argument.
    """

    def __init__(self, model: nn.Module, given: Any) -> None:
        if isinstance(given, Mapping) and not all(isinstance(key, str) for key in given):
            raise ValueError(
                f"example has the keys {[*given]}, but a dict holds arguments by name; pass a tuple for positional "
                "ones, ({...},) for a dict that is an argument itself"
            )
        self.given = given
        self.axes: dict[nn.Module, set[int]] = {}
        self.dtypes = {one.dtype for one in (*model.parameters(), *model.buffers())}
        device = next((one.device for one in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.random = RandomState(device)
        twin = deepcopy(model)
        for real, norm in zip(model.modules(), twin.modules(), strict=True):
            if isinstance(norm, (Normalization, BatchNorm)):
                self.watch(real, norm)
        self.expected = self.run(twin)

    def watch(self, real: nn.Module, norm: nn.Module) -> None:
        """Note the numbers of axes that a twin of the norm ``real`` is called with."""

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            for value in (*args, *kwargs.values())[:1]:
                if isinstance(value, Tensor):
                    self.axes.setdefault(real, set()).add(value.ndim)
                    self.dtypes.add(value.dtype)

        norm.register_forward_pre_hook(note, with_kwargs=True)

    def run(self, model: nn.Module) -> Any:
        """The outputs of a model that may be changed; random generators stay as they are."""
        given = kept(self.given)
        self.random.restore()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a stale population, which the report names
                if isinstance(given, Mapping):
                    return model(**given)
                if isinstance(given, tuple) and not isinstance(given, PackedSequence):
                    return model(*given)
                return model(given)
        finally:
            self.random.restore()

    def check(self, folded: nn.Module) -> None:
        """Raise ValueError where a folded model gives outputs that differ by more than rounding."""
        found = dict(leaves(self.run(deepcopy(folded))))
        expected = dict(leaves(self.expected))
        if found.keys() != expected.keys():
            raise ValueError(f"the folded model gives other outputs than the model for example=: {MEND}")
        worst = max(
            ((difference(found[name], one) / self.tolerance(one), name) for name, one in expected.items()),
            default=(0.0, ""),
        )
        if worst[0] > 1.0:
            name = worst[1]
            moved = number(difference(found[name], expected[name]))
            raise ValueError(
                f"output{name} of the folded model differs from the model's for example=, by {moved} of its size where "
                f"rounding allows {number(self.tolerance(expected[name]))}: {MEND}"
            )

    def tolerance(self, output: Any) -> float:
        """The relative difference that rounding may come to: half of the digits of the coarsest numbers used.

        Folded weights are rounded once more, which layers behind amplify by some digits; a map of a wrong axis or in
        the wrong place is off by the size of the outputs.
        """
        dtypes = {dtype for dtype in self.dtypes if dtype.is_floating_point or dtype.is_complex}
        is_far = isinstance(output, Tensor) and output.device.type != "cpu"
        if isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex()):
            dtypes.add(output.dtype)
        return math.sqrt(max([epsilon(dtype, is_far=is_far) for dtype in dtypes], default=epsilon(torch.float32)))


MEND = (
    "the forward does what a trace does not show, such as walking through the layers of a Sequential, or draws numbers "
    "from a random generator of its own; call each part as a whole, or fold parts of the model one by one"
)


def epsilon(dtype: torch.dtype, *, is_far: bool = False) -> float:
    """The relative rounding of a product of a dtype, on a device other than the CPU if it ``is_far``."""
    own = torch.finfo(dtype).eps
    return max(own, COARSE) if is_far and dtype == torch.float32 else own


def leaves(value: Any, name: str = "", seen: Collection[int] = ()) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values in nested outputs, each by its place; attributes of objects are among them."""
    if isinstance(value, (Tensor, nn.Module, str)) or id(value) in seen:
        yield name, value
        return
    seen = {*seen, id(value)}
    if isinstance(value, Mapping):
        inner = [(f"[{key!r}]", one) for key, one in value.items()]
    elif isinstance(value, (tuple, list)):
        inner = [(f"[{place}]", one) for place, one in enumerate(value)]
    else:
        inner = [(f".{key}", one) for key, one in getattr(value, "__dict__", {}).items()]
    if not inner:
        yield name, value
    for place, one in inner:
        yield from leaves(one, name + place, seen)


def as_tensor(value: Any) -> Any:
    """A number or an array of numbers as a tensor, all else as it is."""
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    return torch.as_tensor(value) if is_array or isinstance(value, (int, float, complex)) else value


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two outputs, relative to the largest number; the share of entries if they count.

    Where one is NaN or infinite, the other one has to be the same.
    """
    found, expected = map(as_tensor, (found, expected))
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        is_plain = isinstance(found, (str, bytes, type(None))) or isinstance(expected, (str, bytes, type(None)))
        return math.inf if is_plain and found != expected else 0.0
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return math.inf
    if found.layout != torch.strided or expected.layout != torch.strided:
        found, expected = found.to_dense(), expected.to_dense()
    if not expected.numel() or found.is_meta or expected.is_meta:
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((found != expected).double().mean())
    exact = torch.promote_types(expected.dtype, torch.float64)
    found, expected = (one.detach().cpu().to(exact) for one in (found, expected))
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    if not bool((is_same | (found.isfinite() & expected.isfinite())).all()):
        return math.inf
    size = float(expected[expected.isfinite()].abs().max()) if bool(expected.isfinite().any()) else 0.0
    gap = torch.where(is_same, torch.zeros_like(found), found - expected).abs().max()
    return float(gap) / (size or 1.0)
