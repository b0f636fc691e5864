"""The guard finds scores that depend on which samples share a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.callbacks.guard import NotRegroupable, dissect, regroup
from lightning_bln.modes import mode_layers


def sorted_by_class(**options: Any) -> DataLoader:
    x, y = zoo.make_data(200, 2).tensors
    order = torch.argsort(y, stable=True)
    return DataLoader(TensorDataset(x[order], y[order]), **{"batch_size": 20, **options})


def leaky(guard: str, data: Any = None, **options: Any) -> tuple[zoo.Simple, BLNStatsCallback]:
    """A fit in which only modes that read the batch's mean compete with batch-independent ones."""
    model = zoo.Simple()
    candidates = options.pop("candidates", ["cccc", "ppcc"])
    callback = zoo.chooser(guard=guard, candidates=candidates, mode="max", **options)
    zoo.fitted(model, callback, data=sorted_by_class() if data is None else data, max_epochs=2)
    return model, callback


def test_strict_sets_the_best_batch_independent_mode_and_says_so() -> None:
    # the worst loss is asked for, so that on sorted data cccc wins, and falls where batches are mixed
    with pytest.warns(UserWarning, match="cccc has the best val_loss .* so ppcc .* is set"):
        model, callback = leaky("strict")
    result = callback.result
    assert result is not None
    assert result.best() == "cccc"
    assert result.chosen == "ppcc"
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}
    assert result.regrouped["cccc"].spread > 0.01
    assert result.regrouped["ppcc"].spread < 1e-5
    assert "regrouped" in str(result)


def test_warn_keeps_the_winner_and_off_does_not_look() -> None:
    with pytest.warns(UserWarning, match="expect that at inference"):
        _, callback = leaky("warn")
    assert callback.result is not None
    assert callback.result.chosen == "cccc"
    _, callback = leaky("off")
    assert callback.result is not None
    assert not callback.result.regrouped


def test_a_wide_tolerance_lets_the_winner_be() -> None:
    _, callback = leaky("strict", tolerance=100.0)
    assert callback.result is not None
    assert callback.result.chosen == "cccc"
    assert callback.result.note is None


def test_a_batch_independent_winner_is_not_put_to_the_test() -> None:
    _, callback = leaky("strict", candidates=["pppp", "ppcc"])
    assert callback.result is not None
    assert not callback.result.regrouped


def test_regrouped_scores_leave_the_validation_as_it_was() -> None:
    model = zoo.Rich()
    callback = zoo.chooser(guard="warn", candidates=["cccc"])
    with pytest.warns(UserWarning, match="expect that"):
        trainer = zoo.fitted(model, callback, data=sorted_by_class())
    expected = zoo.oracle(model, sorted_by_class())
    assert callback.result is not None
    for mode, values in callback.result.scores.items():
        assert values["val_sum"] == pytest.approx(expected[mode]["val_sum"], rel=1e-5)
    chosen = expected[str(callback.result.chosen)]
    assert float(trainer.callback_metrics["val_f1"]) == pytest.approx(chosen["val_f1"], abs=1e-6)


def test_data_beyond_the_bound_is_scored_on_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bln.callbacks.guard.SAMPLES", 60)
    _, callback = leaky("warn")
    result = callback.result
    assert result is not None
    assert result.regrouped["cccc"].as_loaded != result.scores["cccc"]["val_loss"]


def test_batches_that_cannot_be_regrouped_are_left_alone_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    def collate(samples: list) -> tuple:
        x, y = default_collate(samples)
        return x, y, ["a name"] * len(y)

    class Named(zoo.Simple):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch[:2], batch_idx)

    callback = zoo.chooser(guard="strict", candidates=["cccc", "ppcc"], mode="max")
    with caplog.at_level("INFO"):
        zoo.fitted(Named(), callback, data=sorted_by_class(collate_fn=collate))
    assert callback.result is not None
    assert callback.result.chosen == "cccc"
    assert not callback.result.regrouped


def batches(*labels: list[int]) -> list[Any]:
    return [dissect({"x": torch.tensor(part)[:, None], "y": torch.tensor(part)}, None) for part in labels]


def test_mixed_batches_are_sorted_and_sorted_ones_are_mixed() -> None:
    mixed = regroup(batches([0, 1, 0, 1], [1, 0, 1, 0], [0, 1]))
    assert [batch["y"].tolist() for batch in mixed] == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1]]
    assert all(torch.equal(batch["x"][:, 0], batch["y"]) for batch in mixed)
    shuffled = regroup(batches([0] * 10, [1] * 10))
    assert all(0 < int(batch["y"].sum()) < 10 for batch in shuffled)


def test_a_lone_batch_is_split() -> None:
    assert [len(batch["y"]) for batch in regroup(batches([0, 1, 0, 1, 0]))] == [3, 2]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(3, 2), "names"), "holds a str"),
        ((torch.zeros(3, 2), torch.zeros(4)), "first axis"),
        ((torch.tensor(1.0),), "first axis"),
    ],
)
def test_what_cannot_be_taken_apart_says_why(batch: Any, words: str) -> None:
    with pytest.raises(NotRegroupable, match=words):
        dissect(batch, None)


def test_padded_batches_of_different_lengths_say_why() -> None:
    kept = [dissect((torch.zeros(3, length), torch.zeros(3)), None) for length in (4, 5)]
    with pytest.raises(NotRegroupable, match="padded"):
        regroup(kept)


def test_spread_is_relative_and_infinite_where_nothing_can_be_compared() -> None:
    from lightning_bln.sweep import Regrouped

    assert Regrouped(2.0, 3.0).spread == 0.5
    assert Regrouped(0.0, 0.0).spread == 0.0
    assert Regrouped(math.nan, 1.0).spread == math.inf
