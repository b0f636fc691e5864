"""Networks of every kind: recurrent, convolutional, with several outputs, called several times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exact_modules import Exact, Functional
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_bln import BLNGRU, BLNLSTM, BLNRNN, BatchLayerNorm, ConvBLN1d, ConvBLN2d, ConvBLN3d
from lightning_bln.recurrence.cell_modules import BLNLSTMCell


class Sequences(Exact):
    """The features of a sample as a sequence of numbers; recurrent states go from batch to batch if it carries them."""

    make: Callable[[], nn.Module] = staticmethod(lambda: nn.LSTM(4, 8, batch_first=True))
    carries = packs = False

    def build(self) -> None:
        self.embed = nn.Sequential(nn.Linear(1, 4), BatchLayerNorm(4, scale=False))
        self.rnn = self.make()
        self.state: Any = None

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.state = None  # before the population of the next validation is computed

    def hidden(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        state = self.state if self.carries and not self.training else None
        if state is not None:
            state = tuple(one[:, : len(x)] for one in state) if isinstance(state, tuple) else state[:, : len(x)]
        if self.packs:
            lengths = 1 + torch.arange(len(x)) % 6
            out, last = self.rnn(pack_padded_sequence(h, lengths, True, enforce_sorted=False), state)
            assert isinstance(out, PackedSequence)
            out = pad_packed_sequence(out, batch_first=True)[0]
        else:
            out, last = self.rnn(h, state)
        if self.carries and not self.training:
            self.state = last
        return self.second(out[:, -1, :8]) + out[:, 0, :8]


class Cells(Exact):
    """A loop over a cell, its state kept from batch to batch."""

    def build(self) -> None:
        self.cell = BLNLSTMCell(1, 8)
        self.state: Any = None

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.state = None  # before the population of the next validation is computed

    def hidden(self, x: Tensor) -> Tensor:
        state = None
        if self.state is not None and not self.training:
            state = tuple(one[: len(x)] for one in self.state)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step, None], state, start=step)
        if not self.training:
            self.state = state
        assert state is not None
        return self.second(state[0])


class TorchCells(Exact):
    def build(self) -> None:
        self.cell = nn.GRUCell(8, 8)

    def hidden(self, x: Tensor) -> Tensor:
        h, state = self.first(x), torch.zeros(len(x), 8)
        for _ in range(3):
            state = self.cell(h, state)
        return self.second(state)


class Convolutional(Exact):
    """Convolutions, pools and changes of shape on the way."""

    def build(self) -> None:
        self.stem = ConvBLN1d(1, 4, 3, padding=1)
        self.down = nn.Conv1d(4, 6, 2, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.out = nn.Linear(24, 8)

    def hidden(self, x: Tensor) -> Tensor:
        skip = self.stem(x[:, None])
        h = F.relu(self.norm(self.down(skip)))
        h = self.up(F.interpolate(F.max_pool1d(h, 3, 1, 1), scale_factor=2.0)[..., ::2].contiguous())
        h = torch.cat([h[:, :2], skip[:, 2:]], 1)
        return self.second(self.out(h.permute(0, 2, 1).flatten(1)))


class Images(Exact):
    def build(self) -> None:
        self.stem = ConvBLN2d(1, 4, 3, padding=1)
        self.more = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Dropout2d(0.5), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten()
        )
        self.out = nn.Linear(16, 8)

    def hidden(self, x: Tensor) -> Tensor:
        image = (x[:, None, :, None] * x[:, None, None, :]).contiguous()
        h = self.stem(image)
        h = F.pad(h, (1, 1, 0, 2)).unfold(2, 2, 2).mean(-1).transpose(2, 3).reshape(len(x), 4, 8, -1)
        windows = F.pixel_shuffle(h, 2).repeat(1, 4, 1, 1)
        return self.second(self.out(self.more(windows)))


class Masked(Exact):
    """Volumes of which a part is data; the mask of each mode is its own."""

    shares = False

    def build(self) -> None:
        self.stem = ConvBLN3d(1, 4, 2, padding=1, positions="shared" if self.shares else "separate")
        self.more = ConvBLN1d(4, 4, 3, order="conv-norm-act")

    def hidden(self, x: Tensor) -> Tensor:
        volume = (x[:, None, :, None, None] * x[:, None, None, :2, None]).contiguous()
        mask = volume[:, 0] > -1
        h = self.stem(volume, mask=mask)
        rows = h.flatten(2)[..., :8]
        own = rows.mean(1) > rows.mean()
        h = self.more(rows, mask=own)
        return self.second(torch.cat([h[..., 0], h[..., -1]], 1))


class Embedded(Exact):
    def build(self) -> None:
        self.embed = nn.Embedding(5, 8)

    def hidden(self, x: Tensor) -> Tensor:
        tokens = self.first(x).round().long().clamp(0, 4)  # each mode has tokens of its own
        bag = F.embedding_bag(tokens, self.embed.weight)
        return self.second(self.embed(tokens).amax(1) + bag)


class Outputs(Exact):
    """Gives several outputs, in containers."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        h = self.first(x)
        return {"scores": self.head(self.second(h)), "states": [h, (h.mean(1), None)], "input": x}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])["scores"], batch[1])

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        found = self(x)
        found["states"][1][0].mul_(2)
        found["input"].add_(1)
        return {
            "val_loss": F.cross_entropy(found["scores"], y),
            "state": found["states"][1][0].max(),
            "again": self(x)["scores"].mean(),
        }


def twice(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    a, b = net(x), net(x.roll(1, 0))
    return F.cosine_embedding_loss(a, b, (y == y.roll(1)).float() * 2 - 1) + net(x).mean() + net(a.repeat(1, 2)).mean()


def layers_alone(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    layer = net.second[1]
    return (
        layer(torch.randn(5, 8, generator=torch.Generator().manual_seed(i))).square().mean() + layer(net.first(x)).max()
    )


def conditional_order(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return net.head(net.second(net.first(x if i != 1 else -x))).mean() + (
        net(x).std(correction=0) if i else net(-x).mean()
    )


def written_between(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    first = net(x).mean()
    x += 1
    second = net(x).mean()
    x -= 1
    return first * 2 + second * 3 + net(x).mean()


def recurrent(make: Callable[[], nn.Module], **options: bool) -> Callable[[], Any]:
    return type("Sequences", (Sequences,), {"make": staticmethod(make), **options})


MODULES: dict[str, Callable[[], Any]] = {
    "LSTM": recurrent(lambda: nn.LSTM(4, 8, batch_first=True)),
    "LSTM that goes on": recurrent(lambda: nn.LSTM(4, 8, batch_first=True), carries=True),
    "GRU that goes on": recurrent(lambda: nn.GRU(4, 8, 2, batch_first=True), carries=True),
    "LSTM of both directions": recurrent(lambda: nn.LSTM(4, 4, batch_first=True, bidirectional=True)),
    "LSTM of packed sequences": recurrent(lambda: nn.LSTM(4, 8, batch_first=True), packs=True),
    "GRU of packed sequences that goes on": recurrent(lambda: nn.GRU(4, 8, batch_first=True), packs=True, carries=True),
    "LSTM with a projection": recurrent(lambda: nn.LSTM(4, 16, proj_size=8, batch_first=True), carries=True),
    "BLNLSTM": recurrent(lambda: BLNLSTM(4, 8, batch_first=True)),
    "BLNLSTM that goes on": recurrent(lambda: BLNLSTM(4, 8, batch_first=True), carries=True),
    "BLNGRU of packed sequences": recurrent(lambda: BLNGRU(4, 8, batch_first=True), packs=True),
    "BLNGRU that goes on": recurrent(lambda: BLNGRU(4, 8, batch_first=True, num_layers=2), carries=True),
    "BLNRNN of both directions": recurrent(lambda: BLNRNN(4, 4, batch_first=True, bidirectional=True)),
    "BLNLSTM, reference": recurrent(lambda: BLNLSTM(4, 8, batch_first=True, backend="reference"), carries=True),
    "BLNLSTM without norms": recurrent(lambda: BLNLSTM(4, 8, batch_first=True, norm=None), carries=True),
    "cells": Cells,
    "torch's cells": TorchCells,
    "convolutions": Convolutional,
    "images": Images,
    "masked volumes": Masked,
    "masked volumes, shared positions": type("Masked", (Masked,), {"shares": True}),
    "embeddings": Embedded,
    "several outputs": Outputs,
    **{
        step.__name__.replace("_", " "): (lambda step=step: Functional(step))
        for step in (twice, layers_alone, conditional_order, written_between)
    },
}
