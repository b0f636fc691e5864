"""Modes share one forward where that gives the same, in chunks where memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, set_mode
from lightning_bln._torch import OutOfMemoryError
from lightning_bln.modes import mode_layers
from lightning_bln.sweep.shared_forward import SharedForward
from tests.sweep.networks import MODELS, prepared


class Run:
    def __init__(self, mode: str) -> None:
        self.mode = mode


def forwards(model: nn.Module, shared: SharedForward, batches: list) -> list[int]:
    """For each batch, how often the first layer with a mode runs in the steps of all modes."""
    layer, counts = mode_layers(model)[0], []
    plain = type(layer).forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return plain(layer, *args, **kwargs)

    layer.forward = counted  # type: ignore[method-assign]
    with torch.no_grad():
        for x, _ in batches:
            counts.append(0)

            def step(run: Run, x: Tensor = x) -> None:
                set_mode(model, run.mode)
                model(x)

            shared.step_per_mode([Run(mode) for mode in ALL_MODES], step)
    del layer.forward
    return counts


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("recurrent", "one layer")])
def test_modes_share_one_forward_after_the_check_where_they_can(name: str) -> None:
    model, batches, shares = prepared(name)
    model.eval()
    shared = SharedForward(model)
    counts = forwards(model, shared, [*batches, batches[0]])
    assert counts[0] >= 16
    assert counts[-1] == (1 if shares else 16)
    assert shared.is_active is shares


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.sweep.shared_module.BYTES", 5 * 8 * 5 * 4)
    model, batches, _ = prepared("perceptron")
    shared = SharedForward(model.eval())
    counts = forwards(model, shared, batches)
    assert shared.chunk == 5
    assert counts[2] == 4


def test_out_of_memory_means_smaller_chunks_then_the_plain_way() -> None:
    model, batches, _ = prepared("perceptron")
    model.eval()
    shared = SharedForward(model)
    linear = model[0]

    class Small(nn.Module):
        limit = 64

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.limit:
                raise OutOfMemoryError("out of memory")
            return x

    model[2] = Small()
    shared = SharedForward(model)
    result = forwards(model, shared, [batches[0]] * 4)
    assert shared.chunk == 8
    assert result[-1] == 2
    model[2].limit = 8
    forwards(model, shared, [batches[0]] * 4)
    assert not shared.is_active
    assert shared.failure == "Sequential cannot be shared, since it raised OutOfMemoryError: out of memory"
    assert linear is model[0]


def test_hooks_inside_rule_sharing_out() -> None:
    model, _, _ = prepared("perceptron")
    assert SharedForward(model).failure is None
    model[0].register_forward_hook(lambda *_: None)
    shared = SharedForward(model)
    assert not shared.is_active
    assert "forward hooks inside" in (shared.failure or "")


def test_the_reason_tells_the_first_line_of_an_error() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                raise ValueError(f"{len(x)} samples are too many\nfor this layer")
            return x

    model, batches, _ = prepared("perceptron")
    model[2] = Picky()
    shared = SharedForward(model.eval())
    forwards(model, shared, batches)
    reason = "all modes in one forward raise ValueError: 128 samples are too many"
    assert shared.failure == f"Sequential cannot be shared, since {reason}"
