"""Packed sequences in a validation: every mode's values are those of a validation of its own, jointly evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_bln import BLNGRU, BLNLSTM
from lightning_bln.callbacks.copies import Copies
from lightning_bln.callbacks.guard import NotRegroupable, dissect
from lightning_bln.callbacks.user_state import rebuild
from lightning_bln.per_mode import PerMode
from lightning_bln.sweep.pytree import is_identical, trees_match


class Labelled(NamedTuple):
    x: PackedSequence
    y: Tensor


@dataclass
class Batch:
    x: PackedSequence
    y: Tensor


class Classifier(pl.LightningModule):
    """Packed sequences to classes: from the packed data themselves, and from the padded outputs."""

    def __init__(self, rnn: nn.Module | None = None) -> None:
        super().__init__()
        self.rnn = BLNLSTM(4, 5) if rnn is None else rnn
        self.head = nn.Linear(5, 2)
        self.seen: list[PackedSequence] = []

    def sequences(self, batch: Any) -> tuple[PackedSequence, Tensor]:
        if isinstance(batch, Batch):
            return batch.x, batch.y
        x, y = batch.values() if isinstance(batch, dict) else batch
        return x, y

    def run(self, batch: Any) -> tuple[PackedSequence, Tensor]:
        x, y = self.sequences(batch)
        return self.rnn(x)[0], y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out, y = self.run(batch)
        padded, lengths = pad_packed_sequence(out, batch_first=True)
        return F.cross_entropy(self.head(padded.sum(1) / lengths[:, None]), y) + out.data.square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Keeps(Classifier):
    """Keeps packed outputs until the epoch ends."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.append(self.run(batch)[0])

    def on_validation_epoch_end(self) -> None:
        self.log("end_kept", torch.stack([out.data.square().mean() for out in self.seen]).sum())
        self.seen.clear()


class PacksInside(Classifier):
    """Packs in its forward, after a first layer with a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BLNGRU(4, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.first(x)[0], lengths, True, enforce_sorted=False)
        return self.rnn(packed)[1][0][0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        return F.cross_entropy(self.head(self(padded, lengths)), y)


def loader(wrap: Callable[..., Any], size: int = 4, shortest: int = 1, is_sorted: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, 7, (18,), generator=generator).tolist()
    items = [(torch.randn(length, 4, generator=generator), length % 2) for length in lengths]

    def collate(chosen: list[Any]) -> Any:
        if is_sorted:
            chosen = sorted(chosen, key=lambda item: -len(item[0]))
        x = pack_sequence([item[0] for item in chosen], enforce_sorted=is_sorted)
        return wrap(x, torch.tensor([item[1] for item in chosen]))

    return DataLoader(items, size, collate_fn=collate)  # type: ignore[arg-type]


def pair(x: PackedSequence, y: Tensor) -> Any:
    return x, y


CASES = {
    "tuples": (Classifier, loader(pair)),
    "sorted": (Classifier, loader(pair, is_sorted=True)),
    "lists": (Classifier, loader(lambda x, y: [x, y])),
    "dicts": (Classifier, loader(lambda x, y: {"x": x, "y": y})),
    "named tuples": (Classifier, loader(Labelled)),
    "dataclasses": (Classifier, loader(Batch)),
    "one sequence": (Classifier, loader(pair, size=1)),
    "equal lengths": (Classifier, loader(pair, shortest=6)),
    "two layers": (lambda: Classifier(BLNGRU(4, 5, num_layers=2)), loader(pair)),
    "outputs kept": (Keeps, loader(pair)),
    "packed inside": (PacksInside, loader(pair)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_has_the_values_of_a_validation_of_its_own(name: str) -> None:
    make, data = CASES[name]
    torch.manual_seed(0)
    model, callback = make(), zoo.chooser(guard="warn")
    zoo.trainer(callback, max_epochs=1).fit(model, data, data)
    expected = zoo.oracle(model, data)
    zoo.assert_same_table(expected, callback)
    zoo.assert_modes_differ(expected)
    assert callback.result is not None
    assert callback.result.reason is None


def test_copies_of_packed_batches_are_packed_and_their_own() -> None:
    batch = {"x": pack_sequence([torch.randn(2, 4), torch.randn(3, 4)], enforce_sorted=False), "y": torch.ones(2)}
    copies = Copies(batch)
    first = copies.next()
    assert trees_match(first, batch, is_identical)
    first["x"].data.zero_()
    assert trees_match(copies.next(), batch, is_identical)


def test_a_kept_packed_output_has_the_part_of_its_mode() -> None:
    x = pack_sequence([torch.randn(2, 4), torch.randn(3, 4)], enforce_sorted=False)
    joint = x._replace(data=PerMode([x.data, x.data + 1]))
    (found,) = rebuild([joint], {}, 1)
    assert isinstance(found, PackedSequence)
    assert is_identical(found, x._replace(data=x.data + 1))


@pytest.mark.parametrize("sequences", [1, 3])
def test_packed_batches_are_not_taken_apart_for_the_guard(sequences: int) -> None:
    x = pack_sequence([torch.randn(2, 4)] * sequences)
    with pytest.raises(NotRegroupable, match="a batch holds a PackedSequence"):
        dissect({"x": [x]}, None)
