"""Pairs of norms, on torch operations and on Triton kernels, and how they are run and compared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import Normalization
from lightning_bln.kernels.triton.available import installed, is_interpreted

interpreted = pytest.mark.skipif(
    installed() is None or not is_interpreted(), reason="needs triton and TRITON_INTERPRET=1: make test-triton"
)
with_triton = pytest.mark.skipif(installed() is None, reason="needs triton: make test-triton")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of the largest number; of narrow dtypes one rounding, which intermediate values may tip over."""


def pair(features: int, **options: Any) -> tuple[Normalization, Normalization]:
    """The same layer on both backends, away from where it starts."""
    oracle = Normalization(features, backend="reference", **options)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layer = copy.deepcopy(oracle)
    layer.backend = "triton"
    return oracle, layer


def run(layer: Normalization, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, gradients and population."""
    x = x.detach().requires_grad_()
    y = layer(x)
    assert ("TritonNormBackward" in graph_of(y)) == (layer.backend == "triton")
    grads = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    found = {f"gradient of {name}": value for name, value in zip(names, grads, strict=True)} | {"output": y.detach()}
    with torch.no_grad():
        found["output without gradients"] = copy.deepcopy(layer)(x)
    return found | {name: value for name, value in layer.named_buffers() if value.numel()}


def graph_of(y: Tensor) -> str:
    """Names of the nodes behind ``y``, as far as there is one before each."""
    names, node = [], y.grad_fn
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(names)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal names, shapes, dtypes and layouts, and numbers within ``tolerance`` of the largest."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        if "gradient" not in name:
            assert strides_of(found[name]) == strides_of(value), name
        own, other = found[name].double(), value.double()
        scale = max(1.0, other.abs().nan_to_num(0, 0, 0).max().item())
        torch.testing.assert_close(
            own, other, rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def strides_of(value: Tensor) -> list[int]:
    """Strides of axes that are longer than one."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
