"""ONNX files of the default backend, run by onnxruntime beside the layer itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bln import BatchLayerNorm
from tests.export.helpers import CASES, LAYERS, SIZES, evaluating, exports, flat

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

pytestmark = [exports, pytest.mark.exact, pytest.mark.filterwarnings("ignore")]


def session_of(layer: torch.nn.Module, inputs: tuple[Tensor, ...], shapes: Any, path: Path) -> Any:
    """The file that a layer converts to, which has standard operators alone."""
    program = torch.onnx.export(layer, inputs, dynamo=True, verbose=False, dynamic_shapes=shapes)
    assert program is not None
    program.save(path)
    model = program.model
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert not model.functions
    return onnxruntime.InferenceSession(path)


def run(session: Any, *inputs: Tensor) -> list[Tensor]:
    names = [one.name for one in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(one) for one in found]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_file_is_the_layer_at_any_size(name, mode, tmp_path: Path) -> None:
    case = LAYERS[name]
    layer = case.made(mode)
    session = session_of(layer, (case.example(3, 6),), (case.axes(),), tmp_path / "layer.onnx")
    for sizes in SIZES:
        x = case.example(*sizes)
        torch.testing.assert_close(run(session, x), [v.detach() for v in flat(layer(x))], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["pppp", "cccc"])
def test_masks_are_an_input(mode, tmp_path: Path) -> None:
    def mask(samples: int, steps: int) -> Tensor:
        return torch.arange(steps) < torch.randint(1, steps + 1, (samples, 1))

    layer = evaluating(BatchLayerNorm(4, positions="shared"), [torch.randn(8, 6, 4)], mode)
    axes = LAYERS["shared"].axes()
    session = session_of(layer, (torch.randn(3, 6, 4), mask(3, 6)), (axes, axes), tmp_path / "layer.onnx")
    for sizes in SIZES:
        x, is_data = torch.randn(*sizes, 4), mask(*sizes)
        found = run(session, x, is_data)
        torch.testing.assert_close(found, [layer(x, is_data).detach()], atol=1e-5, rtol=1e-5)


def test_open_steps_are_a_loop(tmp_path: Path) -> None:
    case = LAYERS["lstm"]
    session_of(case.made(), (case.example(3, 6),), (case.axes(),), tmp_path / "layer.onnx")
    assert re.search(rb"Scan", (tmp_path / "layer.onnx").read_bytes())
