"""Calibration: populations of unlabelled samples, with those before kept, and warnings of samples that may mislead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import BLNLSTM, BatchLayerNorm, Normalization, calibrate, recompute_population
from lightning_bln.population import Population


class Last(nn.Module):
    """The last state of a BLN-LSTM, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = BLNLSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def dense(*norms: nn.Module) -> nn.Module:
    layers = [part for norm in norms for part in (nn.Linear(4, 4), norm, nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(4, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: dense(nn.BatchNorm1d(4), nn.BatchNorm1d(4)),
    "BLN": lambda: dense(BatchLayerNorm(4), BatchLayerNorm(4)),
    "norm='batch'": lambda: dense(Normalization(4, norm="batch")),
    "both": lambda: dense(nn.BatchNorm1d(4), BatchLayerNorm(4, population="paper")),
    "LSTM": Last,
}


def batches_for(model: nn.Module, scale: float = 1.0, batches: int = 16) -> list[Tensor]:
    torch.manual_seed(7)
    shape = (6, 4) if isinstance(model, Last) else (4,)
    return [torch.randn(16, *shape) * scale + scale for _ in range(batches)]


def made(name: str, *, is_frozen: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    if is_frozen:
        recompute_population(model, batches_for(model))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: (one.training, getattr(one, "is_stale", None)) for name, one in model.named_modules()}
    return {"state": state, "modes": modes}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert list(one["state"]) == list(two["state"])
    assert all(torch.equal(one["state"][name], value) for name, value in two["state"].items())
    assert one["modes"] == two["modes"]


def warned(model: nn.Module, batches: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        calibrate(model, batches, **options)
    return [str(one.message) for one in found]


@pytest.mark.parametrize("name", MODELS)
def test_the_population_is_that_of_recompute_population(name) -> None:
    model, other = made(name), made(name)
    shifted = batches_for(model, 3.0)
    calibration = calibrate(model, shifted)
    recompute_population(other, shifted)
    assert_same(snapshot(model), snapshot(other))
    assert calibration.samples == 256
    assert any(not torch.equal(calibration.before[key], value) for key, value in calibration.after.items())


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "empty"])
@pytest.mark.parametrize("name", MODELS)
def test_either_population_comes_back_bit_for_bit(name, is_frozen) -> None:
    model = made(name, is_frozen=is_frozen).eval()
    before = snapshot(model)
    calibration = calibrate(model, batches_for(model, 3.0))
    after = snapshot(model)
    calibration.restore()
    assert_same(snapshot(model), before)
    calibration.apply()
    assert_same(snapshot(model), after)
    keys = {key for key in before["state"] if not torch.equal(before["state"][key], after["state"][key])}
    assert keys <= {*calibration.after}
    assert {*calibration.before} <= {*before["state"]}


def test_a_population_older_than_its_weights_is_so_again() -> None:
    model = made("BLN").train()
    model(torch.randn(8, 4)).sum().backward()
    stale = [one.is_stale for one in model.modules() if isinstance(one, Population)]
    calibration = calibrate(model, batches_for(model))
    assert any(stale)
    assert not any(one.is_stale for one in model.modules() if isinstance(one, Population))
    calibration.restore()
    assert [one.is_stale for one in model.modules() if isinstance(one, Population)] == stale


@pytest.mark.filterwarnings("ignore:the population is computed batch by batch")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("at", [0, 1, 5, "evaluation"])
def test_after_an_error_all_is_as_before(name, at) -> None:
    model = made(name).train()
    before, calls = snapshot(model), 0

    def predict(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        evaluates = not any(one.training for one in model.modules())
        if evaluates if at == "evaluation" else calls > at:
            raise KeyError("mine")
        return model(batch)

    with pytest.raises(KeyError, match="mine"):
        calibrate(model, batches_for(model, 3.0), predict=predict)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_a_model_without_a_population_is_refused(model) -> None:
    with pytest.raises(ValueError, match="has no layer with a population"):
        calibrate(model, [torch.randn(8, 4)])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        calibrate(made("BLN"), [torch.randn(8, 4)], samples=0)
    with pytest.raises(ValueError, match="batches is a tensor"):
        calibrate(made("BLN"), torch.randn(8, 4))
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(made("BatchNorm"), [])


@pytest.mark.parametrize("name", MODELS)
def test_shuffled_samples_do_not_warn(name) -> None:
    assert warned(made(name), batches_for(made(name), 3.0)) == []


def test_few_samples_warn() -> None:
    model = made("both")
    (message,) = warned(model, batches_for(model, batches=6))
    assert "computed of 96 samples" in message
    assert warned(model, batches_for(model, batches=7)) == []


def clusters(size: int) -> tuple[Tensor, Tensor]:
    """Samples of five classes, in order."""
    torch.manual_seed(3)
    labels = torch.arange(5).repeat_interleave(size)
    return 2 * torch.randn(5, 4)[labels] + torch.randn(5 * size, 4), labels


@pytest.mark.parametrize("batch", [16, 64, 400])
@pytest.mark.parametrize("name", ["BatchNorm", "BLN", "both"])
def test_sorted_samples_warn_without_labels(name, batch) -> None:
    (message,) = warned(made(name), clusters(80)[0].split(batch))
    assert "samples come sorted: outputs" in message
    assert "shuffle" in message
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    assert warned(made(name), clusters(80)[0][order].split(batch)) == []


def test_sorted_labels_and_a_single_one_warn() -> None:
    x, y = torch.randn(400, 4), clusters(80)[1]
    model = made("both")
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    cases = {"sorted: labels": y, "have the label 2": torch.full_like(y, 2), "": y[order], " ": torch.full_like(y, -1)}
    for text, labels in cases.items():
        found = warned(model, [*zip(x.split(32), labels.split(32), strict=True)])
        assert len(found) == bool(text.strip())
        assert not found or text in found[0]


def test_a_loader_in_order_gives_random_samples_of_the_whole_data_set() -> None:
    x, y = clusters(200)
    model, other = made("BatchNorm"), made("BatchNorm")
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    assert warned(model, loader, samples=250) == []
    calibration = calibrate(other, loader, samples=250)
    assert calibration.samples == 250
    assert_same(snapshot(model), snapshot(other))
    assert len(warned(model, list(loader), samples=250)) == 1


def test_a_loader_that_shuffles_or_is_read_whole_is_read_as_it_is() -> None:
    x, y = clusters(60)

    def loader(shuffle: bool) -> DataLoader:
        return DataLoader(TensorDataset(x, y), 32, shuffle=shuffle, generator=torch.Generator().manual_seed(0))

    for shuffle in (True, False):
        model, other = made("BatchNorm"), made("BatchNorm")
        samples = 200 if shuffle else 300
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrate(model, loader(shuffle), samples=samples)
        recompute_population(other, loader(shuffle), samples=samples)
        assert_same(snapshot(model), snapshot(other))


def test_shifts_are_in_units_of_the_statistics_before() -> None:
    net = nn.BatchNorm1d(2)
    recompute_population(net, [torch.randn(400, 2) * 2])
    calibration = calibrate(net, [torch.randn(400, 2) * 4 + 6])
    (moved,) = calibration.shifts().values()
    assert moved.mean == pytest.approx(3, rel=0.15)
    assert moved.var == pytest.approx(4, rel=0.3)
    header, row = str(calibration).splitlines()
    assert header.split() == ["layer", "mean", "moved", "by", "variance", "times"]
    assert row.split() == ["model", f"{moved.mean:.2f}", f"{moved.var:.2f}"]


def test_a_table_names_layers_that_had_statistics_before() -> None:
    model = made("both")
    calibration = calibrate(model, batches_for(model, 3.0))
    assert list(calibration.shifts()) == ["1", "4"]
    empty = made("BLN", is_frozen=False)
    assert calibrate(empty, batches_for(empty)).shifts() == {}
