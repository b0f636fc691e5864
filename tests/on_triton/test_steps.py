"""All steps of a batch of sequences on Triton kernels, under its interpreter, against torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import freeze_population, set_mode
from lightning_bln.modes import ALL_MODES
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.sequence_norm import normalize_steps, take_in
from lightning_bln.recurrence.sequences import Running
from tests.on_triton.helpers import TOLERANCE, graph_of, interpreted

pytestmark = interpreted

T, B, G, H = 4, 5, 3, 6
RAGGED = (5, 5, 3, 1)
float64 = torch.float64


def run(norm: GateNorm, x: Tensor, running: Running, bias: Tensor | None, grad: Tensor, backend: str) -> list[Tensor]:
    """Output, gradients, and statistics gathered; rows without data aside, which may hold anything."""
    x = x.clone().requires_grad_()
    leaves = [x, *norm.parameters(), *([] if bias is None else [bias])]
    y, seen = normalize_steps(norm.sequence(running), x, running, bias, backend=backend)
    take_in(norm, norm.sequence(running), seen, running)
    rows = running.rows(x.device)
    held = y if rows is None else y.flatten(0, 1)[rows]
    used = grad if rows is None else grad.flatten(0, 1)[rows]
    grads = torch.autograd.grad(held, leaves, used, allow_unused=True)
    population = [value for _, value in sorted(norm.named_buffers()) if value.is_floating_point()]
    return [held.detach(), *(one for one in grads if one is not None), *population]


def compare(mode: str, sizes: Any, dtype: torch.dtype = float64, has_bias: bool = True, **options: Any) -> None:
    x, grad = torch.randn(T, B, G, H, dtype=dtype), torch.randn(T, B, G, H, dtype=dtype)
    bias = torch.randn(G * H, dtype=dtype, requires_grad=True) if has_bias else None
    running, found = Running(T, B, sizes), []
    for backend in ("reference", "triton"):
        norm = GateNorm(H, G, dtype=dtype, **options)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, G * H))
        if mode != "train":
            normalized = normalize_steps(norm.sequence(running), 2 * x + 1, running, backend="reference")
            take_in(norm, norm.sequence(running), normalized[1], running)
            freeze_population(norm)
            set_mode(norm.eval(), mode)
        found.append(run(norm, x, running, bias, grad, backend))
    for own, other in zip(*reversed(found), strict=True):
        torch.testing.assert_close(own, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [None, RAGGED], ids=str)
@pytest.mark.parametrize("gate_statistics", ["separate", "joint"])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_training_equals_the_reference(norm, gate_statistics, sizes) -> None:
    compare("train", sizes, norm=norm, gate_statistics=gate_statistics)


@pytest.mark.parametrize("mode", ALL_MODES, ids=str)
def test_every_mode(mode) -> None:
    compare(str(mode), RAGGED if str(mode)[0] == "p" else None, has_bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(dtype) -> None:
    compare("train", RAGGED, dtype, has_bias=False)


def test_padding_enters_nothing() -> None:
    """Rows that do not run come out as zeros, whatever they hold, and have no gradient."""
    x = torch.randn(T, B, G, H, dtype=float64)
    ended = torch.arange(B)[None, :] >= torch.tensor(RAGGED)[:, None]
    x[ended] = float("nan")
    norm, running = GateNorm(H, G, dtype=float64), Running(T, B, RAGGED)
    leaf = x.requires_grad_()
    y, seen = normalize_steps(norm.sequence(running), leaf, running, backend="triton")
    assert y[ended].eq(0).all()
    assert isinstance(seen, Tensor)
    assert seen.isfinite().all()
    (grad,) = torch.autograd.grad(y.sin().sum(), leaf)
    assert grad[ended].eq(0).all()
    assert grad.isfinite().all()


def test_auto_takes_triton_where_it_serves(monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.recurrence.sequence_norm.serves_triton", lambda *_: True)
    x, norm, running = torch.randn(T, B, G, H), GateNorm(H, G), Running(T, B)
    y, _ = normalize_steps(norm.sequence(running), x, running)
    assert "TritonNorm" in graph_of(y)


@pytest.mark.parametrize("sizes", [None, RAGGED], ids=str)
def test_moments_are_gathered_without_the_library(sizes, monkeypatch) -> None:
    """As on a device, where the C++ kernels cannot merge them."""
    monkeypatch.setattr("lightning_bln.merging.can_merge", lambda *_: False)
    compare("train", sizes)


def test_fan_out_is_refused() -> None:
    norm, running = GateNorm(H, G).eval(), Running(T, B)
    with pytest.raises(ValueError, match="backend='triton', but x has 5 axes"):
        normalize_steps(norm.sequence(running), torch.randn(T, 2, B, G, H), running, backend="triton")
