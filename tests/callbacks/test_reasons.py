"""Where modes are evaluated one after the other, the result and the log say why, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics as tm
import zoo
from torch import Tensor


def reason(model: Any, callback: Any = None, **options: Any) -> str | None:
    callback = zoo.chooser() if callback is None else callback
    zoo.fitted(model, callback, **options)
    assert callback.result is not None
    return callback.result.reason


class Steps(zoo.Simple):
    """Does something with the loss in each step."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loss = super().validation_step(batch, batch_idx)
        self.use(loss)
        return loss

    def use(self, loss: Tensor) -> None: ...


class Draws(Steps):
    def use(self, loss: Tensor) -> None:
        self.log("noisy", torch.nn.functional.dropout(loss, 0.5, True) + torch.rand(()))


class Numbers(Steps):
    def use(self, loss: Tensor) -> None:
        self.log("number", loss.item())


class Raises(Steps):
    def use(self, loss: Tensor) -> None:
        if type(loss) is not Tensor:
            raise ValueError("only plain tensors.\nNo others.")


class DrawsInside(zoo.Simple):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_module("noise", Noise())


class Noise(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Hooked(zoo.Simple):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (zoo.Simple, None),
        (Draws, None),
        (Numbers, "item gives"),
        (Raises, "ValueError: only plain tensors"),
        (DrawsInside, None),
        (Hooked, None),
    ],
)
def test_what_a_module_does(model: Any, expected: str | None) -> None:
    found = reason(model())
    assert found is None if expected is None else expected in (found or "")


def test_forwards_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = zoo.chooser()
    monkeypatch.setattr(callback, "shares_forwards", False, raising=False)
    assert reason(zoo.Simple(), callback) == "shares_forwards is False"


def test_weights_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.callbacks.evaluation.is_sharded", lambda model: True)
    assert reason(zoo.Simple()) == "weights are sharded"


def test_several_ranks_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.pl.Trainer, "world_size", 2)
    assert reason(zoo.Simple()) is None


def test_one_mode_beside_the_incumbent_needs_no_reason() -> None:
    assert reason(zoo.Simple(), zoo.chooser(candidates=["ppcc", "cccc"])) is None


class Sum(tm.Metric):
    """A sum that is computed as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total = self.total + value

    def compute(self) -> Tensor:
        return torch.tensor(float(self.total))


def test_a_dataloader_ends_with_numbers() -> None:
    class Sums(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.sum = Sum()

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            loss = super().validation_step(batch, batch_idx)
            self.sum.update(loss)
            self.log("sum", self.sum, on_step=False, on_epoch=True)
            return loss

    model, callback = Sums(), zoo.chooser("val_loss/dataloader_idx_1")
    data = [zoo.val_data(), zoo.val_data(30, 3)]
    assert "__float__ gives" in (reason(model, callback, data=data) or "")
    zoo.assert_same_table(zoo.oracle(model, data), callback)


def test_the_end_of_the_epoch_needs_numbers() -> None:
    class Ends(zoo.Rich):
        def on_validation_epoch_end(self) -> None:
            self.log("seen", float(self.total))
            super().on_validation_epoch_end()

    assert "__float__ gives" in (reason(Ends(numbers=False), zoo.chooser("end_total")) or "")


def test_the_log_says_it_once_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_bln.callbacks.messages.rank_zero_info", said.append)
    callback = zoo.chooser(verbose=True)
    for _ in range(2):
        reason(Numbers(), callback, max_epochs=2)
    told = next(line for line in said if "item gives" in line)
    assert sum("one after the other: item gives" in line for line in said) == 2
    assert "item gives" in str(callback.result)
    assert told.startswith("BLNStatsCallback evaluates modes one after the other: ")
    said.clear()
    reason(zoo.Simple(), zoo.chooser(verbose=True))
    assert not any("one after the other" in line for line in said)
