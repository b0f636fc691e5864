"""What the callback says, and how often."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import zoo
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import default_collate

from lightning_bln import set_mode
from lightning_bln.modes import mode_layers

MODULE = "lightning_bln.callbacks.messages"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The sentences said so far, infos and warnings."""
    found: dict[str, list[str]] = {"info": [], "warn": []}
    monkeypatch.setattr(f"{MODULE}.rank_zero_info", found["info"].append)
    monkeypatch.setattr(f"{MODULE}.rank_zero_warn", found["warn"].append)
    return found


class Scripted(zoo.Simple):
    """Logs for each mode what the script has for the epoch, and another score if its first batch is regrouped."""

    def __init__(self, script: list[dict[str, tuple[float, float]]]) -> None:
        super().__init__()
        self.script = script

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        loaded, regrouped = self.script[self.current_epoch][str(mode_layers(self)[0].mode)]
        is_first = bool((batch[0] == self.first).all()) if len(batch[0]) == len(self.first) else False
        self.log("val_loss", loaded if is_first or batch_idx else regrouped)

    @property
    def first(self) -> Any:
        return zoo.make_data(41, 2, shift=0.7).tensors[0][:20]


def pairs(best: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"cccc": best, "pccc": (0.4, 0.4), "ppcc": (0.5, 0.5)}


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        # the numbers change, the decision does not
        ([(0.1, 9.0), (0.2, 9.0), (0.1, 7.0)], 1),
        # now the guard lets the best mode be, now it does not; nothing new comes of it
        ([(0.1, 9.0), (0.1, 0.1), (0.1, 9.0)], 1),
        ([(0.1, 0.1)], 0),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_the_guard_says_each_decision_once_a_fit(
    said: dict[str, list[str]], script: list[tuple[float, float]], expected: int, verbose: bool
) -> None:
    callback = zoo.chooser(guard="strict", candidates=["cccc", "ppcc"], verbose=verbose)
    for fit in (1, 2):
        zoo.fitted(Scripted([pairs(one) for one in script]), callback, max_epochs=len(script))
        assert len(said["warn"]) == fit * expected


def test_a_guard_that_decides_otherwise_says_so(said: dict[str, list[str]]) -> None:
    script = [pairs((0.1, 9.0)), {**pairs((0.9, 0.9)), "pccc": (0.2, 9.0)}]
    zoo.fitted(Scripted(script), zoo.chooser(guard="strict", candidates=["cccc", "pccc", "ppcc"]), max_epochs=2)
    assert [sentence.split()[0] for sentence in said["warn"]] == ["cccc", "pccc"]


class Named(zoo.Simple):
    """Takes batches that cannot be regrouped, and reads numbers, so that modes go one after the other."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        float(super().validation_step(batch[:2], batch_idx))


def named(samples: list) -> Any:
    x, y = default_collate(samples)
    return x, y, ["a name"] * len(y)


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_says_each_thing_once_and_not_verbose_nothing(said: dict[str, list[str]], verbose: bool) -> None:
    model = Named()
    callback = zoo.chooser(guard="strict", candidates=["cccc", "pccc"], verbose=verbose)
    trainer = zoo.fitted(model, callback, data=zoo.val_data(collate_fn=named), max_epochs=3)
    assert trainer.current_epoch == 3
    trainer.validate(zoo.Simple(), zoo.val_data(), verbose=False)
    begins = ["BLNStatsCallback evaluates modes one after the other", "BLNStatsCallback did not check whether"]
    begins += ["Simple starts to validate in"]
    assert len(said["info"]) == (3 if verbose else 0)
    assert all(sentence.startswith(begin) for sentence, begin in zip(said["info"], begins, strict=False))
    (warning,) = said["warn"]  # it changes what the layers do
    assert warning.startswith("BLNStatsCallback chooses no mode: the model has no population")


def test_a_missing_population_is_said_once_and_not_by_each_layer() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo.trainer(zoo.chooser()).validate(zoo.Simple(), zoo.val_data(), verbose=False)
        filters = list(warnings.filters)
    found = [text for one in caught if "population" in (text := str(one.message))]
    assert len(found) == 1
    assert "each batch's own statistics" in found[0]
    assert not [one for one in filters if "needs a population" in str(one[1])]


class Elsewhere(pl.Callback):
    """Keeps a metric of its own, from what the step returns, and logs it from a hook."""

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.seen: list[float] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs))
        if self.hook == "batch":
            pl_module.log("elsewhere", self.seen[-1], batch_size=1)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.hook == "epoch":
            pl_module.log("elsewhere", sum(self.seen) / len(self.seen))
        self.seen.clear()


def losing(model: zoo.Simple) -> str:
    """The mode set on ``model``, one that does not win."""
    set_mode(model, "cccp")
    return "cccp"


@pytest.mark.parametrize("hook", ["batch", "epoch"])
def test_a_monitor_of_another_callback_is_an_error_with_the_way_out(hook: str) -> None:
    model = zoo.Simple()
    words = "monitor='elsewhere', but another callback logs it.* log it in validation_step"
    with pytest.raises(MisconfigurationException, match=words):
        zoo.fitted(model, Elsewhere(hook), zoo.chooser("elsewhere"))
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}


@pytest.mark.parametrize("hook", ["batch", "epoch"])
def test_the_table_says_whose_the_metrics_of_other_callbacks_are(hook: str) -> None:
    model, callback = zoo.Simple(), zoo.chooser()
    before = losing(model)
    trainer = zoo.fitted(model, Elsewhere(hook), callback, num_sanity_val_steps=0)
    result = callback.result
    assert result is not None
    assert result.chosen != before
    assert "elsewhere" in trainer.callback_metrics
    assert result.unscored == ("elsewhere",)
    sentence = f"Of {before}, not of {result.chosen}, since other callbacks logged them: elsewhere."
    assert str(result).splitlines()[-1] == sentence
    assert sentence in str(result.table().caption)
    result.chosen = result.incumbent
    assert "elsewhere" not in str(result)


def test_without_other_callbacks_nothing_is_said_of_them() -> None:
    callback = zoo.chooser()
    zoo.fitted(zoo.Rich(), callback, max_epochs=3)
    assert callback.result is not None
    assert callback.result.unscored == ()
