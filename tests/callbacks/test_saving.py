"""Checkpoints between validations: the population in them is that of their weights, or they say that it is older."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging

from lightning_bln import recompute_population
from lightning_bln.recomputation import populations

OLDER = "older than the weights"


def is_older(load: Any) -> bool:
    """Whether loading warns of an old population."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return any(OLDER in str(one.message) for one in caught)


class ByHand(pl.Callback):
    """Saves in the middle of the second epoch, as a user's code may."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.options = path, options

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path, **self.options)


def saver(way: str, folder: Path) -> Any:
    """A callback that saves ``step.ckpt`` at step 6, two steps after a validation."""
    options = {"save_top_k": -1, "filename": "step", "enable_version_counter": False}
    return {
        "every_n_train_steps": lambda: ModelCheckpoint(folder, every_n_train_steps=6, **options),
        "weights only": lambda: ModelCheckpoint(folder, every_n_train_steps=6, save_weights_only=True, **options),
        "by hand": lambda: ByHand(folder / "step.ckpt"),
        "weights by hand": lambda: ByHand(folder / "step.ckpt", weights_only=True),
    }[way]()


WAYS = ["every_n_train_steps", "weights only", "by hand", "weights by hand"]


def fit(folder: Path, way: str, *others: Any, **options: Any) -> zoo.Simple:
    torch.manual_seed(1)
    model = zoo.Simple(lr=0.5)
    callbacks = [*others, zoo.chooser(**options), saver(way, folder)]
    zoo.trainer(*callbacks, max_epochs=2, enable_checkpointing="hand" not in way).fit(
        model, zoo.train_data(shuffle=False), zoo.val_data()
    )
    return model


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_between_validations_says_that_its_population_is_older(tmp_path: Path, way: str) -> None:
    fit(tmp_path, way)
    path = tmp_path / "step.ckpt"
    assert is_older(lambda: zoo.Simple.load_from_checkpoint(path))
    model = zoo.Simple()
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert is_older(lambda: model.load_state_dict(saved, strict=True))
    # and again of a copy, until the population is computed
    assert is_older(lambda: zoo.Simple().load_state_dict(model.state_dict()))
    recompute_population(model, zoo.train_data(shuffle=False))
    assert not is_older(lambda: zoo.Simple().load_state_dict(model.state_dict()))


def test_resuming_from_such_a_checkpoint_warns_and_goes_on(tmp_path: Path) -> None:
    fit(tmp_path, "by hand")
    callback = zoo.chooser()
    trainer = zoo.trainer(callback, max_epochs=2)
    resumed = zoo.Simple()
    assert is_older(
        lambda: trainer.fit(
            resumed, zoo.train_data(shuffle=False), zoo.val_data(), ckpt_path=str(tmp_path / "step.ckpt")
        )
    )
    assert not is_older(lambda: zoo.Simple().load_state_dict(resumed.state_dict()))


def test_a_checkpoint_after_a_validation_does_not_warn(tmp_path: Path) -> None:
    model = zoo.Simple()
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    zoo.trainer(zoo.chooser(), keep, max_epochs=2, enable_checkpointing=True).fit(
        model, zoo.train_data(), zoo.val_data()
    )
    for path in (keep.best_model_path, keep.last_model_path):
        assert not is_older(lambda path=path: zoo.Simple.load_from_checkpoint(path))
    assert not is_older(lambda: zoo.Simple().load_state_dict(model.state_dict()))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_refreshed_checkpoints_hold_the_population_of_their_weights(tmp_path: Path, way: str, average: bool) -> None:
    others = [EMAWeightAveraging(decay=0.8)] if average else []
    plain, others_too = tmp_path / "plain", [EMAWeightAveraging(decay=0.8)] if average else []
    without = fit(plain, way, *others_too, recompute_batches=None)
    model = fit(tmp_path, way, *others, recompute_batches=None, refresh_on_save=True)
    # saving disturbs no training
    for one, other in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not is_older(lambda: zoo.Simple.load_from_checkpoint(tmp_path / "step.ckpt"))
    loaded, same = (zoo.Simple.load_from_checkpoint(tmp_path / "step.ckpt") for _ in range(2))
    recompute_population(same, zoo.train_data(shuffle=False))
    for one, other in zip(populations(loaded), populations(same), strict=True):
        torch.testing.assert_close(one.batch_mean, other.batch_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.batch_var, other.batch_var, rtol=1e-5, atol=1e-5)


def test_state_dicts_keep_their_keys_and_earlier_ones_load() -> None:
    fresh = zoo.Simple()
    keys = set(fresh.state_dict())
    recompute_population(fresh, zoo.train_data())
    fresh(torch.randn(4, zoo.FEATURES))
    marked = fresh.state_dict()
    assert set(marked) == keys
    assert is_older(lambda: zoo.Simple().load_state_dict(marked))
    plain = {key: value.bool() if key.endswith("_extra_state") else value for key, value in marked.items()}
    assert not is_older(lambda: zoo.Simple().load_state_dict(plain))
