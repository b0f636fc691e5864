"""Networks on packed sequences, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from lightning_bln import BLNGRU, BLNLSTM, BatchLayerNorm

LENGTHS = ((4, 2, 5, 1), (6,), (1, 3, 2, 2, 3), (3, 3, 3))


class Net(nn.Module):
    """Layers, and a function of them and the batch as forward."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *batch: Any) -> Any:
        return self.run(self, *batch)


class Labelled(NamedTuple):
    x: PackedSequence
    y: Tensor


def packed(lengths: tuple[int, ...], is_sorted: bool = False) -> PackedSequence:
    if is_sorted:
        lengths = tuple(sorted(lengths, reverse=True))
    return pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=is_sorted)


def packed_only(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return (packed(lengths),)


def packed_sorted(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return (packed(lengths, is_sorted=True),)


def padded(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return pad_sequence([torch.randn(length, 4) for length in lengths], batch_first=True), torch.tensor(lengths)


def with_list(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return padded(lengths)[0], list(lengths)


def with_mask(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    x, found = padded(lengths)
    return x, torch.arange(x.shape[1]) < found[:, None]


def with_order(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return *padded(lengths), torch.randperm(len(lengths))


def with_state(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return packed(lengths), torch.randn(1, len(lengths), 3)


def in_dict(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return ({"x": packed(lengths), "y": torch.tensor(lengths)},)


def in_named_tuple(lengths: tuple[int, ...]) -> tuple[Any, ...]:
    return (Labelled(packed(lengths), torch.tensor(lengths)),)


def pack(x: Tensor, lengths: Any, enforce_sorted: bool = False) -> PackedSequence:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)


def sorted_inside(net: Any, x: Tensor, lengths: Tensor) -> Any:
    lengths, order = lengths.sort(descending=True, stable=True)
    return pad_packed_sequence(net.rnn(pack(net.first(x)[order], lengths, enforce_sorted=True))[0])


def dropped_order(net: Any, x: PackedSequence) -> Any:
    out, _ = net.rnn(x)
    return net.second(PackedSequence(out.data, out.batch_sizes))


def embedded(net: Any, x: PackedSequence) -> Any:
    return net.rnn(PackedSequence(net.embed(x.data), *x[1:]))


def replaced(net: Any, x: PackedSequence) -> Any:
    x = x._replace(data=net.embed(x.data))
    out, _ = net.rnn(x)
    return net.second(out._replace(data=out.data.tanh()))


def cut(net: Any, x: Tensor, lengths: Tensor) -> Any:
    pieces = [one[:length] for one, length in zip(net.first(x), lengths, strict=True)]
    return pad_packed_sequence(net.rnn(pack_sequence(pieces, enforce_sorted=False))[0])


def norm() -> BatchLayerNorm:
    return BatchLayerNorm(4, scale=False)


def lstm(**options: Any) -> BLNLSTM:
    return BLNLSTM(4, 3, **options)


NETWORKS: dict[str, tuple[Callable[[], Net], Callable[[tuple[int, ...]], tuple[Any, ...]]]] = {
    "a layer": (lambda: Net(lambda net, x: net.rnn(x), rnn=lstm()), packed_only),
    "sorted": (lambda: Net(lambda net, x: net.rnn(x), rnn=lstm()), packed_sorted),
    "two layers, two directions": (
        lambda: Net(lambda net, x: net.rnn(x), rnn=BLNGRU(4, 3, num_layers=2, bidirectional=True)),
        packed_only,
    ),
    "reference": (lambda: Net(lambda net, x: net.rnn(x), rnn=lstm(backend="reference")), packed_only),
    "one after another": (
        lambda: Net(lambda net, x: net.second(net.rnn(x)[0]), rnn=lstm(), second=BLNGRU(3, 2)),
        packed_only,
    ),
    "decoder": (
        lambda: Net(lambda net, x: net.second(x, net.rnn(x)[1]), rnn=lstm(), second=lstm()),
        packed_only,
    ),
    "given states": (lambda: Net(lambda net, x, h: net.rnn(x, (h, -h)), rnn=lstm()), with_state),
    "embedding": (lambda: Net(embedded, embed=nn.Linear(4, 4), rnn=lstm()), packed_only),
    "replaced data": (
        lambda: Net(replaced, embed=nn.Linear(4, 4), rnn=lstm(), second=BLNGRU(3, 2)),
        packed_sorted,
    ),
    "padded after": (
        lambda: Net(lambda net, x: pad_packed_sequence(net.second(net.rnn(x)[0])[0]), rnn=lstm(), second=BLNGRU(3, 2)),
        packed_only,
    ),
    "in a dict": (
        lambda: Net(lambda net, batch: {"out": net.rnn(batch["x"])[0], "y": batch["y"]}, rnn=lstm()),
        in_dict,
    ),
    "in a named tuple": (
        lambda: Net(lambda net, batch: batch._replace(x=net.rnn(batch.x)[0]), rnn=lstm()),
        in_named_tuple,
    ),
    "packed after a norm": (
        lambda: Net(lambda net, x, n: net.rnn(pack(net.first(x), n))[1], first=norm(), rnn=lstm()),
        padded,
    ),
    "returned as packed after a norm": (
        lambda: Net(lambda net, x, n: net.rnn(pack(net.first(x), n)), first=norm(), rnn=lstm()),
        padded,
    ),
    "packed after a layer": (
        lambda: Net(
            lambda net, x, n: pad_packed_sequence(net.rnn(pack(net.first(x)[0], n))[0]),
            first=BLNGRU(4, 4, batch_first=True),
            rnn=lstm(),
        ),
        padded,
    ),
    "pack_sequence after a norm": (lambda: Net(cut, first=norm(), rnn=lstm()), padded),
    "lengths from a mask": (
        lambda: Net(lambda net, x, mask: net.rnn(pack(net.first(x), mask.sum(1)))[1], first=norm(), rnn=lstm()),
        with_mask,
    ),
    "lengths in a list": (
        lambda: Net(lambda net, x, n: net.rnn(pack(net.first(x), n)), first=norm(), rnn=lstm()),
        with_list,
    ),
    "sorted inside": (lambda: Net(sorted_inside, first=norm(), rnn=lstm()), padded),
    "shuffled by an index": (
        lambda: Net(lambda net, x, n, order: net.rnn(pack(net.first(x)[order], n[order])), first=norm(), rnn=lstm()),
        with_order,
    ),
    "a norm of the data": (
        lambda: Net(lambda net, x: net.rnn(x._replace(data=net.first(x.data))), first=norm(), rnn=lstm()),
        packed_only,
    ),
    "a norm of the output's data": (
        lambda: Net(lambda net, x: net.first(net.rnn(x)[0].data), rnn=BLNLSTM(4, 4), first=norm()),
        packed_only,
    ),
    "a dropped order": (lambda: Net(dropped_order, rnn=lstm(), second=BLNGRU(3, 2)), packed_only),
    "the last outputs by batch_sizes": (
        lambda: Net(
            lambda net, x: net.second(net.rnn(x)[0])[0].data[: x.batch_sizes[0]], rnn=lstm(), second=BLNGRU(3, 2)
        ),
        packed_only,
    ),
    "states in sorted order": (
        lambda: Net(lambda net, x: net.second(net.rnn(x)[0])[1][0, x.sorted_indices], rnn=lstm(), second=BLNGRU(3, 2)),
        packed_only,
    ),
}
"""For each network how to make it, and its batch for sequences of some lengths."""
