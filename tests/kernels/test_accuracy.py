"""Errors of the fused kernels in float32, of outputs and of every gradient, beside those of torch operations.

Both are measured against float64 on the same numbers, many deviations from zero or from each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import ALL_MODES, Normalization, set_mode
from tests.kernels.helpers import built, flat, graph_of, pair, states_of

pytestmark = built

OFFSETS = {"0": 0.0, "1e1": 1e1, "1e3": 1e3, "1e5": 1e5}
DATA = [*OFFSETS, "constant column", "outlier first"]
MODES = ["train", *ALL_MODES]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "tanh": ("rnn", {"nonlinearity": "tanh"}),
    "relu": ("rnn", {"nonlinearity": "relu"}),
}
FAR = {"lstm": "1e3", "gru": "1e3", "tanh": "1e3", "relu": "1e1"}
"""An input for each, which leaves relu's products exact enough to say which units are on."""

TIMES, TIMES_OVER_STEPS = 4, 8
"""How many times the error of torch operations a kernel may have, and a recurrence, where roundings grow with time."""

FLOOR = 4e-6
"""What it may have besides, as a share of the largest number: a sum in another order has other roundings, the more the
fewer numbers the processor adds at once."""


def draw(data: str, *shape: int) -> Tensor:
    """Numbers in float32, the features last and the batch before them or, with other axes between, first."""
    x = torch.randn(shape) + OFFSETS.get(data, 0.0)
    if data == "constant column":
        x[..., 0] = 1e6
    if data == "outlier first":
        x[(0,) if len(shape) == 2 else (0, 0)] += 1e6
    return x


def assert_as_accurate(
    found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], times: int, case: Any
) -> None:
    for name, value in exact.items():
        size = value.abs().max().item()
        error, usual = ((other[name].double() - value).abs().max().item() for other in (found, plain))
        assert error <= times * usual + FLOOR * size, (
            f"{name} is off by {error / size:.2g} of its size, torch operations by {usual / size:.2g}; {case}"
        )


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def array_case(norm: str, data: str, mode: str, positions: str, *shape: int) -> tuple[Normalization, Tensor]:
    """A layer in training or with the population of another batch, and its input."""
    layer = Normalization(shape[-1], norm=norm, positions=positions, momentum=1.0, scale=False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if mode != "train":
        layer(draw(data, *shape))
        set_mode(layer.eval(), mode)
    return layer, draw(data, *shape)


def run_array(layer: Normalization, x: Tensor, grad: Tensor, backend: str) -> dict[str, Tensor]:
    layer.backend = backend
    leaves = {"gradient of x": x.clone().requires_grad_()} | {
        f"gradient of {name}": parameter for name, parameter in layer.named_parameters()
    }
    y = layer(leaves["gradient of x"])
    assert ("Dense" in str(graph_of(y))) == (backend == "cpu")
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True)) | {"output": y.detach()}


def compare_arrays(number: int, *case: Any) -> None:
    layer, x = array_case(*case)
    grad = torch.randn_like(x)
    wide = copy.deepcopy(layer).double()
    with threads(number):
        found = run_array(layer, x, grad, "cpu")
    plain = run_array(layer, x, grad, "reference")
    exact = run_array(wide, x.double(), grad.double(), "reference")
    assert_as_accurate(found, plain, exact, TIMES, (number, case))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_arrays_are_as_accurate_as_in_torch_operations(norm, data) -> None:
    # with one feature, nothing but roundings is left of layer norm's gradient
    for batch, features in [(2, 65), (3, 16), (8, 3 if norm == "layer" else 1), (33, 3)]:
        for mode in MODES:
            compare_arrays(1, norm, data, mode, "separate", batch, 8, features)
        for mode in ("train", "pcpc"):
            compare_arrays(1, norm, data, mode, "shared", batch, 8, features)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_moments_that_threads_merge_are_as_accurate(norm, data) -> None:
    for mode in ("train", "cppc", "pcpc"):
        for positions in ("separate", "shared"):  # of all positions at once, threads share the rows
            compare_arrays(2, norm, data, mode, positions, 33, 9, 65)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("norm", "shape"), [("layer", (8, 2, 1024)), ("batch", (128, 2, 16))])
def test_many_numbers_beside_one_that_lies_far_away_are_as_accurate(norm, shape, data) -> None:
    for mode in ("train", "pcpc"):
        compare_arrays(1, norm, data, mode, "separate", *shape)


def run_layer(layer: Any, x: Tensor, hx: Any) -> dict[str, Tensor]:
    dtype = next(layer.parameters()).dtype
    leaves = [value.to(dtype).requires_grad_() for value in (x, *flat(hx))]
    data, *states = leaves
    results = flat(layer(data, states[0] if len(states) == 1 else tuple(states)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator).to(dtype)).sum() for r in results)
    named = {f"leaf {i}": leaf for i, leaf in enumerate(leaves)} | dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | {
        f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True)
    }


def compare_layers(cell: str, norm: str, data: str, mode: str, number: int, *sizes: int) -> None:
    """The largest errors of a few layers, since the error of a single small one is a matter of luck."""
    samples, units = sizes
    kind, options = CELLS[cell]
    every: list[list[dict[str, Tensor]]] = [[], [], []]
    for _ in range(2):
        oracle, layer = pair(kind, 6, units, dtype=torch.float32, norm=norm, momentum=1.0, **options)
        x, hx = draw(data, 4, samples, 6), states_of(oracle, samples)
        if mode != "train":
            oracle(draw(data, 4, samples, 6))
            layer(x)  # brings its population into shape
            layer.load_state_dict(oracle.state_dict())
            for one in (oracle, layer):
                set_mode(one.eval(), mode)
        wide = copy.deepcopy(oracle).double()
        with threads(number):
            every[0].append(run_layer(layer, x, hx))
        every[1].append(run_layer(oracle, x, hx))
        every[2].append(run_layer(wide, x, hx))
    together = [{name: torch.stack([one[name] for one in runs]) for name in runs[0]} for runs in every]
    assert_as_accurate(*together, TIMES_OVER_STEPS, (cell, norm, data, mode, number, sizes))


@pytest.mark.parametrize(
    ("cell", "data"), [(cell, data) for cell in CELLS for data in (DATA if cell != "relu" else ("0", FAR[cell]))]
)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_recurrences_in_training_are_as_accurate(norm, cell, data) -> None:
    compare_layers(cell, norm, data, "train", 1, 8, 20)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrences_in_every_mode_are_as_accurate(cell) -> None:
    for mode in ALL_MODES:
        compare_layers(cell, "bln", FAR[cell], mode, 1, 8, 20)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrences_on_two_threads_are_as_accurate(cell, monkeypatch) -> None:
    for teams in ((2, 1), (1, 2)):  # rows are shared out, or units
        monkeypatch.setattr("lightning_bln.kernels.recurrent.TEAMS", teams)
        compare_layers(cell, "bln", FAR[cell], "train", 2, 33, 32)
