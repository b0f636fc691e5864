"""Modes that go through a validation step together score what they score one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from lightning_bln._torch import OutOfMemoryError
from lightning_bln.callbacks.evaluation import Evaluation


@pytest.fixture
def parted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How batches were gone through."""
    log: list[str] = []
    together, turns = Evaluation.step_together, Evaluation.step_in_turns

    def step_together(self: Any, *args: Any) -> bool:
        went = together(self, *args)
        log.append("together" if went else "parted")
        return went

    def step_in_turns(self: Any, *args: Any) -> None:
        turns(self, *args)
        log.append("turns")

    monkeypatch.setattr(Evaluation, "step_together", step_together)
    monkeypatch.setattr(Evaluation, "step_in_turns", step_in_turns)
    return log


def test_all_that_is_no_number_goes_together(parted: list[str]) -> None:
    model, callback = zoo.Rich(numbers=False), zoo.chooser()
    zoo.fitted(model, callback, max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert parted == ["turns", "together", "together", "together", "together", "together"]


def test_chunks_go_together_from_the_first_batch_on(parted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_bln.sweep.shared_module.BYTES", 5 * 20 * 8 * 4
    )  # five modes of a batch of 20, 8 wide
    model, callback = zoo.Rich(numbers=False), zoo.chooser()
    chunks: list[int] = []
    monkeypatch.setattr(callback, "on_fit_end", lambda *_: chunks.append(callback._shared.chunk), raising=False)
    zoo.fitted(model, callback, max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert chunks == [5]
    assert parted == ["turns", "together", "together", "together", "together", "together"]


def test_out_of_memory_means_smaller_chunks(parted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(torch.nn.Module):
        limit = 16 * 20

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.limit:
                raise OutOfMemoryError("out of memory")
            return x

    class Shrinks(zoo.Rich):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            Small.limit = 16 * 20 if batch_idx == 0 else 5 * 20
            return super().validation_step(batch, batch_idx)

    model, callback = Shrinks(numbers=False), zoo.chooser()
    model.net[2] = Small()
    chunks: list[int] = []
    monkeypatch.setattr(callback, "on_fit_end", lambda *_: chunks.append(callback._shared.chunk), raising=False)
    zoo.fitted(model, callback)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert chunks == [4]
    assert parted == ["turns", "together", "together"]


def test_numbers_take_turns(parted: list[str]) -> None:
    zoo.fitted(zoo.Rich(), zoo.chooser())
    assert parted == ["turns"] * 3


def test_loaders_one_after_the_other(parted: list[str]) -> None:
    model, callback = zoo.Rich(numbers=False), zoo.chooser("val_loss/dataloader_idx_1")
    zoo.fitted(model, callback, data=[zoo.val_data(), zoo.val_data(30, 3)])
    zoo.assert_same_table(zoo.oracle(model, [zoo.val_data(), zoo.val_data(30, 3)]), callback)
    assert parted == ["turns", "together", "together", "together", "together"]


def look_at_number(model: Any, loss: Tensor) -> None:
    model.numbers.append(float(loss))


def draw(model: Any, loss: Tensor) -> None:
    model.numbers.append(float(torch.rand(())))


def add_into_buffer(model: Any, loss: Tensor) -> None:
    model.total.add_(1.0)
    model.outputs[0].add_(1)
    model.late.add_(loss)


@pytest.mark.parametrize("part", [look_at_number, draw, add_into_buffer])
def test_modes_part_with_what_they_have(parted: list[str], part: Any) -> None:
    class Late(zoo.Rich):
        def __init__(self) -> None:
            super().__init__(numbers=False)
            self.numbers: list[float] = []
            self.register_buffer("late", torch.zeros(()))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = super().validation_step(batch, batch_idx)
            if batch_idx == 1:
                part(self, found["loss"])
            return found

        def on_validation_epoch_end(self) -> None:
            self.log("late", self.late.clone())
            self.log("numbers", torch.tensor(self.numbers).sum())
            self.late.zero_()
            self.numbers = []
            super().on_validation_epoch_end()

    class SameSeed(zoo.pl.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            torch.manual_seed(args[3])

    model, callback = Late(), zoo.chooser()
    zoo.fitted(model, SameSeed(), callback)
    zoo.assert_same_table(zoo.oracle(model, None, SameSeed()), callback)
    assert parted == ["turns", "parted", "turns", "turns"]


def test_a_layer_called_past_the_shared_forward_takes_turns(parted: list[str]) -> None:
    class Twice(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().validation_step(batch, batch_idx)
            if batch_idx == 1:
                layers = [layer for layer in self.modules() if isinstance(layer, zoo.BatchLayerNorm)]
                self.log("inner", layers[0](torch.randn(4, layers[0].num_features)).square().mean())
            return loss

    torch.manual_seed(0)
    callback = zoo.chooser()
    zoo.fitted(Twice(), callback)
    assert parted == ["turns", "parted", "turns", "turns"]
    assert callback.result is not None
    assert len({round(values["inner"], 6) for values in callback.result.scores.values()}) > 4


def test_an_error_of_the_users_comes_through(parted: list[str]) -> None:
    class Broken(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and not self.trainer.sanity_checking:
                raise KeyError("the user's own")
            return super().validation_step(batch, batch_idx)

    with pytest.raises(KeyError, match="the user's own"):
        zoo.fitted(Broken(), zoo.chooser())
    assert parted == ["turns", "together", "parted"]


def test_the_end_of_the_epoch_may_look_at_numbers(parted: list[str]) -> None:
    class Ends(zoo.Rich):
        def on_validation_epoch_end(self) -> None:
            self.log("seen", float(self.total) + float(self.last_loss))
            super().on_validation_epoch_end()

    model, callback = Ends(numbers=False), zoo.chooser()
    zoo.fitted(model, callback)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert parted == ["turns", "together", "together"]
