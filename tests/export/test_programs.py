"""Programs of torch.export on the default backend: torch's operators alone, for any number of samples and steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_bln import BLNLSTM, BatchLayerNorm, Recurrent
from tests.export.helpers import CASES, LAYERS, SIZES, Layer, evaluating, exports, flat

pytestmark = exports

LOADS = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, *wanted = torch.load(sys.argv[2])
found = program(x)
leaves = torch.utils._pytree.tree_leaves(found)
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(leaves, wanted, strict=True))
assert not any(name.startswith("lightning_bln") for name in sys.modules)
"""


def program_of(layer: torch.nn.Module, case: Layer) -> torch.export.ExportedProgram:
    return torch.export.export(layer, (case.example(3, 6),), dynamic_shapes=(case.axes(),))


@pytest.mark.exact
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_program_is_the_layer_at_any_size(name, mode) -> None:
    case = LAYERS[name]
    layer = case.made(mode)
    program = program_of(layer, case)
    assert not [node for node in program.graph.nodes if "lightning_bln" in str(node.target)]
    call = program.module()
    for sizes in SIZES:
        x = case.example(*sizes)
        torch.testing.assert_close(flat(call(x)), flat(layer(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["shared", "conv2d", "lstm"])
def test_program_loads_without_this_package(name, tmp_path: Path) -> None:
    case = LAYERS[name]
    layer = case.made()
    torch.export.save(program_of(layer, case), tmp_path / "program.pt2")
    x = case.example(2, 9)
    torch.save([x, *(value.detach() for value in flat(layer(x)))], tmp_path / "values.pt")
    files = str(tmp_path / "program.pt2"), str(tmp_path / "values.pt")
    subprocess.run([sys.executable, "-c", LOADS, *files], check=True, cwd=tmp_path)


def test_steps_are_unrolled_where_their_number_is_fixed() -> None:
    layer = LAYERS["lstm"].made()
    axes = {1: torch.export.Dim("samples", min=1, max=64)}
    program = torch.export.export(layer, (torch.randn(5, 3, 4),), dynamic_shapes={"input": axes})
    assert not [node for node in program.graph.nodes if "scan" in str(node.target)]
    for samples in (1, 7, 32):
        x = torch.randn(5, samples, 4)
        torch.testing.assert_close(flat(program.module()(x)), flat(layer(x)), atol=1e-5, rtol=1e-5)


def test_the_step_is_traced_once_for_each_direction() -> None:
    program = program_of(LAYERS["deep"].made(), LAYERS["deep"])
    assert sum(str(node.target) == "scan" for node in program.graph.nodes) == 4


def test_first_states_are_an_input() -> None:
    layer = LAYERS["lstm"].made()
    samples, steps = torch.export.Dim("samples", min=1, max=64), torch.export.Dim("steps", min=1, max=64)
    state = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    shapes = {"input": {0: steps, 1: samples}, "hx": ({1: samples}, {1: samples})}
    program = torch.export.export(layer, (torch.randn(4, 3, 4), state), dynamic_shapes=shapes).module()
    for sizes in SIZES:
        x, hx = torch.randn(sizes[1], sizes[0], 4), (torch.randn(1, sizes[0], 5), torch.randn(1, sizes[0], 5))
        torch.testing.assert_close(flat(program(x, hx)), flat(layer(x, hx)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_layers_without_norms_leave_the_steps_open(training) -> None:
    layer, case = BLNLSTM(4, 5, norm=None).train(training), LAYERS["lstm"]
    x = case.example(2, 11)
    torch.testing.assert_close(flat(program_of(layer, case).module()(x)), flat(layer(x)), atol=1e-5, rtol=1e-5)


def test_training_with_norms_has_a_fixed_number_of_steps() -> None:
    with pytest.raises(RuntimeError, match="specialized"):
        program_of(Recurrent("gru", 4, 5), LAYERS["lstm"])


def test_an_image_of_separate_positions_has_a_fixed_size() -> None:
    layer = evaluating(BatchLayerNorm(4, channel_dim=1), [torch.randn(8, 4, 6, 5)])
    axes = {2: torch.export.Dim("steps", min=4, max=64)}
    with pytest.warns(UserWarning, match="positions='shared'"), pytest.raises(RuntimeError, match="specialized"):
        torch.export.export(layer, (torch.randn(3, 4, 6, 5),), dynamic_shapes=(axes,))
