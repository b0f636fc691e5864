"""Streams against whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_bln import BLNGRU, BLNLSTM, Recurrent, fold, recompute_population, set_mode
from lightning_bln.cells import RecurrentCell
from lightning_bln.recurrence import Stream

LAYERS: dict[str, Any] = {
    "lstm": lambda: BLNLSTM(3, 5),
    "deep": lambda: BLNLSTM(3, 5, 2, proj_size=2, time_statistics="shared"),
    "gru": lambda: BLNGRU(3, 5, batch_first=True),
    "slstm": lambda: Recurrent("slstm", 3, 5),
    "none": lambda: Recurrent("mgu", 3, 5, norm=None),
}
PARTS = ([1] * 9, [4, 5], [1, 3, 1, 4], [9])


def built(name: str, mode: str = "pppp") -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    if layer.norm:
        recompute_population(layer, [torch.randn(9, 9, 3, dtype=torch.float64) for _ in range(2)])
        set_mode(layer, mode)
    return layer.eval()


@pytest.mark.parametrize("mode", ["pppp", "ppcc"])
@pytest.mark.parametrize("name", LAYERS)
def test_parts_give_what_the_whole_gives(name: str, mode: str) -> None:
    layer, x = built(name, mode), torch.randn(9, 9, 3, dtype=torch.float64)
    axis = int(layer.batch_first)
    expected, last = layer(x)
    for parts in PARTS:
        for is_single in (False, True):
            stream, found = layer.stream(), []
            for part in x.split(parts, axis):
                if is_single and part.shape[axis] == 1:
                    found.append(stream.step(part.squeeze(axis)).unsqueeze(axis))
                else:
                    found.append(stream(part))
            torch.testing.assert_close(torch.cat(found, axis), expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(stream.state, last, rtol=1e-10, atol=1e-12)
            assert stream.start == 9
            assert not any(one.requires_grad for one in found)


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_sequence(name: str) -> None:
    layer, x = built(name), torch.randn(9, 3, dtype=torch.float64)
    stream = layer.stream()
    found = [*stream(x[:4]), stream.step(x[4]), *stream(x[5:])]
    torch.testing.assert_close(torch.stack(found), layer(x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("time_statistics", ["separate", "shared"])
def test_cells(time_statistics: str) -> None:
    layer = BLNLSTM(3, 5, time_statistics=time_statistics).double()
    x = torch.randn(9, 4, 3, dtype=torch.float64)
    recompute_population(layer, [x, x + 1])
    cell = RecurrentCell("lstm", 3, 5, time_statistics=time_statistics).double()
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    stream = cell.eval().stream()
    found = torch.stack([stream.step(part) if t % 2 else stream(part) for t, part in enumerate(x)])
    torch.testing.assert_close(found, layer.eval()(x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_of_torch_and_folded_ones(kind: type) -> None:
    x = torch.randn(9, 4, 3)
    plain = kind(3, 5, batch_first=True).eval()
    stream = Stream(plain)
    found = torch.stack([stream.step(part) for part in x], 1)
    torch.testing.assert_close(found, plain(x.transpose(0, 1))[0])
    cell = Stream(nn.GRUCell(3, 5).eval())
    assert cell.step(x[0]).shape == (4, 5)
    frozen = fold(built("lstm"))
    stream, x = frozen.stream(), x.double()
    torch.testing.assert_close(torch.stack([stream.step(part) for part in x]), frozen(x)[0], rtol=1e-10, atol=1e-12)


def test_states_are_put_away_and_come_back() -> None:
    layer, x = built("lstm"), torch.randn(9, 2, 3, dtype=torch.float64)
    stream, whole = layer.stream(), layer(x)[0]
    kept: list[Any] = [(None, 0), (None, 0)]
    for t in range(9):
        for client in range(2):
            stream.state, stream.start = kept[client]
            found = stream.step(x[t, [client]])
            torch.testing.assert_close(found[0], whole[t, client], rtol=1e-10, atol=1e-12)
            kept[client] = stream.state, stream.start
    stream.reset()
    torch.testing.assert_close(stream(x), whole, rtol=1e-10, atol=1e-12)
    stream.reset(*kept[0])
    assert stream.start == 9


def test_an_error_leaves_the_stream_as_it_was() -> None:
    layer, x = built("lstm"), torch.randn(9, 2, 3, dtype=torch.float64)
    stream = layer.stream()
    stream(x[:3])
    state = stream.state
    for wrong in (x[:, :1], x[..., :2], x.float(), pack_sequence([x[:, 0]]), None):
        with pytest.raises((ValueError, TypeError)):
            stream(wrong)
    layer.train()
    with pytest.raises(RuntimeError, match=r"call eval\(\)"):
        stream(x)
    layer.eval()
    assert stream.state is state
    assert stream.start == 3
    assert repr(stream) == "Stream(Recurrent, start=3)".replace("Recurrent", type(layer).__name__)


@pytest.mark.parametrize("make", [lambda: RecurrentCell("gru", 3, 5, norm=None), lambda: BLNLSTM(3, 5, norm=None)])
def test_an_output_may_be_written_into(make: Any) -> None:
    layer, x = make().double().eval(), torch.randn(4, 2, 3, dtype=torch.float64)
    one, two = layer.stream(), layer.stream()
    for step in x:
        expected = two.step(step).clone()
        found = one.step(step)
        torch.testing.assert_close(found, expected)
        found.zero_()


def test_another_number_of_sequences_is_named() -> None:
    for layer in (BLNLSTM(3, 5, norm=None), BLNGRU(3, 5, norm=None, batch_first=True), nn.GRU(3, 5), nn.LSTMCell(3, 5)):
        stream = Stream(layer.eval())
        stream.step(torch.randn(2, 3))
        for wrong, name in ((torch.randn(4, 3), "4 sequences"), (torch.randn(3), "a single sequence")):
            with pytest.raises(ValueError, match=f"the state of 2 sequences, but x has {name}"):
                stream.step(wrong)
        with pytest.raises(ValueError, match="one step is"):
            stream.step(torch.randn(1, 2, 3))
        stream.step(torch.randn(2, 3))


def test_what_cannot_be_streamed() -> None:
    frozen = torch.jit.script(fold(built("lstm")))
    for wrong in (nn.Linear(3, 3), nn.Sequential(BLNLSTM(3, 5)), frozen):
        with pytest.raises(TypeError, match="a recurrent layer or single-step cell is needed"):
            Stream(wrong)
    for x in (None, [1.0], "x"):
        with pytest.raises(TypeError, match="a tensor is needed"):
            BLNLSTM(3, 5, norm=None).eval().stream().step(x)
    with pytest.raises(ValueError, match="bidirectional"):
        BLNLSTM(3, 5, bidirectional=True).stream()
    with pytest.raises(ValueError, match="start=-1"):
        BLNLSTM(3, 5).stream(start=-1)
    with pytest.raises(TypeError, match="start"):
        BLNLSTM(3, 5).stream(start=1.5)
