"""Progress bars, loggers, the printed table and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_bln import ALL_MODES
from lightning_bln.callbacks.display import RichLine, SweepBar, TqdmLine
from lightning_bln.sweep import SweepResult


def test_the_validation_bar_says_what_is_going_on(capsys: pytest.CaptureFixture) -> None:
    labels: list[str] = []

    class Reads(zoo.Simple):
        def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            labels.append(self.trainer.progress_bar_callback.val_progress_bar.desc)  # type: ignore[union-attr]

    bar = TQDMProgressBar(refresh_rate=1)
    zoo.fitted(Reads(), zoo.chooser(), bar, enable_progress_bar=True, num_sanity_val_steps=0)
    assert any("16 modes" in label for label in labels)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_sweep_has_a_line_of_its_own(bar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, float, float | None, bool]] = []

    def watch(cls: Any) -> None:
        draw = cls.show

        def show(self: Any, done: int) -> None:
            draw(self, done)
            if cls is TqdmLine:
                shown.append((self.line.desc, self.line.n, self.line.total, not self.line.disable))
            else:
                task = next(one for one in self.progress.tasks if one.id == self.task)
                shown.append((task.description, task.completed, task.total, task.visible))

        monkeypatch.setattr(cls, "show", show)

    watch(TqdmLine)
    watch(RichLine)
    monkeypatch.setattr(SweepBar, "INTERVAL", 0.0)
    callback = zoo.chooser(guard="warn")
    trainer = zoo.fitted(zoo.Simple(), callback, bar(refresh_rate=1), enable_progress_bar=True, max_epochs=2)
    assert all(visible for *_, visible in shown)
    sweep = [(done, total) for text, done, total, _ in shown if "16 modes" in text]
    # three batches in fifteen modes, without the one Lightning runs; the first begins with two of them
    assert [done for done, _ in sweep][:4] == [2, 15, 30, 45]
    assert {total for _, total in sweep} == {45}
    assert [done for text, done, *_ in shown if "Population" in text][:2] == [1, 2]
    shown_bar: Any = trainer.progress_bar_callback
    if bar is RichProgressBar:
        assert [task.visible for task in shown_bar.progress.tasks if task.fields.get("is_sweep")] == [False]


def test_without_bars_there_is_no_line() -> None:
    bar = SweepBar()
    bar.start(zoo.trainer(), "nothing", 3)
    bar.advance()
    assert bar.line is None


def test_a_bar_of_the_users_own_is_left_alone() -> None:
    class Plain(ProgressBar):
        """As lightning's documentation has it: it can be disabled, and does not say so."""

        def disable(self) -> None: ...

        def enable(self) -> None: ...

    callback = zoo.chooser(verbose=True)
    zoo.fitted(zoo.Simple(), callback, Plain(), enable_progress_bar=True)
    assert callback.result is not None


def test_table_files_and_hyperparameters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    callback = zoo.chooser(verbose=True, save_dir=tmp_path / "out")
    logger = CSVLogger(tmp_path)
    zoo.fitted(zoo.Simple(), callback, logger=logger)
    assert callback.result is not None
    printed = capsys.readouterr().out
    assert "Statistics modes by val_loss" in printed
    assert "chosen" in printed
    assert SweepResult.from_json(tmp_path / "out" / "bln_sweep.json") == callback.result
    assert (tmp_path / "out" / "bln_sweep.png").stat().st_size > 1000
    hyperparameters = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert hyperparameters["bln_mode"] == str(callback.result.chosen)


def tags(folder: Path, *callbacks: Any, model: Any = None) -> tuple[dict[str, Any], Any]:
    """The tags that TensorBoard shows of a fit, and the last value of a scalar by its tag."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(folder)
    zoo.fitted(zoo.Simple() if model is None else model, *callbacks, logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return events.Tags(), lambda tag: events.Scalars(tag)[-1].value


def test_tensorboard_gets_the_heat_map(tmp_path: Path) -> None:
    assert "bln/modes" in tags(tmp_path, zoo.chooser(plot=True))[0]["images"]


EVERY_SCORE = {f"bln/val_loss/{mode}" for mode in ALL_MODES}
FEW = {"bln/mode", "bln/val_loss/spread"}


@pytest.mark.parametrize(("log", "added"), [(False, set()), (True, FEW), ("all", FEW | EVERY_SCORE)])
def test_loggers_get_few_scalars_or_those_that_are_asked_for(tmp_path: Path, log: Any, added: set[str]) -> None:
    def fit(folder: Path, *callbacks: Any) -> Any:
        torch.manual_seed(0)
        return tags(folder, *callbacks)

    plain, _ = fit(tmp_path / "plain")
    callback = zoo.chooser(guard="warn", tolerance=100.0, log=log)
    shown, _ = fit(tmp_path / "ours", callback)
    assert callback.result is not None
    assert callback.result.chosen in callback.result.regrouped
    spreads = {f"bln/spread/{mode}" for mode in callback.result.regrouped} if log == "all" else set()
    assert set(shown["scalars"]) - set(plain["scalars"]) == added | spreads


def test_tensorboard_gets_the_mode_as_text_and_keeps_the_users_hp_metric(tmp_path: Path) -> None:
    class Tuned(zoo.Simple):
        def on_validation_epoch_end(self) -> None:
            self.log("hp_metric", 0.5)

    shown, last = tags(tmp_path, zoo.chooser(), model=Tuned())
    assert shown["tensors"] == ["bln/mode/text_summary"]
    assert last("hp_metric") == 0.5


@pytest.mark.parametrize("log", [False, True])
def test_scores_of_every_mode_are_no_metrics_unless_asked_for(log: bool) -> None:
    trainer = zoo.fitted(zoo.Simple(), zoo.chooser(log=log))
    ours = {name for name in trainer.callback_metrics if name.startswith("bln/")}
    assert ours == ({"bln/mode"} if log else set())


def test_loggers_with_log_image_get_a_picture_and_may_fail() -> None:
    class Takes(Logger):
        name, version, images = "takes", 0, []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

        def log_image(self, key: str, images: list, step: int | None = None) -> None:
            self.images.append((key, images[0].shape))

    class Fails(Takes):
        def log_image(self, key: str, images: list, step: int | None = None) -> None:
            raise OSError("disk full")

    with pytest.warns(UserWarning, match="disk full"):
        zoo.fitted(zoo.Simple(), zoo.chooser(plot=True), logger=[Takes(), Fails()])
    assert Takes.images[0][0] == "bln/modes"
    assert Takes.images[0][1][-1] == 3
