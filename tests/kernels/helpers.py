"""Pairs of recurrent layers, on the reference and on the C++ kernels, and how they are run and compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_bln import BLNGRU, BLNLSTM, BLNRNN, Recurrent
from lightning_bln.kernels import available

built = pytest.mark.skipif(available()["cpu"] is None, reason="the compiled kernels are not installed")

LAYERS = {"lstm": BLNLSTM, "gru": BLNGRU, "rnn": BLNRNN}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
RAGGED = [6, 6, 4, 3, 1]


def pair(kind: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Recurrent, Recurrent]:
    """The same layer on the reference and on the compiled kernels, its norms away from where they start."""
    nonlinearity = {"nonlinearity": options.pop("nonlinearity", "tanh")} if kind == "rnn" else {}
    layers = [LAYERS[kind](*sizes, **nonlinearity, **options, backend=b, dtype=dtype) for b in ("reference", "cpu")]
    with torch.no_grad():
        for name, parameter in layers[0].named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    layers[1].load_state_dict(layers[0].state_dict())
    return layers[0], layers[1]


def sequences(lengths: list[int] | None, steps: int, samples: int, size: int, dtype: torch.dtype) -> Any:
    if lengths is None:
        return torch.randn(steps, samples, size, dtype=dtype)
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), size, dtype=dtype), lengths)


def states_of(layer: Recurrent, samples: int) -> Any:
    shape = layer.num_layers * layer.num_directions, samples, layer.hidden_size
    states = tuple(torch.randn(shape, dtype=next(layer.parameters()).dtype) for _ in layer.cell.states)
    return states[0] if len(states) == 1 else states


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def evaluate(layer: Recurrent, x: Any, hx: Any) -> dict[str, Tensor]:
    """Outputs, states, gradients of input, first states and parameters, and the population gathered, of one draw."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in [*flat(x), *flat(hx)]]
    data, *states = leaves
    passed = x._replace(data=data) if isinstance(x, PackedSequence) else data
    results = flat(layer(passed, states[0] if len(states) == 1 else tuple(states)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    named = {f"result {i}": r.detach() for i, r in enumerate(results)}
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves, *parameters.values()])
    names = [*(f"leaf {i}" for i in range(len(leaves))), *parameters]
    named |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return named | {name: value for name, value in layer.named_buffers() if value.numel()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value, other = value.double(), found[name].double()
        error = (value - other).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name} is off by {error}"


def compare(
    kind: str, x: Any, samples: int, sizes: tuple[int, int], tolerance: float | None = None, **options: Any
) -> None:
    dtype = flat(x)[0].dtype
    oracle, layer = pair(kind, *sizes, dtype=dtype, **options)
    hx = states_of(oracle, samples)
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), TOLERANCE[dtype])


def graph_of(y: Tensor) -> list[str]:
    """Names of the nodes behind ``y``."""
    names, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return names
