"""A validation that does not come to its end chooses nothing, and a resumed run chooses as the straight one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bln.modes import mode_layers


class Cut(pl.Callback):
    """Raises at a place within the validation after step ``step``."""

    def __init__(self, where: str, error: BaseException, step: int = 8) -> None:
        self.where, self.error, self.step = where, error, step

    def at(self, where: str, trainer: Any) -> None:
        if where == self.where and trainer.global_step == self.step and not trainer.sanity_checking:
            raise self.error

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.at(f"batch {batch_idx}", trainer)

    def on_validation_batch_start(
        self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.at(f"start of batch {batch_idx}", trainer)


class Model(zoo.Simple):
    """Raises in its own hook after the callback's, or in a step."""

    cut: Cut | None = None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.cut is not None:
            self.cut.at(f"step {batch_idx}", self.trainer)
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        if self.cut is not None:
            self.cut.at("epoch end", self.trainer)


class Interrupted(Exception):
    """An error of the test's own."""


CUTS = [
    ("start of batch 0", Interrupted()),
    ("step 0", Interrupted()),
    ("step 1", KeyboardInterrupt()),
    ("batch 1", SystemExit(1)),
    ("batch 2", Interrupted()),
    ("epoch end", Interrupted()),
]


def start() -> tuple[Model, Any]:
    torch.manual_seed(6)
    return Model(lr=0.3), zoo.chooser(candidates=["ccpc", "ppcp", "ppcc"])


def fit(model: Model, *callbacks: Any, checkpoint: str | None = None, **options: Any) -> None:
    trainer = zoo.trainer(*callbacks, max_epochs=3, **options)
    trainer.fit(model, zoo.train_data(shuffle=False), zoo.val_data(samples=60), ckpt_path=checkpoint)


@pytest.mark.parametrize(("place", "error"), CUTS, ids=lambda one: str(one) or type(one).__name__)
def test_a_cut_validation_chooses_nothing_and_a_resumed_run_is_the_straight_one(
    tmp_path: Path, place: str, error: BaseException
) -> None:
    if zoo.IS_OLDEST and isinstance(error, KeyboardInterrupt):
        pytest.skip("lightning 2.3 ends fit without raising")
    straight, chose = start()
    fit(straight, chose)
    assert len(chose.history) == 3

    model, callback = start()
    model.cut = Cut(place, error)

    class Saves(pl.Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "cut.ckpt")

    with pytest.raises(BaseException):  # noqa: B017, PT011 as raised by whichever version of the Trainer
        fit(model, callback, Saves(), model.cut)
    assert callback.history == chose.history[:1]
    assert callback.result is not None
    assert str(callback.result.chosen) == chose.history[0][2]
    assert {str(layer.mode) for layer in mode_layers(model)} == {chose.history[0][2]}

    resumed, after = start()
    fit(resumed, after, checkpoint=str(tmp_path / "cut.ckpt"))
    assert after.history == chose.history
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.skipif(zoo.IS_OLDEST, reason="lightning 2.3 saves none on exceptions")
def test_a_checkpoint_saved_on_exception_resumes_to_the_straight_run(tmp_path: Path) -> None:
    straight, chose = start()
    fit(straight, chose)
    model, callback = start()
    model.cut = Cut("step 1", Interrupted())
    saver = ModelCheckpoint(tmp_path, save_top_k=0, save_on_exception=True)
    with pytest.raises(Interrupted):
        fit(model, callback, saver, enable_checkpointing=True)
    (saved,) = tmp_path.glob("*.ckpt")
    resumed, after = start()
    fit(resumed, after, checkpoint=str(saved))
    assert after.history == chose.history


def test_an_error_in_a_training_step_keeps_what_was_chosen() -> None:
    class Fails(zoo.Simple):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 6 and not self.trainer.validating:
                raise Interrupted
            return super().training_step(batch, batch_idx)

    model, callback = Fails(), zoo.chooser()
    with pytest.raises(Interrupted):
        zoo.fitted(model, callback, max_epochs=3)
    assert len(callback.history) == 1
    assert {str(layer.mode) for layer in mode_layers(model)} == {callback.history[0][2]}
