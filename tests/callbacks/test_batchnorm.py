"""Batch norms of torch under the callback: statistics of the weights validated, training untouched, what it brought."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import zoo
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_bln import BatchLayerNorm, recompute_population
from lightning_bln.callbacks.comparison import AVERAGES, COMPUTED
from lightning_bln.callbacks.running_averages import Running, RunningAverages
from lightning_bln.recomputation import populations

try:
    from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
except ImportError:  # before lightning 2.6
    EMAWeightAveraging = None

WIDTH = 8


def batch_norm_first(second: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(zoo.FEATURES, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        second(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, zoo.CLASSES),
    )


class Normed(zoo.Simple):
    """A batch norm, and behind it another or a BLN layer; copies what it validates, and the averages it trains from."""

    def __init__(self, second: Callable[[int], nn.Module] = nn.BatchNorm1d, lr: float = 0.2) -> None:
        super().__init__(lr=lr)
        self.net = batch_norm_first(second)
        self.validated: list[nn.Module] = []
        self.trained_from: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if torch.is_grad_enabled():
            self.trained_from.append([one.clone() for one in running(self)])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated = [*self.validated, copy.deepcopy(self.net)]
        return super().validation_step(batch, batch_idx)


class Mixed(Normed):
    def __init__(self) -> None:
        super().__init__(lambda width: BatchLayerNorm(width, scale=False))


BOTH = pytest.mark.parametrize("make", [Normed, Mixed])


def running(model: nn.Module) -> list[Tensor]:
    """Every running statistic in a model."""
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm1d)]
    return [value for one in norms for value in (one.running_mean, one.running_var) if value is not None]


def by_hand(net: nn.Module) -> list[Tensor]:
    """Moments of the inputs of a network's batch norms on all training samples together, in float64."""
    layers, found = copy.deepcopy(net).double(), []
    x = zoo.train_data(shuffle=False).dataset.tensors[0].double()  # type: ignore[attr-defined]
    with torch.no_grad():
        for layer in layers.children():
            if isinstance(layer, nn.BatchNorm1d):
                found += [x.mean(0), x.var(0)]
                x = (x - x.mean(0)) / (x.var(0, correction=0) + layer.eps).sqrt() * layer.weight + layer.bias
            elif isinstance(layer, BatchLayerNorm):
                break
            else:
                x = layer(x)
    return found


def assert_statistics_of(net: nn.Module) -> None:
    expected = by_hand(net)
    assert expected
    for one, other in zip(running(net), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    if not populations(net):
        return
    alone = copy.deepcopy(net)
    recompute_population(alone, zoo.train_data(shuffle=False))
    for one, other in zip(populations(net), populations(alone), strict=True):
        torch.testing.assert_close(one.batch_mean, other.batch_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.batch_var, other.batch_var, rtol=1e-4, atol=1e-5)


def fit(model: Any, *callbacks: Any, **options: Any) -> Any:
    trainer = zoo.trainer(*callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 0, **options})
    trainer.fit(model, zoo.train_data(shuffle=False), zoo.val_data())
    return trainer


def chooser(**options: Any) -> Any:
    return zoo.chooser(**{"recompute_batches": None, **options})


def trained(make: Callable[[], Any], *callbacks: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = make()
    fit(model, *callbacks, **options)
    return model


@pytest.mark.parametrize("batchnorm", [True, "validate"])
@pytest.mark.parametrize("interval", [1.0, 2])
@BOTH
def test_statistics_are_those_of_the_weights_validated(make: Any, interval: float, batchnorm: Any) -> None:
    model = trained(make, chooser(batchnorm=batchnorm), val_check_interval=interval)
    assert len(model.validated) == (2 if interval == 1.0 else 4)
    for net in [*model.validated, model.net]:
        assert_statistics_of(net)


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(one, two) for one, two in zip(some, others, strict=True))


@pytest.mark.exact
@pytest.mark.parametrize("batchnorm", [True, "validate", False])
@pytest.mark.parametrize("compare", [True, False])
@BOTH
def test_training_is_the_same_bit_for_bit(make: Any, batchnorm: Any, compare: bool) -> None:
    if make is Normed and batchnorm is False:
        pytest.skip("refused")
    alone = trained(make, max_epochs=3)
    drawn = torch.rand(3)
    watched = trained(make, chooser(batchnorm=batchnorm, compare=compare), max_epochs=3)
    assert torch.equal(torch.rand(3), drawn)
    assert equal(list(alone.parameters()), list(watched.parameters()))
    counts = [one.num_batches_tracked for model in (alone, watched) for one in model.net if hasattr(one, "momentum")]
    assert len({int(one) for one in counts if one is not None}) == 1
    same = [equal(*pair) for pair in zip(alone.trained_from, watched.trained_from, strict=True)]
    assert all(same) if batchnorm in ("validate", False) else not all(same)
    assert equal(running(alone), running(watched)) is (batchnorm is False)


def test_a_model_of_batch_norms_alone_keeps_keys_and_classes() -> None:
    model = trained(Normed, chooser())
    plain = batch_norm_first(nn.BatchNorm1d)
    plain.load_state_dict(model.net.state_dict())
    assert equal(running(plain), running(model.net))
    assert [type(one) for one in model.net] == [type(one) for one in plain]


def test_the_comparison_is_that_of_two_validations(capsys: pytest.CaptureFixture[str]) -> None:
    choose = chooser()
    torch.manual_seed(0)
    model = Normed()
    trainer = fit(model, choose, max_epochs=1)
    alone = trained(Normed, max_epochs=1)
    (before,) = zoo.trainer().validate(alone, zoo.val_data(), verbose=False)
    (after,) = zoo.trainer().validate(model, zoo.val_data(), verbose=False)
    assert choose.comparison is not None
    assert choose.comparison.rows == {
        AVERAGES: {"val_loss": pytest.approx(before["val_loss"])},
        COMPUTED: {"val_loss": pytest.approx(after["val_loss"])},
    }
    assert before["val_loss"] != pytest.approx(after["val_loss"], rel=1e-3)
    metrics = trainer.callback_metrics
    assert float(metrics["val_loss"]) == pytest.approx(after["val_loss"])
    assert float(metrics["bln/val_loss/running_averages"]) == pytest.approx(before["val_loss"])
    assert choose.result is None
    assert choose.comparison.epoch == 0
    lines = str(choose.comparison).splitlines()
    assert [line.split()[0] for line in lines] == ["running", "val_loss"]


def test_the_mode_that_was_chosen_has_a_row_and_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    choose = chooser(verbose=True)
    trained(Mixed, choose)
    assert choose.comparison is not None
    assert choose.result is not None
    assert [*choose.comparison.rows] == [AVERAGES, COMPUTED, f"mode {choose.result.chosen}"]
    assert choose.comparison.rows[COMPUTED]["val_loss"] == choose.result.scores[choose.result.incumbent]["val_loss"]
    printed = capsys.readouterr().out
    assert AVERAGES in printed
    assert COMPUTED in printed


def test_files_and_state_have_the_comparison(tmp_path: Path) -> None:
    choose = chooser(save_dir=tmp_path)
    trained(Normed, choose)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bln_comparison.json"]
    other = chooser()
    other.load_state_dict(choose.state_dict())
    assert choose.comparison is not None
    assert other.comparison == choose.comparison


@pytest.mark.parametrize("logged", ["step", "epoch end", "nowhere"])
def test_metrics_need_not_be_the_monitored_one(logged: str) -> None:
    class Logs(Normed):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.losses = [*getattr(self, "losses", []), loss.detach()]
            if logged == "step":
                self.log("other", loss)

        def on_validation_epoch_end(self) -> None:
            if logged == "epoch end":
                self.log("val_loss", torch.stack(self.losses).mean())
            self.losses = []

    choose = chooser()
    trained(Logs, choose, max_epochs=1)
    if logged == "nowhere":
        assert choose.comparison is None
        return
    assert choose.comparison is not None
    name = {"step": ["other"], "epoch end": ["val_loss"]}[logged]
    assert [[*row] for row in choose.comparison.rows.values()] == [name, name]
    before, after = (row[name[0]] for row in choose.comparison.rows.values())
    assert before != pytest.approx(after, rel=1e-4)


@pytest.mark.exact
@pytest.mark.parametrize("batchnorm", [True, "validate"])
@BOTH
def test_checkpoints(tmp_path: Path, make: Any, batchnorm: Any) -> None:
    """At the end of a validation they hold the statistics computed, amid training what trains; both resume."""
    savers = [
        ModelCheckpoint(tmp_path, filename="validated", save_on_train_epoch_end=False),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1),
    ]
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 3}
    straight = trained(make, chooser(batchnorm=batchnorm), *savers, **options)
    validated = torch.load(tmp_path / "validated.ckpt", weights_only=True)["state_dict"]
    amid = torch.load(tmp_path / "step=7.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(validated["net.1.running_mean"], running(straight)[0])
    assert torch.equal(amid["net.1.running_mean"], straight.trained_from[7][0])
    if zoo.IS_OLDEST:
        return  # lightning 2.3 repeats an epoch that ended before the checkpoint
    for name in ("step=4", "step=8"):
        torch.manual_seed(1)
        resumed = make()
        trainer = zoo.trainer(chooser(batchnorm=batchnorm), max_epochs=3, num_sanity_val_steps=0)
        trainer.fit(resumed, zoo.train_data(shuffle=False), zoo.val_data(), ckpt_path=tmp_path / f"{name}.ckpt")
        after = straight.trained_from[-len(resumed.trained_from) :]
        same = all(equal(*pair) for pair in zip(after, resumed.trained_from, strict=True))
        assert same or batchnorm is True  # a run that resumes after an epoch leaves out the validation at its end
        for key, value in straight.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[key]), key


class SwitchedSGD(torch.optim.SGD):
    """Averages its weights, and exchanges them in ``eval`` and ``train``, as ScheduleFree's optimizers do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.averages = [one.detach().clone() for one in self.param_groups[0]["params"]]
        self.is_training = True

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for average, one in zip(self.averages, self.param_groups[0]["params"], strict=True):
                average.lerp_(one, 0.2)
        return loss

    def switch(self, is_training: bool) -> None:
        if self.is_training != is_training:
            self.is_training = is_training
            with torch.no_grad():
                for average, one in zip(self.averages, self.param_groups[0]["params"], strict=True):
                    kept = one.clone()
                    one.copy_(average)
                    average.copy_(kept)


class Switched(Mixed):
    def configure_optimizers(self) -> Any:
        return SwitchedSGD(self.parameters(), lr=self.lr)

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers().optimizer.switch(is_training=False)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.optimizers().optimizer.switch(is_training=True)

    def on_train_end(self) -> None:
        self.optimizers().optimizer.switch(is_training=False)


class CopiedEMA(pl.Callback):
    """Keeps an average as a state dict, buffers among it, and validates with it."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.average = {name: value.clone() for name, value in module.state_dict().items() if value.is_floating_point()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        state = module.state_dict()
        for name, value in self.average.items():
            if ".population." not in name:
                value.lerp_(state[name], 0.3)

    def exchange(self, module: Any) -> None:
        state = module.state_dict()
        for name, value in self.average.items():
            if ".population." not in name:
                kept = state[name].clone()
                state[name].copy_(value)
                value.copy_(kept)

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.exchange(module)

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.exchange(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.exchange(module)


AVERAGED: dict[str, Callable[[], tuple[Any, list[Any]]]] = {
    "SWA": lambda: (Mixed, [StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)]),
    "EMA by a callback": lambda: (Mixed, [CopiedEMA()]),
    "switching optimizer": lambda: (Switched, []),
}
if EMAWeightAveraging is not None:
    AVERAGED["EMA"] = lambda: (Mixed, [EMAWeightAveraging(decay=0.8)])
    AVERAGED["EMA, buffers copied"] = lambda: (Mixed, [EMAWeightAveraging(decay=0.8, use_buffers=False)])


@pytest.mark.exact
@pytest.mark.parametrize("batchnorm", [True, "validate"])
@pytest.mark.parametrize("case", AVERAGED)
def test_averaged_weights_have_statistics_of_their_own(case: str, batchnorm: Any, tmp_path: Path) -> None:
    make, others = AVERAGED[case]()
    saver = ModelCheckpoint(tmp_path, save_on_train_epoch_end=False, filename="validated")
    choose = chooser(batchnorm=batchnorm, candidates=["ppcc"], compare=False)
    options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
    model = trained(make, *others, choose, saver, **options)
    for net in model.validated:
        assert_statistics_of(net)
    assert_statistics_of(model.net)
    saved = torch.load(tmp_path / "validated.ckpt", weights_only=False)["state_dict"]  # SWA's state has a function
    if case in ("SWA", "EMA", "EMA, buffers copied"):
        net = copy.deepcopy(model.net)
        net.load_state_dict({name[4:]: value for name, value in saved.items() if name.startswith("net.")})
        assert_statistics_of(net)
    make, others = AVERAGED[case]()
    # a population keeps its place: without a callback WeightAveraging exchanges those of BLN layers by shape
    alone = trained(make, *others, chooser(batchnorm=False, candidates=["ppcc"]), max_epochs=4)
    assert equal(list(alone.parameters()), list(model.parameters()))
    if batchnorm == "validate":
        assert all(equal(*pair) for pair in zip(alone.trained_from, model.trained_from, strict=True))


def test_an_averaged_model_inside_the_module() -> None:
    class Inside(Mixed):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.7))

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.update_parameters(self.net)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.log("val_loss", nn.functional.cross_entropy(self.average(batch[0]), batch[1]))

        def population_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])
            self.average(batch[0])

    model = trained(Inside, chooser())
    assert_statistics_of(model.average.module)
    assert_statistics_of(model.net)
    assert not torch.equal(running(model.net)[0], running(model.average)[0])


def test_a_norm_that_sleeps_or_that_nothing_calls_keeps_its_statistics() -> None:
    class Parts(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.BatchNorm1d(WIDTH)
            self.net[1].eval()

        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    choose = chooser()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = trained(Parts, choose)
    sentences = " ".join(str(one.message) for one in said)
    assert "net.1 is in evaluation mode while the model trains" in sentences
    assert "unused gathered no statistics" in sentences
    before = nn.BatchNorm1d(WIDTH)
    for norm in (model.net[1], model.unused):
        assert torch.equal(norm.running_mean, before.running_mean)
        assert torch.equal(norm.running_var, before.running_var)
    assert not torch.equal(model.net[4].running_mean, before.running_mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchnorm": False}, "batchnorm=True"),
        ({"population": "epoch"}, "population='recompute'"),
    ],
)
def test_batch_norms_that_are_left_alone_leave_nothing_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trained(Normed, chooser(**options))


@pytest.mark.parametrize("make", [nn.Identity, lambda width: nn.BatchNorm1d(width, track_running_stats=False)])
def test_a_model_with_neither_is_refused(make: Any) -> None:
    class Plain(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.net[1], self.net[4] = make(8), make(8)

    with pytest.raises(MisconfigurationException, match="no layer with a statistics mode, so there is nothing"):
        fit(Plain(), chooser())


@pytest.mark.parametrize("value", ["train", 1, None])
def test_an_unknown_batchnorm_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"batchnorm=.*True, False or 'validate'"):
        zoo.chooser(batchnorm=value)


@pytest.mark.parametrize("compare", [True, False])
def test_the_comparison_costs_a_second_step(compare: bool) -> None:
    steps: list[int] = []

    class Counts(Normed):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            steps.append(batch_idx)
            return super().validation_step(batch, batch_idx)

    trained(Counts, chooser(compare=compare), max_epochs=1)
    assert sorted(steps) == [0, 0, 1, 1, 2, 2] if compare else [0, 1, 2]


@pytest.mark.exact
@pytest.mark.parametrize("batchnorm", [True, "validate"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_that_is_refreshed_holds_both(tmp_path: Path, batchnorm: Any, weights_only: bool) -> None:
    """The statistics of its weights, and with ``"validate"`` the averages that training goes on from."""
    saver = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only
    )
    choose = chooser(batchnorm=batchnorm, refresh_on_save=True)
    straight = trained(Normed, choose, saver, enable_checkpointing=True, max_epochs=3)
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    net = batch_norm_first(nn.BatchNorm1d)
    net.load_state_dict({name[4:]: value for name, value in saved["state_dict"].items()})
    assert_statistics_of(net)
    if weights_only:
        return
    torch.manual_seed(1)
    resumed = Normed()
    trainer = zoo.trainer(chooser(batchnorm=batchnorm), max_epochs=3, num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*resumed from a checkpoint that ended before.*")
        trainer.fit(resumed, zoo.train_data(shuffle=False), zoo.val_data(), ckpt_path=tmp_path / "step=6.ckpt")
    first = choose.state_dict()
    assert "running_averages" not in first  # nothing waits at the end
    if batchnorm == "validate":
        before = straight.trained_from[6]
        assert equal(resumed.trained_from[0], before)
    else:
        assert_equal_to_statistics(resumed.trained_from[0], net)


def assert_equal_to_statistics(found: list[Tensor], net: nn.Module) -> None:
    assert equal(found, running(net))


@pytest.mark.exact
@pytest.mark.parametrize("batchnorm", [True, "validate"])
def test_a_fit_that_fails_in_a_validation_leaves_nothing_behind(batchnorm: Any) -> None:
    class Fails(Normed):
        fails = True

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if self.fails and self.current_epoch == 1 and batch_idx == 1:
                raise KeyError("on purpose")
            return super().validation_step(batch, batch_idx)

    choose = chooser(batchnorm=batchnorm)
    with pytest.raises(KeyError, match="on purpose"):
        trained(Fails, choose)

    class Wide(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(zoo.FEATURES, 3), nn.Identity(), nn.ReLU(), nn.BatchNorm1d(3))

    zoo.trainer(choose).validate(Wide(), zoo.val_data(), verbose=False)
    other = trained(Wide, choose)
    plain = trained(Wide)
    assert equal(list(other.parameters()), list(plain.parameters()))


def test_an_exception_and_a_fit_that_goes_on_trains_from_its_averages() -> None:
    class Fails(Normed):
        fails = True

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if self.fails and self.current_epoch == 1:
                raise KeyError("on purpose")
            return super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Fails()
    trainer = zoo.trainer(chooser(batchnorm="validate"), max_epochs=3, num_sanity_val_steps=0)
    with pytest.raises(KeyError, match="on purpose"):
        trainer.fit(model, zoo.train_data(shuffle=False), zoo.val_data())
    model.fails = False
    model.train()
    trainer.fit(model, zoo.train_data(shuffle=False), zoo.val_data())
    alone = trained(Normed, max_epochs=3)
    # the batch at which it failed is counted as done, so that steps are the same ones
    assert all(equal(*pair) for pair in zip(alone.trained_from, model.trained_from, strict=False))


@pytest.mark.parametrize("to", ["device and dtype", "another size"])
def test_averages_go_where_the_layer_is(to: str) -> None:
    averages, model = RunningAverages(), nn.Sequential(nn.BatchNorm1d(3))
    computed = Running(torch.ones(3), torch.full((3,), 2.0))
    trained = Running.of(model[0])
    averages.replace(model, {"0": computed})
    if to == "another size":
        model[0] = nn.BatchNorm1d(5)
        averages.put_back(model)
        assert torch.equal(model[0].running_mean, torch.zeros(5))
        return
    model.to(torch.bfloat16)
    averages.put_back(model)
    assert torch.equal(model[0].running_mean, trained.mean.bfloat16())


def test_averages_that_were_replaced_twice() -> None:
    """Without training between, those of training are kept; after training, those it left then."""
    averages, norm = RunningAverages(), nn.BatchNorm1d(3)
    model, trained = nn.Sequential(norm), Running.of(norm)
    for value in (1.0, 2.0):
        averages.replace(model, {"0": Running(torch.full((3,), value), torch.ones(3))})
        assert torch.equal(averages.kept["0"].trained.mean, trained.mean)
    norm(torch.randn(8, 3) + 5)
    left = Running.of(norm)
    averages.replace(model, {"0": Running(torch.full((3,), 9.0), torch.ones(3))})
    assert torch.equal(averages.kept["0"].trained.mean, left.mean)
    averages.put_back(model)
    assert torch.equal(norm.running_mean, left.mean)
    assert not averages.kept


def test_hooks_at_the_start_of_an_epoch_see_the_averages() -> None:
    class Sees(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[Tensor]] = []

        def on_train_epoch_start(self) -> None:
            self.seen.append([one.clone() for one in running(self)])

    alone = trained(Sees, max_epochs=3)
    watched = trained(Sees, chooser(batchnorm="validate"), max_epochs=3)
    assert all(equal(*pair) for pair in zip(alone.seen, watched.seen, strict=True))


@pytest.mark.exact
def test_norms_that_training_freezes_or_reads_train_alike_with_validate() -> None:
    class Freezes(Normed):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                self.net[1].eval()

    class Reads(Normed):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net.eval()
            with torch.no_grad():
                guessed = self.net(batch[0]).argmax(1)
            self.net.train()
            return super().training_step([batch[0], guessed], batch_idx)

    for make in (Freezes, Reads):
        alone, watched = trained(make, max_epochs=3), trained(make, chooser(batchnorm="validate"), max_epochs=3)
        assert equal(list(alone.parameters()), list(watched.parameters()))


def test_weights_that_stay_are_not_computed_again(counted: list[int]) -> None:
    trained(Normed, chooser())
    assert counted == [4, 8]  # and not at the end once more


def test_a_module_that_evaluates_after_training_hears_nothing() -> None:
    class Evaluates(Normed):
        def on_train_end(self) -> None:
            self.eval()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = trained(Evaluates, chooser())
    assert not [one for one in said if "evaluation mode while" in str(one.message)]
    assert_statistics_of(model.net)


def test_a_momentum_encoder_is_named() -> None:
    class Encoder(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.net)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                for one, other in zip(self.target.parameters(), self.net.parameters(), strict=True):
                    one.lerp_(other, 0.5)
                self.target(batch[0])
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="training_step writes into target"):
        trained(Encoder, chooser(), max_epochs=1)


@pytest.mark.parametrize("batchnorm", [True, "validate"])
def test_a_part_that_is_compiled(batchnorm: Any) -> None:
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("a graph of torch before 2.6 cannot be left out")

    class Compiled(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.plain = [self.net]
            self.net = torch.compile(self.net, backend="eager")

    model = trained(Compiled, chooser(batchnorm=batchnorm), max_epochs=3)
    assert_statistics_of(model.plain[0])
