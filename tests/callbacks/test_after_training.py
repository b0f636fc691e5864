"""After training has succeeded nothing that fails raises: each failure costs one warning, and leaves no half file."""

from __future__ import annotations

import errno
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import zoo
from lightning.pytorch.loggers import Logger

from lightning_bln.callbacks import BLNStatsCallback, display
from lightning_bln.sweep import SweepResult

JSON, PICTURE = "bln_sweep.json", "bln_sweep.png"


def fit(callback: BLNStatsCallback, *loggers: Logger) -> list[str]:
    """The callback's warnings in a fit that ends well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = zoo.fitted(zoo.Simple(), callback, Ends(), logger=list(loggers))
    assert trainer.state.finished
    assert callback.result is not None
    return [text for one in caught if "BLNStatsCallback could not" in (text := str(one.message))]


def files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have the disk be full when the file ``name`` has been written in half."""
    replacing = display.replacing

    class Half:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.file, attribute)

    @contextmanager
    def half(path: Path) -> Any:
        with replacing(path) as file:
            yield Half(file) if path.name == name else file

    monkeypatch.setattr(display, "replacing", half)


@pytest.mark.parametrize(("name", "left"), [(JSON, []), (PICTURE, [JSON])])
def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, left: list[str]
) -> None:
    full_disk(monkeypatch, name)
    (warning,) = fit(zoo.chooser(save_dir=tmp_path))
    assert "save_dir=" in warning
    assert "No space left" in warning
    assert files(tmp_path) == left


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_folder_that_cannot_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (warning,) = fit(zoo.chooser(save_dir=tmp_path / place))
    assert "save_dir=" in warning
    assert files(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if tmp_path in self.parents and mode != "r":  # root may write anywhere
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    (warning,) = fit(zoo.chooser(save_dir=tmp_path))
    assert "Permission denied" in warning
    assert not files(tmp_path)


def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def broken_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def draw(self: Any) -> None:
        raise RuntimeError("libfreetype is broken")

    monkeypatch.setattr(FigureCanvasAgg, "draw", draw)


@pytest.mark.parametrize("broken", [no_matplotlib, broken_backend])
def test_without_a_figure_there_are_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    broken(monkeypatch)
    callback = zoo.chooser(save_dir=tmp_path, plot=True)
    (warning,) = fit(callback, Takes(), Takes())
    assert "draw the heat map" in warning
    assert files(tmp_path) == [JSON]
    assert SweepResult.from_json(tmp_path / JSON) == callback.result


class Takes(Logger):
    """Logger that takes all."""

    name, version = "takes", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_image(self, key: str, images: list, step: int | None = None) -> None: ...


class RefusesParameters(Takes):
    """Refuses what it has under another value, as MLflow's does."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if "bln_mode" in params:
            raise ValueError("Changing param values is not allowed")


class RefusesTheEnd(Takes):
    """Refuses metrics from when the mode is logged, as a hyperparameter with metrics is by TensorBoard's."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if "bln_mode" in params:
            self.log_metrics({"hp_metric": -1}, None)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "hp_metric" in metrics:
            raise ConnectionError("server is gone")


class RefusesImages(Takes):
    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        raise OSError("disk full")


class RefusesSaving(Takes):
    """Takes the picture and cannot flush it."""

    has_picture = False

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        self.has_picture = True

    def save(self) -> None:
        if self.has_picture:
            self.has_picture = False  # Lightning itself saves later, and must not fail
            raise OSError("disk full")


class LosesItsServer(Takes):
    """Cannot be reached once training is over."""

    is_reachable = True

    @property
    def experiment(self) -> Any:
        if not self.is_reachable:
            raise ConnectionError("server is gone")
        return None


class Ends(pl.Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers:
            logger.is_reachable = False


@pytest.mark.parametrize(
    ("logger", "words", "fails"),
    [
        (RefusesParameters, "Changing param values", ["log the mode"]),
        (RefusesTheEnd, "server is gone", ["log the mode"]),
        (RefusesImages, "disk full", ["give the heat map"]),
        (RefusesSaving, "disk full", ["give the heat map"]),
        (LosesItsServer, "server is gone", ["log the mode", "give the heat map"]),
    ],
)
def test_a_logger_that_fails_costs_one_warning_and_the_others_nothing(
    tmp_path: Path, logger: type[Logger], words: str, fails: list[str]
) -> None:
    pictures: list[str] = []

    class Behind(Takes):
        def log_image(self, key: str, images: list, step: int | None = None) -> None:
            pictures.append(key)

    said = fit(zoo.chooser(save_dir=tmp_path, plot=True), logger(), Behind())
    assert len(said) == len(fails)
    for warning, what in zip(said, fails, strict=True):
        assert f"could not {what} to {logger.__name__}: {words}" in warning
    assert pictures == ["bln/modes"]
    assert files(tmp_path) == [JSON, PICTURE]


def test_a_table_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def print_table(*_: Any) -> None:
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(display, "print_table", print_table)
    (warning,) = fit(zoo.chooser(save_dir=tmp_path, verbose=True))
    assert "print the table" in warning
    assert files(tmp_path) == [JSON, PICTURE]
