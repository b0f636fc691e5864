"""Checkpoints, resuming, tuners and averaged weights keep mode and population right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, WeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging

from lightning_bln import recompute_population
from lightning_bln.modes import mode_layers
from lightning_bln.recomputation import populations


def steady_data() -> Any:
    return zoo.train_data(shuffle=False)


class Resumable:
    """Training data that can be taken up again in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches = list(steady_data())
        self.place = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def fit(model: Any, callback: Any, *others: Any, checkpoint: Any = None, data: Any = None, **options: Any) -> Any:
    trainer = zoo.trainer(callback, *others, **options)
    trainer.fit(model, steady_data() if data is None else data, zoo.val_data(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("population", ["recompute", "epoch"])
@pytest.mark.parametrize("where", ["end of an epoch", "middle of an epoch"])
def test_a_resumed_run_equals_the_straight_one(tmp_path: Path, population: str, where: str) -> None:
    def start() -> tuple[Any, Any]:
        torch.manual_seed(4)
        stats = steady_data() if where == "middle of an epoch" else None
        return zoo.Rich(), zoo.chooser(population=population, stats_dataloader=stats)

    def data() -> Any:
        return Resumable() if where == "middle of an epoch" else steady_data()

    options: dict[str, Any] = {"val_check_interval": 2, "max_epochs": 3}
    straight, chose = start()
    fit(straight, chose, data=data(), **options)
    first, before = start()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    fit(first, before, saver, data=data(), enable_checkpointing=True, **options)
    step = 4 if where == "end of an epoch" else 7
    second, after = start()
    saved = str(tmp_path / f"step={step}.ckpt")
    fit(second, after, checkpoint=saved, data=data(), **options)

    assert torch.load(saved, weights_only=True)["state_dict"]
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, msg=name)
    at_end = [choice for choice in chose.history if choice[1] > step]
    assert at_end
    assert [choice for choice in after.history if choice[1] > step] == at_end


def test_checkpoint_holds_the_choice_and_loads_with_weights_only(tmp_path: Path) -> None:
    callback = zoo.chooser()
    trainer = zoo.fitted(zoo.Simple(), callback)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    other = zoo.chooser()
    other.load_state_dict(saved["callbacks"][callback.state_key])
    assert other.result == callback.result
    assert other.history == callback.history
    loaded = zoo.Simple.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert callback.result is not None
    assert {layer.mode for layer in mode_layers(loaded)} == {callback.result.chosen}


def test_validation_before_training_chooses_nothing() -> None:
    model, callback = zoo.Simple(), zoo.chooser()
    with pytest.warns(UserWarning, match="chooses no mode: the model has no population yet"):
        zoo.trainer(callback).validate(model, zoo.val_data(), verbose=False)
    assert callback.result is None
    trainer = zoo.trainer(callback)
    trainer.fit(model, zoo.train_data(), zoo.val_data())
    assert callback.result is not None
    trainer.validate(model, zoo.val_data(), verbose=False)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_weights_get_a_population_of_their_own(tmp_path: Path, use_buffers: bool) -> None:
    model, callback = zoo.Simple(), zoo.chooser()
    averaging = EMAWeightAveraging(decay=0.8, use_buffers=use_buffers)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    fit(model, averaging, callback, saver, max_epochs=3, enable_checkpointing=True)

    # at the end of fit the model holds the average: its population must be the one of these weights
    expected = copy.deepcopy(model)
    recompute_population(expected, steady_data(), predict=lambda batch: expected(batch[0]), limit=2)
    for one, other in zip(populations(model), populations(expected), strict=True):
        torch.testing.assert_close(one.batch_mean, other.batch_mean)
        torch.testing.assert_close(one.batch_var, other.batch_var)
    # and what was saved scores what the checkpoint says it does
    loaded = zoo.Simple.load_from_checkpoint(saver.best_model_path)
    scored = zoo.trainer().validate(loaded, zoo.val_data(), verbose=False)[0]["val_loss"]
    assert scored == pytest.approx(float(saver.best_model_score), abs=1e-6)


def test_weights_saved_alone_are_the_average_with_its_population(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_weights_only=True, filename="{epoch}")
    averaging = EMAWeightAveraging(decay=0.8)
    callback, model = zoo.chooser(), zoo.Simple()
    fit(model, averaging, callback, saver, max_epochs=3, enable_checkpointing=True)
    assert len(saver.best_k_models) == 3
    for (path, score), (*_, mode, _) in zip(sorted(saver.best_k_models.items()), callback.history, strict=True):
        saved = torch.load(path, weights_only=True)
        assert "callbacks" not in saved
        loaded = zoo.Simple.load_from_checkpoint(path)
        assert {str(layer.mode) for layer in mode_layers(loaded)} == {mode}
        scored = zoo.trainer().validate(loaded, zoo.val_data(), verbose=False)[0]["val_loss"]
        assert scored == pytest.approx(float(score), abs=1e-6)
    assert "on_save_checkpoint" not in model.__dict__


def test_plain_weight_averaging_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(zoo.Simple(), WeightAveraging(), zoo.chooser(), saver, max_epochs=1, enable_checkpointing=True)
    model = zoo.Simple()
    fit(model, WeightAveraging(), zoo.chooser(), max_epochs=2, checkpoint=str(tmp_path / "last.ckpt"))
    assert all(one.is_frozen for one in populations(model))


@pytest.mark.parametrize("tuner", ["batch size", "learning rate"])
def test_tuners_leave_statistics_and_mode_as_they_were(tmp_path: Path, tuner: str) -> None:
    seen: dict[str, Any] = {}

    class Tuned(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 8

        def train_dataloader(self) -> Any:
            return zoo.train_data(batch_size=self.batch_size, shuffle=False)

        def val_dataloader(self) -> Any:
            return zoo.val_data()

        def on_train_start(self) -> None:
            seen["populations"] = [(one.is_frozen, one.is_gathering) for one in populations(self)]
            seen["modes"] = {str(layer.mode) for layer in mode_layers(self)}

    finder: Any = LearningRateFinder(num_training_steps=4)
    if tuner == "batch size":
        finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    callback, model = zoo.chooser(), Tuned()
    trainer = zoo.trainer(finder, callback, default_root_dir=tmp_path, num_sanity_val_steps=0)
    trainer.fit(model)
    assert seen["populations"] == [(False, False)] * 2
    assert seen["modes"] == {"ppcc"}
    assert len(callback.history) == 1
