"""Training runs: their scores, their result, and going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bln import ALL_MODES, using_mode
from lightning_bln.models import PAPER_NORMS
from lightning_bln.reproduce import training
from lightning_bln.reproduce.report import unusable_modes
from lightning_bln.reproduce.training import canonical_mode, evaluate, modes_of

from .small import SMALL, small_run, small_samples


@pytest.mark.parametrize("norm", PAPER_NORMS)
def test_one_pass_equals_a_pass_for_each_mode(norm: str) -> None:
    module, twin = SMALL.build(norm, "paper"), SMALL.build(norm, "pooled")
    training._sharing_weights(module, twin)
    batches = small_samples(40).batches(8)
    for inputs, _ in batches:
        module.network(inputs)
    if norm != "batch":
        training.freeze_population(module)
    training.recompute_population(twin.network, batches)
    modes = modes_of(norm)
    scores = evaluate([module, twin], batches, modes)
    for variant, found in zip((module, twin), scores, strict=True):
        variant.eval()
        for mode in modes:
            with using_mode(variant.network, mode), torch.no_grad():
                logits = torch.cat([variant.network(inputs) for inputs, _ in batches])
            labels = torch.cat([labels for _, labels in batches])
            assert found[mode]["loss"] == pytest.approx(float(variant.loss(logits, labels)), rel=1e-5)
            assert found[mode]["acc"] == pytest.approx(float(((logits > 0) == labels).float().mean()))
            assert found[mode]["acc_authors"] == pytest.approx(float(((logits > 0.5) == labels).float().mean()))


def test_modes_that_do_not_differ_are_scored_once() -> None:
    assert [len(modes_of(norm)) for norm in ("bln", "batch", "layer", "layer-scaled")] == [16, 4, 4, 4]
    module = SMALL.build("layer", "paper")
    batches = small_samples(16).batches(8)
    for inputs, _ in batches:
        module.network(inputs)
    training.freeze_population(module)
    (scores,) = evaluate([module], batches, ALL_MODES)
    for mode in ALL_MODES:
        assert scores[mode] == pytest.approx(scores[canonical_mode("layer", mode)], rel=1e-6)


def test_twin_follows_the_weights() -> None:
    module, twin = SMALL.build("bln", "paper"), SMALL.build("bln", "pooled")
    training._sharing_weights(module, twin)
    for (name, one), (_, other) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert one is other, name


def test_run_learns_and_leaves_only_its_result(tmp_path: Path) -> None:
    result = small_run(tmp_path, epochs=6)
    losses = [entry["train_loss"] for entry in result["history"]]
    assert losses[-1] < losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    best = min(entry["val_loss"] for entry in result["history"])
    assert result["history"][result["best_epoch"] - 1]["val_loss"] == best
    # The model kept is that of the best epoch: scored again, its validation loss is the one in the history.
    assert result["validation"]["paper"]["cccc"]["loss"] == pytest.approx(best, rel=1e-5)
    assert result["test"]["recomputed"].keys() == set(map(str, ALL_MODES))


@pytest.mark.parametrize("norm", ["bln", "batch"])
@pytest.mark.parametrize("interrupted", ["training", "validation", "test"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str, interrupted: str
) -> None:
    whole = small_run(tmp_path / "whole", norm)
    calls = 0

    def failing(function: Callable[..., Any], after: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    name, after = {"training": ("_train_epoch", 2), "validation": ("evaluate", 4), "test": ("evaluate", 8)}[interrupted]
    with monkeypatch.context() as patch:
        patch.setattr(training, name, failing(getattr(training, name), after))
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path / "resumed", norm)
    torch.randn(3)  # whatever else used the generator in between
    assert small_run(tmp_path / "resumed", norm) == whole


def test_a_folder_with_another_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    small_run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"holds a run with epochs=1, but 2 is asked for; name another .*--output"):
        small_run(tmp_path, epochs=2)


@pytest.mark.parametrize("norm", PAPER_NORMS)
def test_batch_size_one_has_no_mode_without_a_finite_loss(tmp_path: Path, norm: str) -> None:
    assert unusable_modes(small_run(tmp_path, norm, batch_size=1, epochs=2)) == []
