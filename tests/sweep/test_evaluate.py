"""The sweep without a Trainer: scores equal evaluating each mode alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BatchLayerNorm, recompute_population, set_mode
from lightning_bln.modes import mode_layers
from lightning_bln.norm import Normalization
from lightning_bln.sweep import sweep_modes
from tests.sweep.networks import MODELS, first, prepared


class Hits:
    """A metric with a state, as torchmetrics has them."""

    def __init__(self) -> None:
        self.right, self.all = 0, 0

    def update(self, out: Tensor, y: Tensor) -> None:
        self.right += int((out.argmax(-1) == y).sum())
        self.all += len(y)

    def compute(self) -> float:
        return self.right / self.all


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_evaluating_each_mode_alone(name: str) -> None:
    model, batches, _ = prepared(name)
    model.train()
    torch.manual_seed(1)
    result = sweep_modes(
        model,
        batches,
        lambda batch: (first(model(batch[0])), batch[1]),
        {"loss": F.cross_entropy, "acc": Hits()},
    )
    assert model.training
    assert result.reason is None
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}
    model.eval()
    losses = {}
    for mode in ALL_MODES:
        set_mode(model, mode)
        torch.manual_seed(1)
        with torch.no_grad():
            outs = [first(model(x)) for x, _ in batches]
        losses[mode] = sum(float(F.cross_entropy(o, y)) * len(y) for o, (_, y) in zip(outs, batches, strict=True)) / 19
        assert result.scores[mode]["loss"] == pytest.approx(losses[mode], rel=1e-5)
        right = sum(int((o.argmax(-1) == y).sum()) for o, (_, y) in zip(outs, batches, strict=True))
        assert result.scores[mode]["acc"] == pytest.approx(right / 19, abs=1e-6)
    assert len({round(value, 5) for value in losses.values()}) >= 8
    assert losses[result.best()] == pytest.approx(min(losses.values()), rel=1e-5)  # two may be equal but for rounding


def test_bad_arguments_are_named() -> None:
    model, batches, _ = prepared("perceptron")

    def predict(batch: Any) -> Any:
        return model(batch[0]), batch[1]

    metrics = {"loss": F.cross_entropy}
    with pytest.raises(ValueError, match="metrics is empty"):
        sweep_modes(model, batches, predict, {})
    with pytest.raises(ValueError, match="modes is empty"):
        sweep_modes(model, batches, predict, metrics, [])
    with pytest.raises(ValueError, match="modes='most', but it must be 'all', 'batch_independent', 'foldable'"):
        sweep_modes(model, batches, predict, metrics, "most")
    with pytest.raises(ValueError, match="batches is empty"):
        sweep_modes(model, [], predict, metrics)
    with pytest.raises(ValueError, match="monitor='f1'"):
        sweep_modes(model, batches, predict, metrics, monitor="f1")
    with pytest.raises(ValueError, match="no layer with a statistics mode"):
        sweep_modes(nn.Linear(2, 2), batches, predict, metrics)
    with pytest.raises(ValueError, match="mode='up'"):
        sweep_modes(model, batches, predict, metrics, mode="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direction='min' and mode='max'"):
        sweep_modes(model, batches, predict, metrics, direction="min", mode="max")


def test_the_result_says_why_modes_share_no_forward() -> None:
    model, batches, _ = prepared("perceptron")
    model[2].register_forward_hook(lambda *_: None)
    found = sweep_modes(model, batches, lambda batch: (model(batch[0]), batch[1]), {"loss": F.cross_entropy})
    assert found.direction == "min"
    assert "forward hooks inside" in (found.reason or "")


def test_a_model_without_a_population_is_refused() -> None:
    model, data = BatchLayerNorm(4), [(torch.randn(8, 4), torch.zeros(8, 4))]
    with pytest.raises(ValueError, match="no frozen population"):
        sweep_modes(model, data, lambda batch: (model(batch[0]), batch[1]), {"mse": F.mse_loss})
    result = sweep_modes(model, data, lambda batch: (model(batch[0]), batch[1]), {"mse": F.mse_loss}, ["cccc"])
    assert set(result.scores) == {"cccc"}


def halved(norm: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network of one kind of norms, and data."""
    torch.manual_seed(0)
    batches = [(torch.randn(6, 5) + 1, torch.randint(0, 3, (6,))) for _ in range(3)]
    model = nn.Sequential(nn.Linear(5, 5), Normalization(5, norm=norm), nn.Tanh(), Normalization(5, norm=norm))
    recompute_population(model, [x for x, _ in batches])
    return model, batches


FOUR = {"batch": ["ppcc", "pccc", "cpcc", "cccc"], "layer": ["pppp", "pppc", "ppcp", "ppcc"]}


@pytest.mark.parametrize("norm", FOUR)
def test_modes_that_are_equal_are_scored_once(norm: str) -> None:
    model, batches = halved(norm)
    calls: list[int] = []

    def predict(batch: Any) -> Any:
        calls.append(len(batch))
        return model(batch[0]), batch[1]

    metrics = {"loss": F.cross_entropy}
    result = sweep_modes(model, batches, predict, metrics)
    assert (list(result.scores), result.incumbent, len(calls)) == (FOUR[norm], "ppcc", 12)
    calls.clear()
    every = sweep_modes(model, batches, predict, metrics, ALL_MODES)
    assert (list(every.scores), len(calls)) == (list(ALL_MODES), 12)
    model.eval()
    for mode in ALL_MODES:
        set_mode(model, mode)
        with torch.no_grad():
            alone = [float(F.cross_entropy(model(x), y)) for x, y in batches]
        assert every.scores[mode]["loss"] == pytest.approx(sum(alone) / 3, rel=1e-6)
    assert {mode: every.scores[mode] for mode in result.scores} == result.scores


@pytest.mark.parametrize(
    ("norm", "modes", "expected", "folds"),
    [
        ("batch", "foldable", ["pppp"], ("pppp",)),
        ("layer", "foldable", ["pppp"], ("pppp",)),
        ("batch", None, FOUR["batch"], ("ppcc",)),
        ("layer", None, FOUR["layer"], ("pppp",)),
        ("batch", "pp**", FOUR["layer"], tuple(FOUR["layer"])),
        ("layer", ["foldable", "cc**"], ["pppp", "ccpp", "ccpc", "cccp", "cccc"], ("pppp", "ccpp")),
    ],
)
def test_modes_may_be_named_by_words_and_those_that_fold_are_known(norm, modes, expected, folds) -> None:
    model, batches = halved(norm)
    predict = lambda batch: (model(batch[0]), batch[1])  # noqa: E731
    found = sweep_modes(model, batches, predict, {"loss": F.cross_entropy}, modes)
    assert list(found.scores) == expected
    assert found.foldable == folds
    assert found.best(among="foldable") in folds


def test_modes_given_by_name_keep_their_names_and_the_incumbent_is_among_them() -> None:
    model, batches = halved("batch")

    def sweep(*modes: str) -> Any:
        return sweep_modes(model, batches, lambda batch: (model(batch[0]), batch[1]), {"loss": F.cross_entropy}, modes)

    set_mode(model, "pppp")
    found = sweep("pppc", "pppp", "cccc")
    assert (list(found.scores), found.incumbent) == (["pppc", "pppp", "cccc"], "pppp")
    assert found.scores["pppc"] == found.scores["pppp"] != found.scores["cccc"]
    assert sweep("pppc", "cccc").incumbent == "pppc"  # by the name of one that is equal
    assert sweep("pccc", "cccc").incumbent == "pppp"
    assert {layer.mode for layer in mode_layers(model)} == {"pppp"}
