"""When the callback chooses and when it keeps its hands off; what it refuses."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import zoo
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_bln import ALL_MODES, set_mode
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.modes import mode_layers


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"barebones": True}])
def test_no_choice_without_validation(options: dict[str, Any]) -> None:
    model, callback = zoo.Simple(), zoo.chooser()
    if "barebones" in options:
        trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[callback])
        trainer.fit(model, zoo.train_data(), zoo.val_data())
    else:
        zoo.fitted(model, callback, **options)
    assert callback.result is None
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}


def test_sanity_check_chooses_nothing_and_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    class Stops(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True
            assert callback.result is None

    model, callback = zoo.Simple(), zoo.chooser()
    zoo.fitted(model, callback, Stops(), num_sanity_val_steps=2, limit_train_batches=1)
    assert not [warning for warning in recwarn if "needs a population" in str(warning.message)]


def test_fast_dev_run_chooses() -> None:
    callback = zoo.chooser()
    zoo.fitted(zoo.Simple(), callback, fast_dev_run=2)
    assert len(callback.history) == 1


def test_a_quarter_of_an_epoch() -> None:
    callback = zoo.chooser()
    zoo.fitted(zoo.Simple(), callback, max_epochs=2, val_check_interval=0.25)
    assert len(callback.history) == 8


def test_every_second_epoch() -> None:
    callback = zoo.chooser(every_n_epochs=2)
    zoo.fitted(zoo.Simple(), callback, max_epochs=4)
    assert [epoch for epoch, *_ in callback.history] == [1, 3]


def test_candidates_limit_the_choice_and_the_table() -> None:
    callback = zoo.chooser(candidates="batch_independent")
    zoo.fitted(zoo.Simple(), callback)
    assert callback.result is not None
    assert set(callback.result.scores) == {"pppp", "pppc", "ppcp", "ppcc"}
    model, callback = zoo.Simple(), zoo.chooser(candidates=["cccc"])
    zoo.fitted(model, callback)
    assert callback.result is not None
    assert set(callback.result.scores) == {"cccc", "ppcc"}
    assert callback.result.chosen == "cccc"
    assert {layer.mode for layer in mode_layers(model)} == {"cccc"}


def test_a_missing_monitor_is_an_error_that_lists_what_is_there() -> None:
    model = zoo.Simple()
    with pytest.raises(MisconfigurationException, match="monitor='nope', but the validation logged val_loss;"):
        zoo.fitted(model, zoo.chooser("nope"))
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}


class ByMode(zoo.Simple):
    """Logs what the test says for the mode it is in."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val_loss", self.values.get(str(mode_layers(self)[0].mode), math.nan))


def test_nan_never_wins() -> None:
    callback = zoo.chooser()
    zoo.fitted(ByMode({"pccp": 3.0, "cccp": 2.0}), callback)
    assert callback.result is not None
    assert callback.result.chosen == "cccp"


def test_nan_everywhere_keeps_the_incumbent() -> None:
    model, callback = ByMode({}), zoo.chooser()
    set_mode(model, "pccp")
    zoo.fitted(model, callback)
    assert {layer.mode for layer in mode_layers(model)} == {"pccp"}


def test_ties_go_to_batch_independent_modes_then_to_the_incumbent() -> None:
    model, callback = ByMode({str(mode): 1.0 for mode in ALL_MODES}), zoo.chooser()
    set_mode(model, "ppcp")
    zoo.fitted(model, callback)
    assert callback.result is not None
    assert callback.result.chosen == "ppcp"
    model = ByMode({"cccc": 1.0, "pppc": 1.0})
    set_mode(model, "cccc")
    zoo.fitted(model, callback)
    assert callback.result.chosen == "pppc"


def test_layers_of_different_modes_are_set_to_one() -> None:
    model, callback = zoo.Rich(), zoo.chooser()
    mode_layers(model)[0].mode = "cccc"
    zoo.fitted(model, callback)
    assert callback.result is not None
    assert {layer.mode for layer in mode_layers(model)} == {callback.result.chosen}
    zoo.assert_same_table(zoo.oracle(model), callback)


def test_an_exception_in_one_mode_leaves_everything_as_it_was(tmp_path: Path) -> None:
    class Fails(zoo.Rich):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            output = super().validation_step(batch, batch_idx)
            if mode_layers(self)[0].mode == "cpcp" and not self.trainer.sanity_checking:
                raise RuntimeError("out of luck")
            return output

    model = Fails()
    trainer = zoo.trainer(zoo.chooser(), logger=pl.loggers.CSVLogger(tmp_path), num_sanity_val_steps=0)
    loggers = list(trainer.loggers)
    results = trainer.fit_loop.epoch_loop.val_loop._results
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(model, zoo.train_data(), zoo.val_data())
    assert {layer.mode for layer in mode_layers(model)} == {"ppcc"}
    assert trainer.loggers == loggers
    assert trainer.fit_loop.epoch_loop.val_loop._results is results
    assert "forward" not in model.net.__dict__
    assert "forward" not in model.__dict__
    assert model.outputs == []


def test_gradients_in_mid_accumulation_are_untouched() -> None:
    class Watches(pl.Callback):
        seen: list = []

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            grads = [parameter.grad for parameter in pl_module.parameters()]
            self.before = [None if grad is None else grad.clone() for grad in grads]

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            for parameter, before in zip(pl_module.parameters(), self.before, strict=True):
                assert (parameter.grad is None) == (before is None)
                if before is not None:
                    self.seen.append(bool(before.abs().sum()))
                    assert torch.equal(parameter.grad, before)

    watches = Watches()
    options: dict[str, Any] = {"accumulate_grad_batches": 4, "val_check_interval": 1, "num_sanity_val_steps": 0}
    zoo.fitted(zoo.Simple(), watches, zoo.chooser(), **options)
    assert any(watches.seen)


def test_steps_that_draw_their_own_batches_are_refused() -> None:
    class Iterates(zoo.Simple):
        def validation_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), batch_size=20)

    with pytest.raises(MisconfigurationException, match="validation_step\\(dataloader_iter\\)"):
        zoo.fitted(Iterates(), zoo.chooser())


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="callbacks has 2 BLNStatsCallback"):
        zoo.fitted(zoo.Simple(), zoo.chooser(), zoo.chooser("val_acc", "max"))


def test_two_callbacks_of_one_monitor_are_refused_by_name() -> None:
    # the Trainer is first here, as both would write to one place in a checkpoint
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `BLNStatsCallback`"):
        zoo.trainer(zoo.chooser(), zoo.chooser())


def test_a_rank_without_validation_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = zoo.trainer(zoo.chooser(), num_sanity_val_steps=0)
    # as if another rank had answered the other way
    monkeypatch.setattr(type(trainer.strategy), "reduce_boolean_decision", lambda self, decision, all=True: not all)
    with pytest.raises(MisconfigurationException, match="a rank has no validation batches"):
        trainer.fit(zoo.Simple(), zoo.train_data(), zoo.val_data())


def test_a_model_without_our_layers_is_refused() -> None:
    class Plain(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(zoo.FEATURES, zoo.CLASSES))

    with pytest.raises(MisconfigurationException, match="model=Plain has no layer"):
        zoo.fitted(Plain(), zoo.chooser())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "up"}, "mode='up'"),
        ({"candidates": "most"}, "candidates='most'"),
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


def test_the_callback_runs_after_those_that_log_and_before_those_that_save() -> None:
    class Logs(pl.Callback):
        pass

    callback = zoo.chooser()
    trainer = zoo.trainer(callback, pl.callbacks.ModelCheckpoint(), Logs(), enable_checkpointing=True, fast_dev_run=1)
    trainer.fit(zoo.Simple(), zoo.train_data(), zoo.val_data())
    names = [type(one).__name__ for one in trainer.callbacks]
    assert names.index("Logs") < names.index("BLNStatsCallback")


def test_both_namespaces_take_the_callback() -> None:
    other = pytest.importorskip("pytorch_lightning")
    assert isinstance(BLNStatsCallback(), (pl.Callback, other.Callback))
    callback = zoo.chooser()
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, other.Callback)
    assert pickle.loads(pickle.dumps(callback)).monitor == "val_loss"

    source = {name: zoo.Simple.__dict__[name] for name in ("forward", "training_step", "configure_optimizers")}

    def start(self: Any) -> None:
        other.LightningModule.__init__(self)
        self.net, self.lr = zoo.Simple().net, 0.1

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    module = type("Other", (other.LightningModule,), {"__init__": start, "validation_step": validation_step, **source})
    trainer = other.Trainer(**zoo.SILENT, max_epochs=1, callbacks=[callback])
    trainer.fit(module(), zoo.train_data(), zoo.val_data())
    assert len(callback.history) == 1
