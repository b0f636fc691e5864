"""``bln reproduce`` on a small experiment of its own, and a quick pass over real data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_bln import ALL_MODES, using_mode
from lightning_bln.models import PAPER_NORMS, PaperIMDB
from lightning_bln.reproduce import command, experiments, main, report, training
from lightning_bln.reproduce.experiments import Experiment, Samples
from lightning_bln.reproduce.report import chosen_mode, published, tables, unusable_modes
from lightning_bln.reproduce.training import Settings, canonical_mode, evaluate, modes_of, run


def small_samples(count: int) -> Samples:
    tokens = torch.randint(0, 30, (count, 5), generator=torch.Generator().manual_seed(count))
    return Samples(tokens, (tokens[:, -1] > 14).long())


SMALL = Experiment(
    "imdb",
    25_000,
    3,
    lambda directory, fetch: (small_samples(100), small_samples(60)),
    lambda norm, population: PaperIMDB(norm, vocabulary=30, embedding=6, hidden=8, population=population),
)
FRACTION = 0.004


def small_run(folder: Path, norm: str = "bln", **options: Any) -> dict[str, Any]:
    settings = Settings(norm, 0, **{"fraction": FRACTION, "batch_size": 5, "epochs": 3, **options})
    return run(SMALL, *SMALL.read(None, False), settings, folder)


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


def test_splits_are_seeded_and_disjoint() -> None:
    pool, test = SMALL.read(None, False)
    numbered = Samples(torch.arange(100), pool.labels)
    train, valid, _ = SMALL.split(numbered, test, FRACTION, seed=1)
    assert (len(train.labels), len(valid.labels)) == (80, 20)
    assert not set(train.inputs.tolist()) & set(valid.inputs.tolist())
    again, other = (SMALL.split(numbered, test, FRACTION, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(train.inputs, again.inputs)
    assert not torch.equal(train.inputs, other.inputs)
    with pytest.raises(ValueError, match=r"fraction=0\.02 asks for 500 .* the files hold 100"):
        SMALL.split(numbered, test, 0.02, seed=1)


def made_result(losses: dict[str, float], norm: str = "bln") -> dict[str, Any]:
    scores = {mode: {"loss": losses.get(mode, 1.0), "acc": 0.5, "acc_authors": 0.5} for mode in modes_of(norm)}
    return {"norm": norm, "validation": {"paper": scores}, "test": {"paper": scores, "recomputed": scores}}


def test_choice_prefers_finite_then_low_then_batch_independent() -> None:
    assert chosen_mode(made_result({"cccc": 0.2, "ppcc": 0.2, "pccc": math.nan}), "paper") == "ppcc"
    assert chosen_mode(made_result({"cccc": 0.1, "ppcc": 0.2}), "paper") == "cccc"
    assert chosen_mode(made_result({"cccc": 0.1, "ppcc": 0.2}), "paper", among=["ppcc", "pppp"]) == "ppcc"
    assert unusable_modes(made_result({"cccp": math.inf, "pccc": math.nan})) == ["pccc", "cccp"]


def test_published_numbers_are_the_authors(shared: Path) -> None:
    theirs = json.loads((shared / "paper_results.json").read_text())["experiments"]
    names = {"bln": "BLN", "batch": "BN", "layer": "LN"}
    assert len(published()) == 6
    for key, norms in published().items():
        name, fraction, size = key.split("-")
        methods = theirs[f"{name}/{'whole' if fraction == '1' else fraction}/{size}"]["methods"]
        for norm, ours in norms.items():
            method = methods[names[norm]]
            assert ours["val_loss"] == pytest.approx(method["history"]["val_loss"], abs=1e-4)
            assert ours["best_epoch"] == method["checkpoint_epoch_lowest_val_loss"]
            if norm == "bln":
                for config, value in method["test_16_configs"].items():
                    mode = config.replace("T", "p").replace("F", "c")
                    assert ours["test"][mode][1] == pytest.approx(value["acc"], abs=1e-4)
            else:
                assert next(iter(ours["test"].values()))[1] == pytest.approx(method["test"]["acc"], abs=1e-4)


@pytest.fixture
def small_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.EXPERIMENTS, "imdb", SMALL)


def test_command_writes_everything(small_command: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["imdb", "--fraction", str(FRACTION), "--batch-size", "5", "--seeds", "1", "--epochs", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for norm in PAPER_NORMS:
        assert f"| {norm} " in shown
    assert "best on test (no fair choice)" in shown
    for name in ("results.json", "table.md", "convergence.png", "modes.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert (tmp_path / "table.md").read_text() in shown
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert "epoch" not in capsys.readouterr().out.split("|")[0].replace("epochs", "")


def test_paper_stands_beside_ours(tmp_path: Path) -> None:
    result = {**small_run(tmp_path), "fraction": 0.2, "batch_size": 25}
    text = tables([result])
    assert "0.5051" in text  # the paper's best validation loss
    assert "0.7712" in text  # its test accuracy in cccc
    assert "the authors: 0 of 16" in text
    assert "-" in tables([{**result, "fraction": 0.3}])
    assert report.published()["imdb-0.2-bs1"]["bln"]["test"]["pppp"][0] is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["imdb", "--seeds", "0"], 2, "--seeds is 0, but it must be positive"),
        (["imdb", "--fraction", "-1"], 2, "--fraction is -1.0"),
        (["imdb", "--data-dir", "nowhere"], 1, "IMDB reviews not found: no aclImdb or aclImdb_v1.tar.gz in nowhere"),
        (["cifar10", "--data-dir", "nowhere"], 1, "CIFAR-10 not found"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path)]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_quick_pass_over_real_images(shared: Path, tmp_path: Path) -> None:
    status = main(
        ["cifar10", "--quick", "--norms", "bln", "--data-dir", str(shared / "data"), "--output", str(tmp_path)]
    )
    assert status == 0
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["test"]["recomputed"]["pppp"]["acc"] > 0.15


def test_reviews_as_keras_gives_them(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bln.data import LabelledTexts, read_imdb

    def few(directory: Path | None, fetch: bool) -> list[LabelledTexts]:
        return [LabelledTexts(split.texts[::50], split.labels[::50], split.classes) for split in read_imdb(directory)]

    monkeypatch.setattr(experiments, "read_imdb", few)
    train, test = experiments.read_imdb_samples(shared / "data")
    assert train.inputs.shape == test.inputs.shape == (500, 80)
    assert int(train.inputs.max()) < 20_000
    assert not (train.inputs == 3).any()
    words = train.inputs[train.inputs > 3]
    assert words.bincount()[4:].argmax() == 0  # "the" is the most frequent word, with the first id after the specials
