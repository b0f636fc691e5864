"""What a model computes before its first layer with a mode: alike for all modes, and so done once a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bln._torch import tree_flatten
from lightning_bln.modes import FanOut, HasMode, mode_layers
from lightning_bln.sweep.pytree import same_tree


class Call(NamedTuple):
    """What a module was given, and what it returned."""

    module: nn.Module
    inputs: tuple[tuple, dict]
    output: Any
    versions: list[int]

    def serves(self, module: nn.Module, inputs: tuple[tuple, dict]) -> bool:
        """Whether ``module`` would give for ``inputs`` what it gave here, and nobody has written into that."""
        return self.module is module and self.versions == versions(self.output) and same_tree(self.inputs, inputs)


class Prefix:
    """Lets several forwards of a model on the same input share what stands before the first layer with a mode.

    A module without a mode gives what it gave before if it is called as the same one in turn with equal input. An
    output that has been written into since is computed again.

    Args:
        model: The model; its modules give the same for the same input, as they do in evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(dict.fromkeys(without_mode(model)))
        self.calls: dict[int, Call] = {}

    @contextmanager
    def shared(self, fan: FanOut) -> Iterator[None]:
        """Within the context of one forward under ``fan``, modules return what they have returned before."""
        number = count()
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(replacing_forward(module, partial(self.forward, fan, number, module)))
            yield

    def forward(
        self, fan: FanOut, number: Iterator[int], module: nn.Module, plain: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """A module's output, kept as long as no layer with a mode has been met."""
        if fan.is_fanned or torch.is_grad_enabled():
            return plain(*args, **kwargs)
        place = next(number)
        call = self.calls.get(place)
        if call is not None and call.serves(module, (args, kwargs)):
            return call.output
        # inference tensors do not tell whether they have been written into
        with torch.inference_mode(False), torch.no_grad():
            output = plain(*args, **kwargs)
        if not any(tensor.is_inference() for tensor in tensors(output)):
            self.calls[place] = Call(module, (args, kwargs), output, versions(output))
        return output


def without_mode(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside that hold no layer with a mode."""
    if isinstance(module, HasMode):
        return
    is_called = type(module).forward is not nn.Module.forward
    if is_called and not mode_layers(module):
        yield module
    else:
        for child in module.children():
            yield from without_mode(child)


@contextmanager
def replacing_forward(module: nn.Module, forward: Callable) -> Iterator[Callable]:
    """Within the context, ``module`` calls ``forward`` with its own forward and its arguments."""
    own, plain = module.__dict__.get("forward"), module.forward
    module.__dict__["forward"] = partial(forward, plain)
    try:
        yield plain
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def versions(output: Any) -> list[int]:
    """How often each tensor has been written into."""
    return [tensor._version for tensor in tensors(output)]
