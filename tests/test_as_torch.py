"""Every way of using a torch module, on every layer: right, or a documented error, as docs/compatibility.md says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_bln._torch import HAS_CUSTOM_OPS
from tests.as_torch import page
from tests.as_torch.layers import LAYERS
from tests.as_torch.outcomes import outcome
from tests.as_torch.torch_layers import TORCH_LAYERS
from tests.as_torch.ways import WAYS, Way

PAIRS = [
    (way, layer) for way in WAYS.values() for layer, cases in LAYERS.items() if any(way.applies(case) for case in cases)
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.exact
@pytest.mark.parametrize(
    ("way", "layer"),
    [
        pytest.param(way, layer, id=f"{way.name}-{layer}", marks=[pytest.mark.exact] if way.name == "ONNX" else [])
        for way, layer in PAIRS
    ],
)
def test_layer_is_right_or_raises_a_documented_error(way: Way, layer: str) -> None:
    if way.name.startswith(("torch.compile", "torch.export")) and not HAS_CUSTOM_OPS:
        pytest.skip("torch 2.3 has no custom operators, which compilation takes the kernels by")
    if way.name == "ONNX":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    found = outcome(way, LAYERS[layer])
    assert not found.failures, "\n".join(found.failures)
    if page.version() == page.VERSION:
        assert page.read()[way.name, layer] == found.text, "run make compatibility"


def test_page_has_every_way_and_layer() -> None:
    assert set(page.read()) == {(way, layer) for way in WAYS for layer in (*LAYERS, *TORCH_LAYERS)}
