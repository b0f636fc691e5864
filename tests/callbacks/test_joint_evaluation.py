"""Joint evaluation scores every mode as a validation of its own does, and ends where a step does not allow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from lightning_bln._torch import OutOfMemoryError
from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.per_mode import PerMode


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The way each batch was evaluated."""
    log: list[str] = []
    step = Evaluation.step

    def logged(self: Any, *args: Any) -> None:
        step(self, *args)
        log.append("joint" if all(len(run.modes) > 1 for run in self.runs) else "per mode")

    monkeypatch.setattr(Evaluation, "step", logged)
    return log


def test_what_differs_and_stays_a_tensor_is_evaluated_jointly(steps: list[str]) -> None:
    model, callback = zoo.Rich(numbers=False), zoo.chooser()
    zoo.fitted(model, callback, max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert steps == ["joint"] * 6


def test_chunks_are_evaluated_jointly(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lightning_bln.sweep.shared_forward.BYTES", 5 * 20 * 8 * 4
    )  # five modes of a batch of 20, 8 wide
    model, callback = zoo.Rich(numbers=False), zoo.chooser()
    chunks: list[int] = []
    monkeypatch.setattr(callback, "on_fit_end", lambda *_: chunks.append(callback._shared.chunk), raising=False)
    zoo.fitted(model, callback, max_epochs=2)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert chunks == [5]
    assert steps == ["joint"] * 6


def test_out_of_memory_means_smaller_chunks(steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(torch.nn.Module):
        limit = 16

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, PerMode) and x.modes > self.limit:
                raise OutOfMemoryError("out of memory")
            return x

    class Shrinks(zoo.Rich):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            Small.limit = 16 if batch_idx == 0 else 5
            return super().validation_step(batch, batch_idx)

    model, callback = Shrinks(numbers=False), zoo.chooser()
    model.net[2] = Small()
    chunks: list[int] = []
    monkeypatch.setattr(callback, "on_fit_end", lambda *_: chunks.append(callback._shared.chunk), raising=False)
    zoo.fitted(model, callback)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert chunks == [4]
    assert steps == ["joint", "per mode", "joint"]


def test_numbers_need_per_mode_evaluation(steps: list[str]) -> None:
    zoo.fitted(zoo.Rich(), zoo.chooser())
    assert steps == ["per mode"] * 3


def test_loaders_one_after_the_other(steps: list[str]) -> None:
    model, callback = zoo.Rich(numbers=False), zoo.chooser("val_loss/dataloader_idx_1")
    zoo.fitted(model, callback, data=[zoo.val_data(), zoo.val_data(30, 3)])
    zoo.assert_same_table(zoo.oracle(model, [zoo.val_data(), zoo.val_data(30, 3)]), callback)
    assert steps == ["joint"] * 5


def look_at_number(model: Any, loss: Tensor) -> None:
    model.numbers.append(float(loss))


def draw(model: Any, loss: Tensor) -> None:
    model.numbers.append(float(torch.rand(())))


def add_into_a_view(model: Any, loss: Tensor) -> None:
    model.total.add_(1.0)
    model.outputs[0].add_(1)
    model.late[:1].add_(loss)


@pytest.mark.parametrize(
    ("part", "reason", "after"),
    [
        (look_at_number, "what a step keeps differs between modes: a float", "per mode"),
        (draw, None, "joint"),
        (add_into_a_view, "add_ writes what differs between modes into a tensor that all have", "joint"),
    ],
)
def test_modes_part_for_a_batch(steps: list[str], part: Any, reason: str | None, after: str) -> None:
    class Late(zoo.Rich):
        def __init__(self) -> None:
            super().__init__(numbers=False)
            self.numbers: list[float] = []
            self.register_buffer("late", torch.zeros(2))

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = super().validation_step(batch, batch_idx)
            if batch_idx == 1:
                part(self, found["loss"])
            self.log("late", self.late.sum())
            self.log("numbers", torch.tensor(self.numbers).sum())
            return found

        def on_validation_epoch_end(self) -> None:
            self.late.zero_()
            self.numbers = []
            super().on_validation_epoch_end()

    class SameSeed(zoo.pl.Callback):
        def on_validation_batch_start(self, *args: Any) -> None:
            torch.manual_seed(args[3])

    model, callback = Late(), zoo.chooser()
    zoo.fitted(model, SameSeed(), callback)
    zoo.assert_same_table(zoo.oracle(model, None, SameSeed()), callback)
    assert steps == ["joint", "joint" if part is draw else "per mode", after]
    assert callback.result is not None
    assert callback.result.reason == reason


def test_layers_may_be_called_by_themselves(steps: list[str]) -> None:
    class Twice(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().validation_step(batch, batch_idx)
            layers = [layer for layer in self.modules() if isinstance(layer, zoo.BatchLayerNorm)]
            x = torch.randn(4, layers[0].num_features, generator=torch.Generator().manual_seed(batch_idx))
            self.log("inner", layers[0](x).square().mean())
            return loss

    model, callback = Twice(), zoo.chooser()
    zoo.fitted(model, callback)
    assert steps == ["joint"] * 3
    zoo.assert_same_table(zoo.oracle(model), callback)


def test_an_error_of_the_users_comes_through(steps: list[str]) -> None:
    class Broken(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and not self.trainer.sanity_checking:
                raise KeyError("the user's own")
            return super().validation_step(batch, batch_idx)

    with pytest.raises(KeyError, match="the user's own"):
        zoo.fitted(Broken(), zoo.chooser())
    assert steps == ["joint", "joint"]


def test_the_end_of_the_epoch_may_look_at_numbers(steps: list[str]) -> None:
    class Ends(zoo.Rich):
        def on_validation_epoch_end(self) -> None:
            self.log("seen", float(self.total) + float(self.last_loss))
            super().on_validation_epoch_end()

    model, callback = Ends(numbers=False), zoo.chooser("end_total")
    zoo.fitted(model, callback)
    zoo.assert_same_table(zoo.oracle(model), callback)
    assert steps == ["joint"] * 3
