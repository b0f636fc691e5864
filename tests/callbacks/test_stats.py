"""When the callback chooses and when it leaves the mode alone, and what it says of it."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
import zoo
from lightning.pytorch.cli import LightningCLI
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
    assert set(callback.result.scores) == {"cccc"}  # which is set, and nothing runs beside it
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


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="callbacks has 2 BLNStatsCallback"):
        zoo.fitted(zoo.Simple(), zoo.chooser(), zoo.chooser("val_acc", "max"))


def test_two_callbacks_of_one_monitor_are_refused_by_name() -> None:
    # the Trainer is first here, as both would write to one place in a checkpoint
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `BLNStatsCallback`"):
        zoo.trainer(zoo.chooser(), zoo.chooser())


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


def test_a_reloaded_model_announces_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tests(zoo.Simple):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    model, callback = Tests(), zoo.chooser(verbose=True)
    trainer = zoo.fitted(model, callback)
    assert callback.result is not None
    said: list[str] = []
    monkeypatch.setattr("lightning_bln.callbacks.messages.rank_zero_info", said.append)
    trainer.test(model, zoo.val_data(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, zoo.train_data(), zoo.val_data())
    assert said[0] == f"Tests tests in statistics mode {callback.result.incumbent}."
    assert said[1] == f"Tests resumes in statistics mode {callback.result.incumbent}."


def test_a_model_from_a_checkpoint_announces_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tests(zoo.Simple):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    path = str(tmp_path / "saved.ckpt")
    zoo.fitted(Tests(), zoo.chooser(candidates=["pccp"])).save_checkpoint(path)
    said: list[str] = []
    monkeypatch.setattr("lightning_bln.callbacks.messages.rank_zero_info", said.append)
    zoo.trainer(zoo.chooser(verbose=True)).validate(Tests(), zoo.val_data(), ckpt_path=path, verbose=False)
    zoo.trainer(zoo.chooser(verbose=True)).test(Tests(), zoo.val_data(), ckpt_path=path, verbose=False)
    zoo.trainer(zoo.chooser(verbose=True), max_epochs=2).fit(Tests(), zoo.train_data(), zoo.val_data(), ckpt_path=path)
    assert said[:3] == [
        "Tests starts to validate in statistics mode pccp.",
        "Tests tests in statistics mode pccp.",
        "Tests resumes in statistics mode pccp.",
    ]


class Data(zoo.pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return zoo.train_data()

    def val_dataloader(self) -> Any:
        return zoo.val_data()


def test_the_callback_comes_from_yaml(tmp_path: Path) -> None:
    config = {
        "trainer": {
            **zoo.SILENT,
            "max_epochs": 1,
            "callbacks": [
                {
                    "class_path": "lightning_bln.callbacks.BLNStatsCallback",
                    "init_args": {"candidates": ["ppcc", "cccc"], "guard": "off", "verbose": False},
                }
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(zoo.Simple, Data, args=["fit", "--config", str(path)], save_config_callback=None)
    (callback,) = (one for one in cli.trainer.callbacks if isinstance(one, BLNStatsCallback))
    assert callback.candidates == ("ppcc", "cccc")
    assert callback.result is not None
    assert json.loads(callback.result.to_json())["chosen"] in ("ppcc", "cccc")
    assert torch.isfinite(torch.tensor(callback.history[0][3]))


@pytest.mark.parametrize("given", ["mode: max", "direction: max", "direction: max, mode: max, log: all"])
def test_yaml_has_the_direction_by_either_name(tmp_path: Path, given: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  logger: false\n  callbacks:\n    - class_path: lightning_bln.callbacks.BLNStatsCallback\n"
        f"      init_args: {{{given}}}\n"
    )
    cli = LightningCLI(zoo.Simple, Data, args=["--config", str(path)], save_config_callback=None, run=False)
    (callback,) = (one for one in cli.trainer.callbacks if isinstance(one, BLNStatsCallback))
    assert callback.direction == "max"
    assert callback.should_log == ("all" if "log" in given else True)
