"""Of modes that are equal for a model, the callback evaluates one."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import ALL_MODES, fold, set_mode
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.callbacks.guard import Guard
from lightning_bln.modes import mode_layers
from lightning_bln.norm import Normalization
from lightning_bln.recurrent import BLNLSTM

FOUR = {"batch": ["ppcc", "pccc", "cpcc", "cccc"], "layer": ["pppp", "pppc", "ppcp", "ppcc"]}

FORWARDS: list[int] = []
"""Batch sizes of all forwards in evaluation, outside of models, whose state each mode has of its own."""


class Model(zoo.Simple):
    """A perceptron with norms of given kinds that notes its forwards; a norm of None is none."""

    def __init__(self, *norms: str | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(zoo.FEATURES, 8)]
        layers += [nn.Identity() if one is None else Normalization(8, norm=one, scale=False) for one in norms]
        self.net = nn.Sequential(*layers, nn.Linear(8, zoo.CLASSES))

    def forward(self, x: Any) -> Any:
        if not self.training:
            FORWARDS.append(len(x))
        return self.net(x)


class Recurrent(Model):
    """A classifier over features read one by one."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.lstm, self.head = BLNLSTM(1, 5, batch_first=True, norm=norm), nn.Linear(5, zoo.CLASSES)

    def forward(self, x: Any) -> Any:
        if not self.training:
            FORWARDS.append(len(x))
        return self.head(self.lstm(x[..., None])[1][0][-1])


MODELS = {
    "batch": (lambda: Model("batch", "batch"), FOUR["batch"]),
    "layer": (lambda: Model("layer", "layer"), FOUR["layer"]),
    "none and batch": (lambda: Model(None, "batch"), FOUR["batch"]),
    "both": (lambda: Model("batch", "layer"), list(ALL_MODES)),
    "layer and bln": (lambda: Model("layer", "bln"), list(ALL_MODES)),
    "recurrent batch": (lambda: Recurrent("batch"), FOUR["batch"]),
    "recurrent layer": (lambda: Recurrent("layer"), FOUR["layer"]),
}


def validated(model: pl.LightningModule, **options: Any) -> BLNStatsCallback:
    callback = zoo.chooser(**options)
    zoo.trainer(callback).validate(model, zoo.val_data(), verbose=False)
    assert callback.result is not None
    return callback


def fitted(name: str) -> Any:
    model: Any = MODELS[name][0]()
    zoo.fitted(model, zoo.chooser(candidates=["ppcc"]))
    return model


@pytest.mark.exact
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_separate_validations_of_the_modes_that_differ(name: str) -> None:
    model, modes = fitted(name), MODELS[name][1]
    expected = zoo.oracle(model)
    callback = validated(model)
    assert callback.result is not None
    assert set(callback.result.scores) == set(modes)
    zoo.assert_same_table({mode: expected[mode] for mode in modes}, callback)
    assert callback.result.incumbent == "ppcc"
    best = min(values["val_loss"] for values in expected.values())
    assert expected[callback.result.best()]["val_loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize(("name", "steps"), [("batch", 4), ("layer", 4), ("both", 16)])
def test_each_mode_takes_one_step_of_a_batch(name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(name)
    monkeypatch.setattr(BLNStatsCallback, "shares_forwards", False)
    FORWARDS.clear()
    validated(model)
    assert len(FORWARDS) == 3 * steps


@pytest.mark.parametrize("mode", ["ppcc", "pppp", "cpcp"])
def test_the_incumbent_is_known_by_the_name_of_the_equal_candidate(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BLNStatsCallback, "shares_forwards", False)
    model = fitted("batch")
    set_mode(model, mode)
    FORWARDS.clear()
    result = validated(model).result
    assert result is not None
    assert set(result.scores) == set(FOUR["batch"])
    assert result.incumbent == f"{mode[:2]}cc"
    assert len(FORWARDS) == 12
    assert {layer.mode for layer in mode_layers(model)} == {result.chosen}


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("batch", "batch_independent", {"ppcc"}),
        ("layer", "batch_independent", set(FOUR["layer"])),
        ("batch", "pp**", {"ppcc"}),
        ("batch", "**pp", {"pppp", "pcpp", "cppp", "ccpp"}),
        ("batch", "foldable", {"pppp"}),
        ("layer", "foldable", {"pppp"}),
        ("layer and bln", "foldable", {"pppp"}),
        ("batch", ["foldable", "ppcc", "cccc"], {"ppcc", "cccc"}),
        ("batch", ["pppp", "ppcc", "cccc"], {"ppcc", "cccc"}),
        ("batch", ["pppc", "pppp"], {"pppc"}),
        ("layer", ["cccc", "pccc", "cccp"], {"cccc", "cccp"}),
    ],
)
def test_equal_candidates_are_one(name: str, candidates: Any, expected: set[str]) -> None:
    model = fitted(name)
    result = validated(model, candidates=candidates).result
    assert result is not None
    assert set(result.scores) == expected
    assert {result.chosen} <= expected
    assert {layer.mode for layer in mode_layers(model)} == {result.chosen}


@pytest.mark.parametrize(
    ("name", "folds"), [("batch", ["ppcc"]), ("layer", ["pppp"]), ("both", ["pppp"]), ("recurrent batch", ["ppcc"])]
)
def test_the_result_marks_modes_that_fold(name: str, folds: list[str]) -> None:
    result = validated(fitted(name)).result
    assert result is not None
    assert result.foldable == tuple(folds)
    assert result.best(among="foldable") == folds[0]
    marked = [line.split()[0] for line in str(result).splitlines() if line.endswith("folds")]
    assert marked == folds


@pytest.mark.parametrize("name", ["batch", "layer", "layer and bln"])
def test_a_fit_by_the_foldable_mode_gives_a_model_that_folds(name: str) -> None:
    model: Any = MODELS[name][0]()
    callback = zoo.chooser(candidates="foldable", guard="strict")
    zoo.fitted(model, callback)
    assert [mode for _, _, mode, _ in callback.history] == ["pppp"] * len(callback.history)
    x = torch.randn(5, zoo.FEATURES)
    plain = fold(model.net, example=x)
    assert not mode_layers(plain)
    torch.testing.assert_close(plain(x), model.net.eval()(x))


@pytest.mark.parametrize(
    ("name", "candidates", "is_guarded"),
    [
        ("layer", "all", False),
        ("layer", ["cccc", "cccp"], False),
        ("recurrent layer", "all", False),
        ("batch", "batch_independent", False),
        ("batch", "all", True),
        ("batch", ["pppp", "pccc"], True),
        ("both", "all", True),
    ],
)
def test_the_guard_looks_only_where_modes_depend_on_the_batch(
    name: str, candidates: Any, is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    keep = Guard.keep

    def watched(self: Guard, batch: Any, dataloader_idx: int | None) -> None:
        kept.append(batch)
        keep(self, batch, dataloader_idx)

    monkeypatch.setattr(Guard, "keep", watched)
    model = fitted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = validated(model, guard="strict", candidates=candidates).result
    assert bool(kept) == is_guarded
    assert result is not None
    assert is_guarded or not result.regrouped


def test_the_guard_falls_back_on_the_equal_of_what_is_batch_independent() -> None:
    model = fitted("batch")
    x, y = zoo.make_data(200, 2).tensors
    order = torch.argsort(y, stable=True)
    data = DataLoader(TensorDataset(x[order], y[order]), batch_size=20)
    # the worst loss is asked for, so that on sorted data cccc wins, and falls where batches are mixed
    callback = zoo.chooser(guard="strict", candidates=["pppp", "cccc"], direction="max")
    with pytest.warns(UserWarning, match="cccc has the best val_loss .* so pppp .* is set"):
        zoo.trainer(callback).validate(model, data, verbose=False)
    result = callback.result
    assert result is not None
    assert (result.incumbent, result.best(), result.chosen) == ("pppp", "cccc", "pppp")
    assert set(result.scores) == set(result.regrouped) == {"pppp", "cccc"}


def test_bars_and_logs_follow(tmp_path: Any) -> None:
    labels: list[str] = []

    class Reads(Model):
        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            labels.append(self.trainer.progress_bar_callback.val_progress_bar.desc)  # type: ignore[union-attr]

    callback = zoo.chooser(log="all")
    trainer = zoo.fitted(
        Reads("batch"),
        callback,
        TQDMProgressBar(refresh_rate=1),
        enable_progress_bar=True,
        num_sanity_val_steps=0,
        logger=CSVLogger(tmp_path),
    )
    assert any("in 4 modes" in label for label in labels)
    assert not any("16" in label for label in labels)
    assert callback.result is not None
    assert callback.result.chosen is not None
    logged = trainer.callback_metrics
    assert {name for name in logged if name.startswith("bln/val_loss/")} == {f"bln/val_loss/{m}" for m in FOUR["batch"]}
    assert float(logged["bln/mode"]) == ALL_MODES.index(callback.result.chosen)
