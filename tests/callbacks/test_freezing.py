"""The population is that of the weights validated, of the layers that train, and frozen as often as weights move."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import zoo
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from torch import nn
from torch.nn.utils import prune

from lightning_bln import BatchLayerNorm, recompute_population
from lightning_bln.callbacks.weights import fingerprint
from lightning_bln.recomputation import populations

FROZEN = ("batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size")


def assert_own_population(model: Any) -> None:
    """The population of ``model`` is that of its weights as they are."""
    alone = deepcopy(model)
    if alone._trainer is not None:
        alone._trainer = None
    data = zoo.train_data(shuffle=False)
    recompute_population(alone, data, predict=lambda batch: alone(batch[0]))
    for one, other in zip(populations(model), populations(alone), strict=True):
        for name in FROZEN:
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5, msg=name)


class Watching(zoo.Simple):
    """Copies itself in its first validation step of each validation."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(lr=lr)
        self.kept: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            trainer, self._trainer = self._trainer, None
            kept, self.kept = self.kept, []
            self.kept = [*kept, deepcopy(self)]
            self._trainer = trainer
        return super().validation_step(batch, batch_idx)


def scale(module: Any, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.net.parameters():
            parameter.mul_(factor)


def swapping(start: str, end: str) -> type:
    """A module that validates other weights, exchanged in hooks of its own, as ScheduleFree's optimizer does."""

    def swap(self: Any, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            scale(self, 2.0)

    def back(self: Any, *_: Any) -> None:
        if not self.trainer.sanity_checking:
            scale(self, 0.5)

    return type("Swapping", (Watching,), {start: swap, end: back})


class Swaps(pl.Callback):
    """The same in a callback, which comes after others."""

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        scale(module, 2.0)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        scale(module, 0.5)


CASES: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "nothing": lambda: (Watching(), []),
    "on_validation_start": lambda: (swapping("on_validation_start", "on_validation_end")(), []),
    "on_validation_epoch_start": lambda: (swapping("on_validation_epoch_start", "on_validation_epoch_end")(), []),
    "on_validation_model_eval": lambda: (swapping("on_validation_start", "on_validation_epoch_end")(), []),
    "callback": lambda: (Watching(), [Swaps()]),
    "average": lambda: (Watching(), [EMAWeightAveraging(decay=0.8)]),
    "average and module": lambda: (
        swapping("on_validation_epoch_start", "on_validation_epoch_end")(),
        [EMAWeightAveraging(decay=0.8)],
    ),
}


@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_population_is_that_of_the_weights_validated(case: str, interval: float) -> None:
    model, callbacks = CASES[case]()
    choose = zoo.chooser(candidates=["ppcc"], recompute_batches=None)
    trainer = zoo.trainer(choose, *callbacks, max_epochs=2, val_check_interval=interval, num_sanity_val_steps=0)
    trainer.fit(model, zoo.train_data(shuffle=False), zoo.val_data())
    assert len(model.kept) == (2 if interval == 1.0 else 4)
    for kept in model.kept:
        assert_own_population(kept)


class Buffered(Watching):
    """A norm whose buffers move without a step of the optimizer, and an accumulator."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.net.insert(0, nn.BatchNorm1d(zoo.FEATURES))
        self.register_buffer("total", torch.zeros(()))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.total += batch[0].sum()
        return super().validation_step(batch, batch_idx)


def test_buffers_count_and_accumulators_do_not(counted: list[int]) -> None:
    model = Buffered()
    zoo.trainer(zoo.chooser(candidates=["ppcc"], recompute_batches=None), max_epochs=3).fit(
        model, zoo.train_data(shuffle=False), zoo.val_data()
    )
    assert counted == [4, 8, 12]
    for kept in model.kept:
        assert_own_population(kept)


def test_weights_that_stay_are_not_recomputed(counted: list[int]) -> None:
    zoo.trainer(zoo.chooser(candidates=["ppcc"]), max_epochs=3).fit(Watching(lr=0.0), zoo.train_data(), zoo.val_data())
    assert counted == [4]


def test_a_validation_without_batches_freezes_nothing(counted: list[int]) -> None:
    model = Watching()
    zoo.trainer(zoo.chooser(), max_epochs=2, limit_val_batches=0).fit(model, zoo.train_data(shuffle=False))
    assert counted == [8]


def swap_weights(model: Any) -> None:
    first, second = model.net[1].weight, model.net[4].weight
    first.data, second.data = second.data.clone(), first.data.clone()


def exchange(model: Any) -> None:
    model.net[2] = nn.GELU()


def turn_round(model: Any) -> None:
    model.net[0].weight.data = model.net[0].weight.data.flip(0)


def replace_layer(model: Any) -> None:
    model.net[1] = BatchLayerNorm(8, scale=False)


def mask(model: Any) -> None:
    model.net[3].weight_mask = 1.0 - model.net[3].weight_mask


def fill(model: Any) -> None:
    model.net[3].bias.data[2] += 1e-3


@pytest.mark.parametrize("change", [swap_weights, exchange, turn_round, replace_layer, mask, fill])
def test_what_moves_a_population_is_seen(change: Callable[[Any], None]) -> None:
    model = zoo.Simple()
    with torch.no_grad():
        model.net[1].weight.uniform_(1, 2)
    prune.random_unstructured(model.net[3], "weight", 0.5)
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


def test_pruning_at_the_end_of_training_moves_the_population() -> None:
    model = zoo.Simple()
    pruning = ModelPruning("l1_unstructured", [(model.net[0], "weight")], amount=0.5, use_global_unstructured=True)
    zoo.trainer(pruning, zoo.chooser(recompute_batches=None), max_epochs=2).fit(
        model, zoo.train_data(shuffle=False), zoo.val_data()
    )
    assert_own_population(model)


class Parts(zoo.Simple):
    """Parts that training does not run, runs late, or holds in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(nn.Linear(zoo.FEATURES, 4), BatchLayerNorm(4))
        self.late = nn.Sequential(nn.Linear(zoo.FEATURES, zoo.CLASSES), BatchLayerNorm(zoo.CLASSES))
        self.asleep = nn.Sequential(nn.Linear(zoo.FEATURES, zoo.FEATURES), BatchLayerNorm(zoo.FEATURES))
        for part in (self.unused, self.asleep):
            recompute_population(part, [torch.randn(8, zoo.FEATURES)])

    def on_train_epoch_start(self) -> None:
        self.asleep.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self(self.asleep(batch[0]))
        if self.current_epoch > 0:
            out = out + self.late(batch[0])
        return F.cross_entropy(out, batch[1])


@pytest.mark.parametrize("population", ["recompute", "epoch"])
def test_layers_that_do_not_train_keep_their_population_and_are_named_once(population: str) -> None:
    model = Parts()
    before = [deepcopy(populations(part)[0]) for part in (model.unused, model.asleep)]
    seen: list[bool] = []

    class Looks(pl.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            seen.append(populations(module.late)[0].is_frozen)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        zoo.fitted(model, zoo.chooser(population=population), Looks(), max_epochs=3, num_sanity_val_steps=0)
    for part, kept in zip((model.unused, model.asleep), before, strict=True):
        for name in FROZEN:
            assert torch.equal(getattr(populations(part)[0], name), getattr(kept, name))
    assert seen == [False, True, True]
    said = [
        str(one.message)
        for one in caught
        if "gathered no statistics" in str(one.message) or "keeps the statistics" in str(one.message)
    ]
    assert len(said) == 2, said
    assert sum("asleep.1 is in evaluation mode" in one for one in said) == 1
    assert sum("unused.1.population" in one and "late.1.population" in one for one in said) == 1
    assert all(populations(model.net)[place].is_frozen for place in (0, 1))


def test_a_model_whose_layers_all_sleep_keeps_every_population() -> None:
    class Asleep(zoo.Simple):
        def on_train_epoch_start(self) -> None:
            self.net.eval()

    model = Asleep()
    recompute_population(model, zoo.train_data())
    before = [getattr(one, name).clone() for one in populations(model) for name in FROZEN]
    with pytest.warns(UserWarning, match="is in evaluation mode while the model trains"):
        zoo.fitted(model, zoo.chooser(), max_epochs=2)
    assert all(map(torch.equal, before, [getattr(one, name) for one in populations(model) for name in FROZEN]))


@pytest.mark.parametrize("average", [None, "ema", "swa"])
@pytest.mark.parametrize("make", [zoo.Simple, zoo.ByHand, Parts])
def test_the_epochs_population_is_never_recomputed(make: Any, average: str | None, counted: list[int]) -> None:
    callback = zoo.chooser(population="epoch")
    for _ in range(2):
        others: dict[Any, list[Any]] = {
            None: [],
            "ema": [EMAWeightAveraging(decay=0.8)],
            "swa": [] if make is zoo.ByHand else [StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)],
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zoo.fitted(make(), callback, *others[average], max_epochs=3)
        said = [str(one.message) for one in caught if "set population='recompute'" in str(one.message)]
        assert len(said) == (1 if others[average] else 0), said
    assert counted == []
    assert len(callback.history) == 3


def test_a_second_fit_that_chooses_nothing_reports_nothing(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    callback = zoo.chooser(verbose=True, save_dir=tmp_path)
    zoo.fitted(zoo.Simple(), callback)
    assert callback.result is not None
    assert "val_loss" in capsys.readouterr().out
    for path in tmp_path.iterdir():
        path.unlink()
    zoo.fitted(zoo.Simple(), callback, limit_val_batches=0)
    assert capsys.readouterr().out.count("val_loss") == 0
    assert list(tmp_path.iterdir()) == []
    assert (callback.result, callback.history) == (None, [])


def test_a_fit_that_goes_on_keeps_its_history() -> None:
    callback, model = zoo.chooser(), zoo.Simple()
    trainer = zoo.fitted(model, callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, zoo.train_data(), zoo.val_data())
    assert [epoch for epoch, *_ in callback.history] == [0, 1]
