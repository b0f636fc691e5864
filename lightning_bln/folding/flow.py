"""Modules that feed one another, learnt by symbolic tracing."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln._torch import BatchNorm, has_hooks
from lightning_bln.conv import ConvBLN1d, ConvBLN2d, ConvBLN3d
from lightning_bln.convert.plain import OURS
from lightning_bln.folding.axes import axes_after

PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Layers that evaluate to their input."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules without a forward."""

BLOCKS = (ConvBLN1d, ConvBLN2d, ConvBLN3d)


class Flow:
    """Modules that feed one another, over all ways in which a model could be traced.

    Attributes:
        after: For each module the modules that its output goes to, ``None`` among them for anything else.
        before: For each module those that its input comes from, likewise.
        axes: For each layer the numbers of axes of its inputs, ``None`` among them where a trace leaves one open.
        extra: For each module the names or places of further arguments that it is called with.
        read: Modules whose tensors something reads past their forward.
        untraced: For each module that cannot be traced, the reason.
        by_default: Modules that were traced with the defaults of their arguments alone.
    """

    def __init__(self) -> None:
        self.after: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self.before: dict[nn.Module, set[nn.Module | None]] = defaultdict(set)
        self.axes: dict[nn.Module, set[int | None]] = defaultdict(set)
        self.extra: dict[nn.Module, set[str]] = defaultdict(set)
        self.read: set[nn.Module] = set()
        self.untraced: dict[nn.Module, str] = {}
        self.by_default: list[nn.Module] = []

    @classmethod
    def of(cls, model: nn.Module) -> Flow:
        """The flow within a model, which stays as it is."""
        flow = cls()
        # forwards may keep what they compute, so that a twin is traced; its parameters are the model's
        twin = deepcopy(model, {id(one): one for one in model.parameters()})
        real = dict(zip(twin.modules(), model.modules(), strict=True))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            flow.learn(twin, real, set())
        return flow

    def feeder(self, module: nn.Module) -> nn.Module | None:
        """The module that feeds ``module`` alone, and that nothing else feeds."""
        return sole(module, self.before, self.after)

    def fed(self, module: nn.Module) -> nn.Module | None:
        """The module that ``module`` alone feeds, and that feeds nothing else."""
        return sole(module, self.after, self.before)

    def pass_over(self, module: nn.Module) -> None:
        """Take a module out that now gives its input back."""
        sources, sinks = self.before.pop(module, {None}), self.after.pop(module, {None})
        for source in sources - {None}:
            self.after[source] = self.after[source] - {module} | sinks  # type: ignore[index]
        for sink in sinks - {None}:
            self.before[sink] = self.before[sink] - {module} | sources  # type: ignore[index]

    def learn(self, root: nn.Module, real: Mapping[nn.Module, nn.Module], seen: set[nn.Module]) -> None:
        """Trace a module, or where that fails, its children."""
        if root in seen or is_leaf(root):
            return
        seen.add(root)
        if isinstance(root, BLOCKS) and is_block(root):
            return self.learn_block(root, real)
        graphs, reason = traced(root)
        for graph in graphs:
            self.add(root, graph, real)
        if graphs:
            if reason is not None:
                self.by_default.append(real[root])
            called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_module"}
            inner = [root.get_submodule(str(name)) for name in called]
        else:
            inner = [*root.children()]
            if not self.learn_sequence(root, real) and not isinstance(root, CONTAINERS):
                self.untraced[real[root]] = reason or ""
        for module in inner:
            self.learn(module, real, seen)

    def learn_sequence(self, root: nn.Module, real: Mapping[nn.Module, nn.Module]) -> bool:
        """Take the order of a Sequential; return whether ``root`` is one. Children of others are called as they may be.

        A container between two layers, and the ends, count as anything else.
        """
        is_sequence = type(root) is nn.Sequential and "forward" not in vars(root)
        children = [one for one in root.children() if not isinstance(one, PASSING) or has_hooks(one)]
        layers: list[nn.Module | None] = [real[one] if is_leaf(one) else None for one in children]
        for layer in layers:
            if layer is not None:
                self.axes[layer].add(None)
        if not is_sequence:
            for layer in layers:
                self.link(None, layer)
                self.link(layer, None)
        elif layers:
            for source, sink in zip([None, *layers], [*layers, None], strict=True):
                self.link(source, sink)
        return is_sequence

    def learn_block(self, block: Any, real: Mapping[nn.Module, nn.Module]) -> None:
        """Take the order of a convolution block."""
        conv, norm = real[block.conv], real[block.norm]
        if block.order == "conv-norm-act" or type(block.activation) is nn.Identity:
            chain = [None, conv, norm, None]
        else:
            chain = [None, conv, None, norm, None]
        for source, sink in pairwise(chain):
            self.link(source, sink)

    def link(self, source: nn.Module | None, sink: nn.Module | None) -> None:
        """Note that the output of one goes to the other; ``None`` stands for anything else."""
        if source is not None:
            self.after[source].add(sink)
        if sink is not None:
            self.before[sink].add(source)

    def add(self, root: nn.Module, graph: fx.Graph, real: Mapping[nn.Module, nn.Module]) -> None:
        """Note the links of a graph."""
        origin: dict[fx.Node, nn.Module | None] = {}
        axes: dict[fx.Node, int | None] = {}
        for node in graph.nodes:
            module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
            sources = [origin[one] for one in node.all_input_nodes]
            is_plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
            axes[node] = axes_after(node, module, axes)
            if isinstance(module, PASSING) and is_plain and not has_hooks(module):
                origin[node] = sources[0]
                continue
            found = None if module is None else real[module]
            origin[node] = found
            if found is not None:
                self.axes[found].add(axes[node.args[0]] if is_plain else None)
                self.extra[found] |= {f"argument {place}" for place in range(2, len(node.args) + 1)} | set(node.kwargs)
            for source in sources:
                self.link(source, found if is_plain else None)
            if found is not None and not is_plain:
                self.link(None, found)
            if node.op == "get_attr":
                path = str(node.target).split(".")[:-1]
                self.read |= {real[root.get_submodule(".".join(path[:end]))] for end in range(len(path) + 1)}


def sole(module: nn.Module, one: dict[nn.Module, set[Any]], other: dict[nn.Module, set[Any]]) -> nn.Module | None:
    """The one module on one side of ``module``, if on its other side there is ``module`` alone."""
    if len(one.get(module, ())) != 1:
        return None
    (found,) = one[module]
    return found if found is not None and other.get(found) == {module} else None


def is_block(module: Any) -> bool:
    """Whether a module is a convolution block with the forward of this package."""
    return isinstance(module, BLOCKS) and type(module).forward is ConvBLN2d.forward and "forward" not in vars(module)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer to look at as a whole."""
    kind = type_before_parametrizations(module)
    if type(module) in (nn.Sequential, *CONTAINERS):
        return False
    is_torchs = kind.__module__.startswith(("torch.nn", "torch.ao.nn", "torch.jit"))
    return is_torchs or isinstance(module, (*OURS, BatchNorm, torch.jit.ScriptModule))


class Tracer(fx.Tracer):
    """Symbolic tracing in which layers stay whole and no hook runs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or has_hooks(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_block(m) and not has_hooks(m):
            if len(args) != 1 or kwargs:
                return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
            forward = partial(run_block, m)
        return super().call_module(m, forward, args, kwargs)


def run_block(block: Any, x: Any) -> Any:
    """A block's forward without its checks, which ask for sizes."""
    y = block.conv(x)
    return block.norm(block.activation(y)) if block.order == "conv-act-norm" else block.activation(block.norm(y))


def traced(root: nn.Module) -> tuple[list[fx.Graph], str | None]:
    """Graphs of a module's forward, as called with all arguments and with those that have no default.

    Returns:
        The graphs, and the error of the first way if it failed.
    """
    parameters = inspect.signature(root.forward).parameters
    defaults = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    found, reason = [], None
    for given in [None, defaults] if defaults else [None]:
        try:
            found.append(Tracer().trace(root, given))
        except Exception as error:  # whatever a forward does with what is no tensor
            if given is None:
                reason = f"{type(error).__name__}: {first_sentence(str(error))}"
    return found, reason


def first_sentence(text: str) -> str:
    """The first sentence of an error."""
    return text.strip().partition("\n")[0].partition(". ")[0]
