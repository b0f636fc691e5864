"""Steps fused by torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from lightning_bln import Recurrent, freeze_population
from lightning_bln._torch import CAN_COMPILE_STEPS

# Generating code is what takes the time: one cell shows that it works, the others that chunks are put together rightly.
CASES = [("ugrnn", None, "inductor")]
CASES += [(kind, norm, "aot_eager") for kind, norm in (("coupledlstm", "bln"), ("cfn", None))]


compiles_steps = pytest.mark.skipif(
    not CAN_COMPILE_STEPS, reason="torch.compile up to torch 2.7 fails at the steps of cells with norms"
)


@compiles_steps
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("kind", "norm", "compiler"), CASES)
def test_compiled_steps_are_the_reference(kind, norm, compiler, monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.recurrence.inductor.STEPS", 2)
    monkeypatch.setattr("lightning_bln.recurrence.inductor.COMPILER", compiler)
    layers = [Recurrent(kind, 3, 4, norm=norm, backend=name, dtype=torch.float64) for name in ("compile", "reference")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    results = []
    for layer in layers:
        output, states = layer(x)
        gradients = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        if norm is not None:
            freeze_population(layer)
        results.append(
            [output, *([states] if torch.is_tensor(states) else states), *gradients, *layer.state_dict().values()]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(CAN_COMPILE_STEPS, reason="this torch compiles the steps")
def test_an_older_torch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='compile', but torch\.compile of torch 2\."):
        Recurrent("ugrnn", 3, 4, backend="compile")


@compiles_steps
def test_a_chunk_with_a_normalised_state_is_one_graph(monkeypatch) -> None:
    """One graph where the first states have no gradient, one where they do."""
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr("lightning_bln.recurrence.inductor.STEPS", 2)
    monkeypatch.setattr("lightning_bln.recurrence.inductor.COMPILER", collect)
    Recurrent("lstm", 3, 4, norm="bln", backend="compile")(torch.randn(6, 5, 3))
    assert len(graphs) == 2
