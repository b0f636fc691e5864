"""The population is that of the weights validated, and computing it leaves training unchanged."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics as tm
import zoo
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_bln import recompute_population
from lightning_bln.callbacks.weights import fingerprint
from lightning_bln.recomputation import populations

FROZEN = ("batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size")


def frozen(model: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(one, name).clone() for one in populations(model) for name in FROZEN]


def assert_frozen_equals(model: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    for found, value in zip(frozen(model), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)


class Stateful(zoo.Simple):
    """Draws random numbers and keeps metrics while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.3)
        self.train_acc = tm.Accuracy(task="multiclass", num_classes=zoo.CLASSES)
        self.steps: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out = self(self.dropout(x) + 0.01 * float(np.random.rand()) + 0.01 * random.random())  # noqa: NPY002
        self.train_acc(out, y)
        self.steps.append(batch_idx)
        self.log("train_acc", self.train_acc, on_epoch=True)
        return F.cross_entropy(out, y)


class Records(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(float(batch[0].sum()))


def train(with_callback: bool, generator: bool = False, **loader: Any) -> tuple[Any, ...]:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    model, records = Stateful(), Records()
    own = torch.Generator().manual_seed(7) if generator else None
    data = zoo.train_data(generator=own, **loader)
    callbacks = [zoo.chooser(), records] if with_callback else [records]
    trainer = zoo.trainer(*callbacks, max_epochs=2, val_check_interval=0.5)
    trainer.fit(model, data, zoo.val_data())
    return model, records.batches, trainer.callback_metrics["train_acc_epoch"]


@pytest.mark.parametrize(
    "options",
    [{}, {"generator": True}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}],
    ids=["plain", "own generator", "workers", "persistent workers"],
)
def test_training_is_bit_identical_with_and_without_the_callback(options: dict[str, Any]) -> None:
    alone, batches, accuracy = train(False, **options)
    drawn = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    watched, seen, same = train(True, **options)
    assert seen == batches
    assert torch.equal(accuracy, same)
    assert watched.steps == alone.steps
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(drawn[0], torch.rand(3))
    assert drawn[1:] == (np.random.rand(), random.random())  # noqa: NPY002


def test_recomputed_population_is_that_of_the_final_weights() -> None:
    model = zoo.Simple()
    data = zoo.train_data(shuffle=False)
    zoo.trainer(zoo.chooser(recompute_batches=3)).fit(model, data, zoo.val_data())
    found = frozen(model)
    recompute_population(model, data, predict=lambda batch: model(batch[0]), limit=3)
    assert_frozen_equals(model, found)


def test_stats_dataloader_takes_the_place_of_the_training_data() -> None:
    model, data = zoo.Simple(), DataLoader(zoo.make_data(60, 9), batch_size=20)
    zoo.fitted(model, zoo.chooser(stats_dataloader=data))
    found = frozen(model)
    recompute_population(model, data, predict=lambda batch: model(batch[0]), limit=2)
    assert_frozen_equals(model, found)


def test_epoch_population_is_what_the_epoch_gathered() -> None:
    class Gathers(pl.Callback):
        inputs: list = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.inputs.clear()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                self.inputs.append(pl_module.net[0](batch[0]))

    model, gathers = zoo.Simple(), Gathers()
    zoo.fitted(model, gathers, zoo.chooser(population="epoch"), max_epochs=2)
    everything = torch.cat(gathers.inputs)
    population = populations(model)[0]
    torch.testing.assert_close(population.batch_mean[0], everything.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(population.batch_var[0], everything.var(0), rtol=1e-5, atol=1e-5)


def test_population_follows_stochastic_weight_averaging() -> None:
    model, data = zoo.Simple(), zoo.train_data(shuffle=False)
    averaging = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    zoo.trainer(averaging, zoo.chooser(), max_epochs=4).fit(model, data, zoo.val_data())
    found = frozen(model)
    recompute_population(model, data, predict=lambda batch: model(batch[0]), limit=2)
    assert_frozen_equals(model, found)


def test_manual_optimisation_needs_a_step_of_its_own() -> None:
    with pytest.raises(MisconfigurationException, match="population_step\\(batch, batch_idx\\)"):
        zoo.fitted(zoo.ByHand(), zoo.chooser())
    zoo.fitted(zoo.ByHand(), zoo.chooser(population="epoch"))

    class WithStep(zoo.ByHand):
        def population_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    callback = zoo.chooser()
    zoo.fitted(WithStep(), callback)
    assert len(callback.history) == 1


def test_training_data_that_can_be_read_once_is_refused() -> None:
    batches = iter(list(zoo.train_data()))
    with pytest.raises(MisconfigurationException, match="can be read only once"):
        zoo.trainer(zoo.chooser()).fit(zoo.Simple(), batches, zoo.val_data())


def test_persistent_workers_of_a_loader_of_its_own_kind_are_refused() -> None:
    class Own(DataLoader):
        pass

    data = Own(zoo.make_data(64, 1), 16, num_workers=1, persistent_workers=True)
    with pytest.raises(MisconfigurationException, match="stats_dataloader="):
        zoo.trainer(zoo.chooser()).fit(zoo.Simple(), data, zoo.val_data())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fingerprint_misses_no_change(dtype: torch.dtype) -> None:
    flat = torch.randn(40, dtype=dtype)
    module = nn.ParameterList([torch.randn(5, 3, dtype=dtype), flat[1:8], torch.randn(4, 6, dtype=dtype).t(), flat[3]])
    before = fingerprint(module)
    assert fingerprint(module) == before
    for parameter in module:
        for place in range(parameter.numel()):
            value = parameter.data.reshape(-1)[place].item()
            index = torch.unravel_index(torch.tensor(place), parameter.shape)
            near = torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(9.0, dtype=dtype))
            parameter.data[index] = near
            assert fingerprint(module) != before
            parameter.data[index] = value
    assert fingerprint(module) == before
    assert fingerprint(nn.Identity()).parameters == {}


@pytest.mark.parametrize(
    ("options", "batches"), [({"limit_train_batches": 2}, 2), ({"overfit_batches": 1}, 1), ({}, 4)]
)
def test_the_population_is_that_of_the_data_trained_on(options: dict[str, Any], batches: int) -> None:
    data = zoo.make_data(32, 1)
    model = zoo.Simple(lr=0.0)
    zoo.trainer(zoo.chooser(recompute_batches=None), **options).fit(model, DataLoader(data, 8), zoo.val_data())
    alone = deepcopy(model)
    recompute_population(alone, [batch for _, batch in zip(range(batches), DataLoader(data, 8), strict=False)])
    for one, other in zip(populations(model), populations(alone), strict=True):
        torch.testing.assert_close(one.batch_mean, other.batch_mean)


class Chunks(zoo.Simple):
    """Numbers its batches, as one does that carries a state."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([batch[0] + 10 * batch_idx, *batch[1:]], batch_idx)


def test_a_step_that_tells_batches_apart_gets_them_one_by_one() -> None:
    data = zoo.make_data(32, 1)
    model = Chunks(lr=0.0)
    with pytest.warns(UserWarning, match="batch by batch"):
        zoo.trainer(zoo.chooser(recompute_batches=None), max_epochs=1).fit(model, DataLoader(data, 8), zoo.val_data())
    alone = deepcopy(model)
    shifted = [[batch[0] + 10 * index, *batch[1:]] for index, batch in enumerate(DataLoader(data, 8))]
    recompute_population(alone, shifted, samples=None)
    for one, other in zip(populations(model), populations(alone), strict=True):
        torch.testing.assert_close(one.batch_mean, other.batch_mean)


@pytest.mark.parametrize("population", ["recompute", "epoch"])
def test_a_second_fit_computes_the_population_of_its_own_data(population: str) -> None:
    callback = zoo.chooser(population=population, recompute_batches=None)
    for seed in (1, 2):
        data, model = zoo.make_data(32, seed), zoo.Simple(lr=0.0)
        zoo.trainer(callback, max_epochs=1).fit(model, DataLoader(data, 8), zoo.val_data())
        alone = deepcopy(model)
        recompute_population(alone, [*DataLoader(data, 8)], samples=None if population == "epoch" else 1024)
        for one, other in zip(populations(model), populations(alone), strict=True):
            torch.testing.assert_close(one.batch_mean, other.batch_mean)
