"""An example input: what a model's norms see of it, and whether a folded model gives the same outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._torch import BatchNorm
from lightning_bln.folding.difference import difference, leaves
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
        found = self.run(deepcopy(folded))
        if dict(leaves(found)).keys() != dict(leaves(self.expected)).keys():
            raise ValueError(f"the folded model gives other outputs than the model for example=: {MEND}")
        worst = difference(found, self.expected, self.tolerance)
        if not worst.is_alike:
            raise ValueError(
                f"output{worst.place} of the folded model differs from the model's for example=, by "
                f"{number(worst.relative)} of its size where rounding allows {number(worst.tolerance)}: {MEND}"
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
