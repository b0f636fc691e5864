"""Large attributes are shared by all modes until a step writes into one, and results are exact all the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo

from lightning_bln.callbacks.backup import Backup
from lightning_bln.callbacks.large_state import Contents, is_large
from lightning_bln.callbacks.user_state import UserState

pytestmark = pytest.mark.exact

SIZE = 2**21
ENTRIES = 20_000


def tensor() -> Any:
    return torch.zeros(SIZE)


MAKE: dict[str, Callable[[], Any]] = {
    "tensor": tensor,
    "array": lambda: np.zeros(SIZE),
    "list": lambda: [0.0] * ENTRIES,
    "deque": lambda: deque([0.0] * ENTRIES),
    "dict": lambda: dict.fromkeys(range(ENTRIES), 0.0),
}


class Keeps(zoo.Simple):
    """Holds a large value in one of several places, and writes into it or does not."""

    def __init__(self, kind: str, place: str, writes: bool, numbers: bool = True) -> None:
        super().__init__()
        self.kind, self.place, self.writes = kind, place, writes
        self.number: Callable[[Any], Any] = float if numbers else torch.Tensor.detach
        value = MAKE[kind]()
        if place == "buffer":
            self.register_buffer("table", value)
        elif place == "child":
            self.net.table = value
        elif place == "list":
            self.tables = [value, 1]
        else:
            self.table = value

    @property
    def held(self) -> Any:
        if self.place == "list":
            return self.tables[0]
        return self.net.table if self.place == "child" else self.table

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.writes:
            held = self.held
            view = held[1:] if self.kind == "tensor" else held
            view[batch_idx] = self.number(loss)
            held[5] += float(batch_idx)
        self.log("val_loss", loss + sum(float(self.held[place]) for place in range(6)))

    def on_validation_epoch_end(self) -> None:
        self.log("end_held", sum(float(self.held[place]) for place in range(6)))
        if self.writes:
            for place in range(6):
                self.held[place] = 0.0


PLACES = [*((kind, "attribute") for kind in MAKE), ("tensor", "buffer"), ("tensor", "child"), ("tensor", "list")]


@pytest.mark.parametrize(
    ("kind", "place", "writes"), [*((*one, True) for one in PLACES), ("tensor", "attribute", False)]
)
def test_the_table_is_that_of_separate_validations(kind: str, place: str, writes: bool) -> None:
    model = Keeps(kind, place, writes)
    callback = zoo.chooser()
    zoo.fitted(model, callback, max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model), callback)
    held = model.held
    assert is_large(held)
    assert all(float(held[index]) == 0.0 for index in range(6))


@pytest.mark.parametrize("kind", MAKE)
def test_modes_share_what_no_step_writes_into(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()

    class Looks(Keeps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            seen.add(id(self.held))
            return super().validation_step(batch, batch_idx)

    model = Looks(kind, "attribute", False)
    own = id(model.held)
    zoo.fitted(model, zoo.chooser(), max_epochs=2)
    assert seen == {own}


@pytest.mark.parametrize("kind", ["array", "list", "dict"])
def test_what_a_mode_changed_alone_stays_its_own(kind: str) -> None:
    """Modes that write at different batches, told apart by their losses."""

    class Some(Keeps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            if float(loss) > 1.1:
                self.held[batch_idx] = float(loss)
            self.log("val_loss", loss + sum(float(self.held[place]) for place in range(6)))

        def on_validation_epoch_end(self) -> None:
            for place in range(6):
                self.held[place] = 0.0

    model, callback = Some(kind, "attribute", False), zoo.chooser()
    zoo.fitted(model, callback)
    zoo.assert_same_table(zoo.oracle(model), callback)


def test_an_array_written_into_from_the_second_batch_on_is_an_error_that_says_so() -> None:
    class Later(Keeps):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx and not self.trainer.sanity_checking:
                self.held[3] = 1.0
            return super().validation_step(batch, batch_idx)

    model = Later("array", "attribute", False)
    with pytest.raises(RuntimeError, match="assign a new array in its place"):
        zoo.fitted(model, zoo.chooser())
    assert model.held.flags.writeable
    zoo.fitted(Later("array", "attribute", True), zoo.chooser())


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda t: t.__setitem__(3, 1.0),
    "slice": lambda t: t[2:9].fill_(1),
    "in place": lambda t: t.add_(1),
    "operator": lambda t: t.__iadd__(1),
    "out": lambda t: torch.add(t, 1, out=t),
    "out of several": lambda t: torch.max(torch.ones(2, 3), 1, out=(t[:2], torch.zeros(2, dtype=torch.long))),
    "data": lambda t: t.data.mul_(0).add_(2),
    "detached view": lambda t: t.detach().view(2, -1)[1].index_fill_(0, torch.tensor([1]), 4.0),
    "numpy": lambda t: t.numpy().__setitem__(4, 1.0),
    "inplace argument": lambda t: F.relu(t.sub_(1), inplace=True),
    "foreach": lambda t: torch._foreach_add_([t], 1.0),
    "init": lambda t: torch.nn.init.constant_(t, 3.0),
    "operator of a library": lambda t: torch.ops.aten.add_.Tensor(t, torch.ones(())),
    "other memory": lambda t: setattr(t, "data", torch.ones(3)),
    "embedding": lambda t: F.embedding(torch.tensor([0]), t.fill_(7.0).view(2, -1), max_norm=1.0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", WRITES)
def test_every_way_to_write_is_seen_beforehand(kind: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        table = torch.arange(64.0)
        expected, kept = table.clone(), table
        with Backup({"table": table}, large=0) as backup:
            assert not backup.copies
            WRITES[kind](table)
        assert backup.restore() == ["table"]
    assert table is kept
    assert torch.equal(table, expected)


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda t: t.sum(),
    "item": lambda t: t[3].item(),
    "index": lambda t: t[torch.tensor([1, 2])],
    "linear": lambda t: F.linear(t.view(8, 8), t.view(8, 8)),
    "relu": lambda t: F.relu(t),
    "embedding": lambda t: F.embedding(torch.tensor([1]), t.view(8, 8)),
    "copy of a view": lambda t: torch.zeros(3).copy_(t[:3]),
    "number": lambda t: float(t.mean()),
    "moved": lambda t: t.to(torch.float64),
}


@pytest.mark.parametrize("kind", READS)
def test_reading_copies_nothing(kind: str) -> None:
    table = torch.arange(64.0)
    with Backup({"table": table}, large=0) as backup:
        READS[kind](table)
    assert not backup.copies
    assert backup.restore() == []


def test_a_write_that_was_not_seen_is_an_error() -> None:
    table = torch.arange(64.0)
    backup = Backup({"table": table}, large=0)
    with backup:
        pass
    table.add_(1)
    with pytest.raises(RuntimeError, match="a step changed table"):
        backup.restore()


@pytest.mark.parametrize("kind", ["array", "list", "deque", "dict"])
def test_contents_are_put_back_in_place(kind: str) -> None:
    value = MAKE[kind]()
    same = deepcopy(value)
    contents = Contents(value)
    assert not contents.has_changed()
    value[7] = 1.5
    assert contents.has_changed()
    contents.put_back()
    assert not contents.has_changed()
    assert (value == same) if kind != "array" else np.array_equal(value, same)


def test_one_mode_that_changes_a_tensor_alone_is_an_error() -> None:
    class Module(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.table = tensor()

    module = Module()
    user = UserState(module)
    state = UserState.copy(user.take())
    module.table[0] = 1.0  # as by a callback, for the incumbent alone
    run = type("Run", (), {"state": state})()
    with pytest.raises(RuntimeError, match="changed in one statistics mode"), user.holding(run):
        pass
