"""Populations that compiled graphs gather into."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bln import BLNLSTM, BatchLayerNorm, ConvBLN1d, Recurrent, reset_population
from lightning_bln._torch import HAS_CUSTOM_OPS

pytestmark = pytest.mark.skipif(not HAS_CUSTOM_OPS, reason="this torch has no custom operators")

LAYERS = {
    "layer": lambda: BatchLayerNorm(3),
    "paper": lambda: BatchLayerNorm(3, population="paper"),
    "conv": lambda: ConvBLN1d(3, 4, 3),
    "lstm": lambda: BLNLSTM(3, 4, batch_first=True),
    "shared time": lambda: BLNLSTM(3, 4, batch_first=True, time_statistics="shared"),
    "gru": lambda: Recurrent("gru", 3, 4, batch_first=True, norm="batch", bidirectional=True),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(name: str, steps: int) -> torch.Tensor:
    x = torch.randn(4, steps, 3)
    return x.movedim(1, 2) if name == "conv" else x


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_populations_grow_beside_one_graph(name, backend):
    layer = LAYERS[name]()
    reference = deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for steps in (5, 7, 4, 9, 12, 3, 6, 14, 15, 16, 17, 18):
        x = batch(name, steps)
        compiled(x)
        reference(x)
    assert reference.state_dict().keys() == layer.state_dict().keys()
    torch.testing.assert_close(layer.state_dict(), reference.state_dict())


@pytest.mark.parametrize("duplicate", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_gathers_for_itself(duplicate):
    layer = BatchLayerNorm(3)
    twin = duplicate(layer)
    torch.compile(twin, fullgraph=True, backend="aot_eager")(torch.randn(4, 5, 3))
    assert not layer.population.is_gathering
    assert twin.population.positions == (5,)


def test_equal_blocks_share_a_graph_and_gather_each_for_itself():
    blocks = nn.Sequential(*(BatchLayerNorm(3) for _ in range(12)))
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    blocks(torch.randn(4, 5, 3))
    assert [block.population.positions for block in blocks] == [(5,)] * 12


def test_a_repetition_for_activation_checkpointing_is_not_gathered():
    layer = BatchLayerNorm(3)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(4, 5, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=True).sum().backward()
    assert layer.population.count.tolist() == [4] * 5


def test_with_momentum_a_graph_evaluates_by_what_it_has_just_gathered():
    layer = BatchLayerNorm(3, momentum=0.2)
    layer.mode = "pppp"
    layer(torch.randn(5, 4, 3))
    reference = deepcopy(layer)

    def both(layer, x):
        layer.training = True
        y = layer(x)
        layer.training = False
        return y, layer(x)

    compiled = torch.compile(both, backend="aot_eager")
    for steps in (4, 7, 6):
        x = torch.randn(5, steps, 3)
        torch.testing.assert_close(compiled(layer, x), both(reference, x))


def test_a_graph_may_begin_again_before_it_gathers():
    def begin(layer, x):
        reset_population(layer)
        return layer(x)

    layer = BatchLayerNorm(3)
    compiled = torch.compile(begin, backend="aot_eager", fullgraph=True)
    for size in (4, 5):
        compiled(layer, torch.randn(size, 2, 3))
        assert layer.population.count.tolist() == [size] * 2


@pytest.mark.parametrize("made_in", [torch.inference_mode, FakeTensorMode])
def test_it_does_not_matter_in_which_mode_a_layer_was_made(made_in):
    with made_in():
        layer = BatchLayerNorm(3)
    layer.load_state_dict(BatchLayerNorm(3).state_dict(), assign=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(4, 5, 3))
    assert layer.population.positions == (5,)
