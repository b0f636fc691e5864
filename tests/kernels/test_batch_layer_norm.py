"""The fused layer norm of an array against :func:`batch_layer_norm`: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from lightning_bln import ALL_MODES, Normalization, batch_layer_norm, set_mode
from tests.kernels.helpers import TOLERANCE, built, graph_of

pytestmark = built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("positions", ["separate", "shared"])
@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [((6, 5), 0), ((1, 3), 0), ((7, 4, 9), 0), ((4, 7, 33), 1), ((300, 2, 70), 0), ((3, 2, 4, 1), 0)],
)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_layer_equals_the_function(threads, norm, shape, batch_dim, positions, dtype) -> None:
    layer = Normalization(shape[-1], norm=norm, positions=positions, batch_dim=batch_dim, dtype=dtype)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight)), layer.bias.add_(torch.randn_like(layer.bias))
    leaves = torch.randn(shape, dtype=dtype, requires_grad=True), layer.weight, layer.bias
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = layer(leaves[0])
        grad = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, leaves, grad)]
    finally:
        torch.set_num_threads(before)
    assert "Dense" in str(graph_of(y))
    y = batch_layer_norm(*leaves, norm=norm, positions=positions, batch_dim=batch_dim)
    expected = [y, *torch.autograd.grad(y, leaves, grad)]
    for value, other in zip(found, expected, strict=True):
        error = (value - other).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("positions", ["separate", "shared"])
def test_the_layer_in_every_mode(mode, positions) -> None:
    layer = Normalization(6, positions=positions, momentum=0.5, dtype=torch.float64)
    layer(torch.randn(9, 4, 6, dtype=torch.float64))
    set_mode(layer.eval(), mode)
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    grad, results = torch.randn_like(x), []
    for backend in ("cpu", "reference"):
        layer.backend = backend
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)])
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


def test_the_layer_takes_overlapping_and_sliced_inputs() -> None:
    layer = Normalization(5)
    for x in (torch.randn(2, 1, 5).expand(2, 9, 5), torch.randn(4, 6, 5)[:, ::2], torch.randn(4, 3, 10)[..., ::2]):
        torch.testing.assert_close(layer(x), batch_layer_norm(x, layer.weight, layer.bias))


@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize(
    ("where", "distance"), [((0, slice(None)), 1e3), ((slice(None), 0), 1e3), ((0, 0), 1e5), ((5, 5), 1e5)], ids=str
)
def test_moments_of_numbers_far_from_zero_and_from_each_other(where, distance, norm) -> None:
    x = 1000 + torch.randn(64, 200)
    x[where] += distance  # the first row and the first column are where distances are taken from
    layer = Normalization(200, norm=norm, scale=False)
    y = layer(x)
    assert "Dense" in str(graph_of(y))
    exact = batch_layer_norm(x.double(), norm=norm, scale=False)
    assert (y - exact).abs().max() <= 2e-4 * exact.abs().max()
