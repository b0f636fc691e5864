"""Folded models in int8 and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import BLNGRU, BLNLSTM, ConvBLN2d, fold, recompute_population, set_mode
from tests.export.helpers import exports

RECURRENT = {
    "lstm": lambda: BLNLSTM(8, 32, time_statistics="shared", norm_cell=False, num_layers=2),
    "gru": lambda: BLNGRU(8, 32, time_statistics="shared", bidirectional=True),
    "frozen": lambda: BLNLSTM(8, 32),
}


class Reader(nn.Module):
    """A recurrent layer with a head."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.output_size * layer.num_directions, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][-1])


def reader(name: str) -> tuple[nn.Module, nn.Module]:
    """A model with a population, and it folded."""
    torch.manual_seed(0)
    model = Reader(RECURRENT[name]())
    recompute_population(model, [torch.randn(12, 16, 8) for _ in range(3)])
    set_mode(model.eval(), "pppp")
    return model, fold(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_dynamic_int8_works_as_for_layers_of_torch(name: str) -> None:
    model, folded = reader(name)
    small = torch.ao.quantization.quantize_dynamic(folded, {nn.LSTM, nn.GRU, nn.Linear}, dtype=torch.qint8)
    assert type(small.layer).__module__.startswith("torch.ao.nn.quantized.dynamic")
    for steps, samples in ((12, 4), (3, 1)):
        x = torch.randn(steps, samples, 8)
        with torch.no_grad():
            assert (small(x) - model(x)).abs().max() < 0.03  # a 127th of the largest weight, summed


@exports
@pytest.mark.exact
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lstm", "frozen", "image"])
def test_compiled_ahead_of_time(name: str, tmp_path: Path) -> None:
    if name == "image":
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(ConvBLN2d(3, 6, 3, positions="shared"), nn.Flatten(), nn.LazyLinear(4))
        x, axis = torch.randn(4, 3, 8, 8), 0
        recompute_population(model, [x, x + 1])
        set_mode(model.eval(), "pppp")
        folded = fold(model)
    else:
        model, folded = reader(name)
        x, axis = torch.randn(12, 4, 8), 1
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(folded, (x,), dynamic_shapes=({axis: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for samples in (4, 7, 1):
        example = (
            x.repeat(*(2 if place == axis else 1 for place in range(x.ndim))).narrow(axis, 0, samples).contiguous()
        )
        torch.testing.assert_close(compiled(example), model(example), rtol=0, atol=1e-5)
