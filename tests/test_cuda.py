"""The reference path on CUDA: devices, streams, autocast, graphs and compilation give what the CPU gives."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    Normalization,
    Recurrent,
    recompute_population,
    set_mode,
)

LAYERS: dict[str, Any] = {"lstm": BLNLSTM, "gru": BLNGRU, "rnn": BLNRNN}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def results(layer: nn.Module, x: Any) -> dict[str, Tensor]:
    """Output, gradients and statistics of a training step, on the CPU."""
    output = layer(x)
    while not isinstance(output, Tensor):
        output = output[0]
    output.square().sum().backward()
    found = {"output": output, **{name: p.grad for name, p in layer.named_parameters()}, **dict(layer.named_buffers())}
    return {name: value.detach().cpu() for name, value in found.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=tolerance, atol=tolerance, msg=name)


def pair(kind: str, norm: str | None = "bln", device: str = "cuda") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    own = LAYERS[kind](4, 8, norm=norm, backend="reference")
    return own, deepcopy(own).to(device)


@needs_cuda
@pytest.mark.parametrize("norm", ["bln", "layer", "batch", None])
@pytest.mark.parametrize("kind", LAYERS)
def test_as_on_the_cpu(kind: str, norm: str | None) -> None:
    own, there = pair(kind, norm)
    x = torch.randn(5, 3, 4)
    assert_close(results(there, x.cuda()), results(own, x))
    packed = pack_sequence([torch.randn(n, 4) for n in (5, 3, 2)])
    assert_close(results(there, packed.to("cuda")), results(own, packed))


@needs_cuda
def test_every_mode_as_on_the_cpu() -> None:
    own, there = pair("lstm")
    x = torch.randn(5, 3, 4)
    recompute_population(own, [x])
    there.load_state_dict(own.state_dict())
    own.eval(), there.eval()
    for mode in ("cccc", "ppcc", "pppp", "cpcp"):
        set_mode(own, mode), set_mode(there, mode)
        torch.testing.assert_close(there(x.cuda())[0].cpu(), own(x)[0], rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("device", [f"cuda:{k}" for k in range(max(1, torch.cuda.device_count()))])
def test_any_device_and_stream(device: str) -> None:
    own, there = pair("gru", device=device)
    x = torch.randn(5, 3, 4)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = results(there, x.to(device))
    stream.synchronize()
    assert_close(found, results(own, x))


@needs_cuda
def test_autocast_normalises_in_float32() -> None:
    own, there = pair("lstm")
    x = torch.randn(5, 3, 4)
    with torch.autocast("cuda", torch.bfloat16):
        found = results(there, x.cuda())
    assert_close(found, results(own, x), 0.1)
    assert there.norm_hh_l0.population.mean.dtype == torch.float32


@needs_cuda
def test_a_compiled_layer() -> None:
    own, there = pair("rnn")
    x = torch.randn(5, 3, 4)
    assert_close(results(torch.compile(there), x.cuda()), {"output": results(own, x)["output"]})


@needs_cuda
def test_a_graph_computes_and_gathers_at_every_replay() -> None:
    own, there = pair("lstm")
    x = torch.randn(5, 3, 4, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for some runs before a capture
        for _ in range(3):
            there(x)[0].square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    there.zero_grad(set_to_none=True)
    own.load_state_dict(there.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = there(x)[0]
        output.square().sum().backward()
    for _ in range(2):
        x.copy_(torch.randn(5, 3, 4))
        graph.replay()
        own.zero_grad(set_to_none=True)
        expected = results(own, x.cpu())
    found = {name: p.grad for name, p in there.named_parameters()} | dict(there.named_buffers()) | {"output": output}
    assert_close({name: value.detach().cpu() for name, value in found.items()}, expected)


@pytest.mark.parametrize("layer", [BatchLayerNorm(4, momentum=0.5), BLNLSTM(4, 3, backend="reference")], ids=str)
def test_statistics_stay_in_place_which_a_graph_replays(layer: nn.Module) -> None:
    batches = [torch.randn(5, 3, 4) for _ in range(3)]
    eager = deepcopy(layer)
    for x in batches:
        eager(x)
    layer(batches[0])
    places = {name: buffer.data_ptr() for name, buffer in layer.named_buffers() if buffer.numel()}
    assert places
    for x in batches[1:]:
        layer(x)
    assert places == {name: buffer.data_ptr() for name, buffer in layer.named_buffers() if buffer.numel()}
    for name, buffer in eager.named_buffers():
        assert torch.equal(dict(layer.named_buffers())[name], buffer), name


@needs_cuda
@pytest.mark.parametrize("positions", ["separate", "shared"])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 5, 40), -1), ((4, 3, 9, 7), 1), ((64, 2100), -1)])
def test_norms_on_triton_as_on_the_cpu(shape: tuple[int, ...], channel_dim: int, norm: str, positions: str) -> None:
    options: dict[str, Any] = {"norm": norm, "positions": positions, "channel_dim": channel_dim}
    own = Normalization(shape[channel_dim], backend="reference", **options)
    there = deepcopy(own).cuda()
    there.backend = "triton"
    x = torch.randn(shape)
    assert_close(results(there, x.cuda()), results(own, x))
    recompute_population(own, [x])
    there.load_state_dict(own.state_dict())
    own.eval(), there.eval()
    for mode in ("cccc", "ppcc", "pppp", "cpcp", "pcpc"):
        set_mode(own, mode), set_mode(there, mode)
        torch.testing.assert_close(there(x.cuda()).cpu(), own(x), rtol=1e-4, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("norm", ["bln", "layer", "batch", None])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "mgu", "mut1", "slstm"])
def test_recurrent_layers_on_triton_as_on_the_cpu(cell: str, norm: str | None) -> None:
    own = Recurrent(cell, 4, 40, norm=norm, backend="reference")
    there = deepcopy(own).cuda()
    there.backend = "triton"
    for x in (torch.randn(20, 17, 4), pack_sequence([torch.randn(n, 4) for n in (5, 3, 2)])):
        allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        try:
            assert_close(results(there, x.cuda()), results(own, x))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
