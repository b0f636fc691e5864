"""Numbers of axes of the values in a graph, where the graph alone proves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_bln._torch import BatchNorm, has_hooks
from lightning_bln.norm import Normalization

POINTWISE = ("relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "dropout", "softplus", "hardtanh", "relu6")
"""Names of functions, and methods, whose output has their input's axes."""

KEEPING_FUNCTIONS = {getattr(place, name) for name in POINTWISE for place in (torch, F) if hasattr(place, name)}

WRITING = (
    *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "pow", "remainder"),
    *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal"),
    *("sin", "cos", "tan", "tanh", "sinh", "cosh", "sigmoid", "relu", "elu", "celu", "selu", "leaky_relu", "rrelu"),
    *("hardtanh", "threshold", "round", "floor", "ceil", "trunc", "frac", "sign", "erf", "nan_to_num", "lerp"),
    *("clamp", "clamp_min", "clamp_max", "clip", "dropout", "alpha_dropout", "feature_dropout", "copy", "fill", "zero"),
    *("masked_fill", "masked_scatter", "index_add", "index_copy", "index_fill", "index_put", "scatter", "scatter_add"),
    *("addcmul", "addcdiv", "bernoulli", "normal", "uniform", "detach", "requires_grad"),
)
"""Names, less the underscore, of methods that write into their input and keep its shape."""

KEEPING = (
    *(nn.Linear, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, BatchNorm, nn.LayerNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.PReLU, nn.Softmax, nn.LogSoftmax),
)
"""Layers whose output has their input's axes."""


def axes_after(node: fx.Node, module: nn.Module | None, known: dict[fx.Node, int | None]) -> int | None:
    """Axes of a node's value, from those of earlier nodes; ``None`` where the graph leaves them open."""
    source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None or (module is not None and (has_hooks(module) or "forward" in vars(module))):
        return None
    rest: tuple[Any, ...] = node.args[1:]
    if module is not None:
        if type(module) is nn.Flatten:
            return two(node) if (module.start_dim, module.end_dim) == (1, -1) else None
        is_ours = isinstance(module, Normalization) and type(module).forward is Normalization.forward
        keeps = is_ours or type_before_parametrizations(module) in KEEPING or is_batch_norm(module)
        return known[source] if keeps else None
    is_method = node.op == "call_method"
    if node.target == "flatten" if is_method else node.target is torch.flatten:
        given = {**dict(zip(("start_dim", "end_dim"), rest, strict=False)), **node.kwargs}
        return two(node) if given.get("start_dim") == 1 and given.get("end_dim", -1) == -1 else None
    if is_method and node.target in ("view", "reshape") and len(rest) == 2 and not node.kwargs:
        return two(node)
    keeps = node.target in POINTWISE if is_method else node.op == "call_function" and node.target in KEEPING_FUNCTIONS
    return known[source] if keeps else None


def two(node: fx.Node) -> int | None:
    """Two axes, unless something in the graph may change a shape in place: of the node's value, under whatever name."""
    return None if any(map(is_reshaping, node.graph.nodes)) else 2


def is_reshaping(node: fx.Node) -> bool:
    """Whether a node is a function or method that writes into its input, and not known to keep the shape."""
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__") and name.removesuffix("_") not in WRITING


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm with torch's forward."""
    return isinstance(module, BatchNorm) and type(module).__module__.startswith("torch.nn")
