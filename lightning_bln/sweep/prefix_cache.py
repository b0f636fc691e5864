"""Cache of what a model computes before its first layer with a mode, which is the same for all modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_bln._torch import has_forward_hooks, tree_flatten
from lightning_bln.modes import HasMode, mode_layers
from lightning_bln.per_mode import holds
from lightning_bln.sweep.pytree import is_same_input, kept, trees_match, versions
from lightning_bln.sweep.random_state import RandomState
from lightning_bln.sweep.snapshot import snapshot

CPU = torch.device("cpu")


class Call(NamedTuple):
    """Inputs and output of one call of a module."""

    module: nn.Module
    inputs: tuple[tuple, dict]
    output: Any
    versions: list[int]

    def serves(self, module: nn.Module, inputs: tuple[tuple, dict]) -> bool:
        """Whether ``module`` would return the same for ``inputs``, and the output has not been written into since."""
        return (
            self.module is module
            and self.versions == versions(self.output)
            and trees_match(self.inputs, inputs, is_same_input)
        )


class Prefix:
    """Several forwards of a model on the same input that share what precedes the first layer with a mode.

    A module without a mode that only computes returns its earlier output if its place in the order of calls and its
    input are the same. An output that has been written into since is computed again.

    Args:
        model: The model.
        device: Where it lies.
    """

    def __init__(self, model: nn.Module, device: torch.device = CPU) -> None:
        self.model, self.device = model, device
        self.modules = [module for module in dict.fromkeys(without_mode(model)) if not has_hooks_inside(module)]
        self.calls: dict[int, Call] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within the context of one forward, modules return their earlier outputs."""
        number = count()
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(replacing_forward(module, partial(self.forward, number, module)))
            yield

    def forward(self, number: Iterator[int], module: nn.Module, plain: Callable, *args: Any, **kwargs: Any) -> Any:
        """A module's output, cached if no layer with a mode precedes it."""
        if torch.is_grad_enabled() or holds(tree_flatten((args, kwargs))[0]):
            return plain(*args, **kwargs)
        place = next(number)
        call = self.calls.get(place)
        if call is not None and call.serves(module, (args, kwargs)):
            return call.output
        # inference tensors do not count writes, so the cached output must be none
        inputs = kept((args, kwargs))
        before, random = snapshot(module), RandomState(self.device)
        with torch.inference_mode(False), torch.no_grad():
            output = plain(*args, **kwargs)
        written = versions(output)
        if written is not None and before == snapshot(module) and not random.has_moved():
            self.calls[place] = Call(module, inputs, output, written)
        return output


def without_mode(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules inside ``module`` that hold no layer with a mode."""
    if isinstance(module, HasMode):
        return
    is_called = type(module).forward is not nn.Module.forward
    if is_called and not mode_layers(module):
        yield module
    else:
        for child in module.children():
            yield from without_mode(child)


def has_hooks_inside(module: nn.Module) -> bool:
    """Whether calls of ``module`` run hooks, which would not see a call that is answered from the cache."""
    return any(has_forward_hooks(part) for part in module.modules())


class Replacement(partial[Any]):
    """A module's forward for a while; a copy of the module gets its own."""

    module: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self.module).forward, memo.get(id(self.module), self.module))


@contextmanager
def replacing_forward(module: nn.Module, forward: Callable) -> Iterator[Callable]:
    """Within the context, calls of ``module`` go to ``forward``, with the module's own forward as first argument."""
    own, plain = module.__dict__.get("forward"), module.forward
    replacement = Replacement(forward, plain)
    replacement.module = module
    module.__dict__["forward"] = replacement
    try:
        yield plain
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own
