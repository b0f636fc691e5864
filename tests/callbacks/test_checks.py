"""Arguments, models and data that the callback refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bln.callbacks import BLNStatsCallback


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "up"}, "mode='up'"),
        ({"direction": "up"}, "direction='up'"),
        ({"direction": "min", "mode": "max"}, "direction='min' and mode='max'"),
        ({"log": "some"}, "log='some'"),
        ({"candidates": "most"}, "candidates='most'"),
        (
            {"candidates": "folds"},
            "candidates='folds', but it must be 'all', 'batch_independent', 'foldable', a pattern",
        ),
        ({"candidates": ["xxxx"]}, "xxxx"),
        ({"candidates": []}, "candidates is empty"),
        ({"population": "never"}, "population='never'"),
        ({"recompute_batches": 0}, "recompute_batches=0"),
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"guard": "loose"}, "guard='loose'"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BLNStatsCallback(**options)


@pytest.mark.parametrize(
    ("candidates", "modes"),
    [
        ("pp**", "pppp pppc ppcp ppcc"),
        ("batch_independent", "pppp pppc ppcp ppcc"),
        ("ppcc", "ppcc"),
        ("foldable", "pppp"),
        (["cccc", "foldable"], "cccc pppp"),
        (["batch_independent", "cccc"], "pppp pppc ppcp ppcc cccc"),
        (["cccc", "ppc*", "ppcc"], "cccc ppcp ppcc"),
    ],
)
def test_candidates_are_named_one_by_one_or_by_pattern(candidates: Any, modes: str) -> None:
    assert [str(mode) for mode in BLNStatsCallback(candidates=candidates).candidates] == modes.split()


@pytest.mark.parametrize("pattern", ["*****", "p?cc", "[pc]", "pp*", ""])
def test_a_pattern_has_four_letters(pattern: str) -> None:
    with pytest.raises(ValueError, match="candidates="):
        BLNStatsCallback(candidates=pattern)


def test_after_training_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    callback = zoo.chooser(save_dir=blocked / "folder")
    with pytest.warns(UserWarning, match="save_dir="):
        zoo.fitted(zoo.Simple(), callback)
    assert callback.result is not None


def test_a_model_without_our_layers_is_refused() -> None:
    class Plain(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(zoo.FEATURES, zoo.CLASSES))

    with pytest.raises(MisconfigurationException, match="model=Plain has no layer"):
        zoo.fitted(Plain(), zoo.chooser())


def test_steps_that_draw_their_own_batches_are_refused() -> None:
    class Iterates(zoo.Simple):
        def validation_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=20)

    with pytest.raises(MisconfigurationException, match="validation_step\\(dataloader_iter\\)"):
        zoo.fitted(Iterates(), zoo.chooser())


def test_a_rank_without_validation_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = zoo.trainer(zoo.chooser(), num_sanity_val_steps=0)
    # as if another rank had answered the other way
    monkeypatch.setattr(type(trainer.strategy), "reduce_boolean_decision", lambda self, decision, all=True: not all)
    with pytest.raises(MisconfigurationException, match="a rank has no validation batches"):
        trainer.fit(zoo.Simple(), zoo.train_data(), zoo.val_data())


@pytest.mark.parametrize(
    "given", [("val_acc", "max"), {"mode": "max"}, {"direction": "max"}, {"direction": "max", "mode": "max"}]
)
def test_the_direction_is_given_by_place_or_by_either_name(given: Any) -> None:
    callback = BLNStatsCallback("val_acc", **given) if isinstance(given, dict) else BLNStatsCallback(*given)
    assert (callback.direction, callback.mode) == ("max", "max")
    # what checkpoints of earlier versions hold
    assert callback.state_key == "BLNStatsCallback{'monitor': 'val_acc', 'mode': 'max'}"


def test_without_a_direction_small_values_are_good() -> None:
    assert BLNStatsCallback().state_key == "BLNStatsCallback{'monitor': 'val_loss', 'mode': 'min'}"
