"""``bln calibrate``: a population of new data in a checkpoint, and the old one put back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bln import calibrate, cli
from lightning_bln.cli import checkpoint as files
from lightning_bln.modes import ALL_MODES

pytest.importorskip("jsonargparse")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Images(L.LightningModule):
    """A network with a BatchNorm, called with a batch's first entry."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        norms = [nn.BatchNorm2d(4)] if norm else []
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), *norms, nn.Flatten(), nn.Linear(144, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Scans(L.LightningDataModule):
    """Unlabelled images, and labelled ones that only ``setup("fit")`` makes."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale, self.rows = scale, None

    def setup(self, stage: str) -> None:
        torch.manual_seed(1)
        if stage == "fit":
            self.rows = TensorDataset(torch.randn(160, 1, 8, 8) - 4, torch.arange(160) % 3)

    def images(self) -> Tensor:
        return self.scale * torch.randn(160, 1, 8, 8, generator=torch.Generator().manual_seed(2))

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.images(), batch_size=16)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=16)  # type: ignore[arg-type]


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def is_same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two) and one.dtype == two.dtype
    if isinstance(one, dict):
        return list(one) == list(two) and all(is_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(is_same, one, two))
    return type(one) is type(two) and one == two


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of a model with a BatchNorm."""
    torch.manual_seed(0)
    model, path = Images(), tmp_path / "x.ckpt"
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "pytorch-lightning_version": L.__version__}, path)
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "new.yaml"
    config = {
        "model": {"class_path": f"{__name__}.Images"},
        "data": {"class_path": f"{__name__}.Scans"},
        "trainer": {**QUIET},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_batch_norm_gets_the_statistics_of_the_predict_loader(saved, recipe, capsys) -> None:
    before = read(saved)
    cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(saved), "--samples", "128"])
    after = read(saved)
    assert list(after["state_dict"]) == list(before["state_dict"])
    model = Images()
    model.load_state_dict(before["state_dict"])
    calibration = calibrate(model, Scans().predict_dataloader(), samples=128)
    assert set(after["bln_population_before"]) == {"net.1.running_mean", "net.1.running_var"}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(after["state_dict"][key], value)
    printed = capsys.readouterr().out
    assert "wrote the population of 128 samples" in printed
    assert str(calibration).splitlines()[0] in printed


def test_undo_gives_the_file_back(saved, recipe, tmp_path, capsys) -> None:
    before, other, third = read(saved), tmp_path / "y.ckpt", tmp_path / "z.ckpt"
    content = saved.read_bytes()
    cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(saved), "--output", str(other)])
    assert saved.read_bytes() == content
    kept = read(other)["bln_population_before"]
    again = ["calibrate", "--config", str(recipe), "--ckpt", str(other), "--data.init_args.scale", "5"]
    cli.main(again)  # a second one keeps what training left
    assert is_same(read(other)["bln_population_before"], kept)
    cli.main(["calibrate", "--ckpt", str(other), "--undo", "--output", str(third)])
    assert is_same(read(third), before)
    cli.main(["calibrate", "--ckpt", str(other), "--undo"])
    assert is_same(read(other), before)
    assert "before the calibration" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="keeps no earlier population"):
        cli.main(["calibrate", "--ckpt", str(other), "--undo"])


def test_a_split_is_named_where_there_is_no_predict_loader(saved, recipe) -> None:
    cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(saved), "--split", "train"])
    assert read(saved)["bln_population_before"]["net.1.running_var"].eq(1).all()
    content = saved.read_bytes()
    with pytest.raises(ValueError, match=r"Scans has no test_dataloader; .* --split"):
        cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(saved), "--split", "test"])
    assert saved.read_bytes() == content


def test_a_bln_checkpoint_is_calibrated_without_a_config(checkpoint, load, capsys) -> None:
    before = read(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # limit_predict_batches leaves few samples
        cli.main(["calibrate", "--ckpt", str(checkpoint)])
    after = read(checkpoint)
    assert list(after["state_dict"]) == list(before["state_dict"])
    changed = {key for key, value in after["state_dict"].items() if not is_same(value, before["state_dict"][key])}
    assert changed
    assert not any("weight" in key or key.endswith("_extra_state") for key in changed)
    assert changed <= {*after["bln_population_before"]}
    assert load(checkpoint).lstm.mode in ALL_MODES
    others = {key for key in after if key not in before or not is_same(after[key], before[key])}
    assert others == {"state_dict", "bln_population_before"}
    cli.main(["calibrate", "--ckpt", str(checkpoint), "--undo"])
    assert is_same(read(checkpoint), before)


@pytest.mark.parametrize("fails", ["calibration", "writing"])
def test_an_error_leaves_the_file_as_it_is(fails, saved, recipe, monkeypatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left")

    content = saved.read_bytes()
    if fails == "writing":
        monkeypatch.setattr(files.torch, "save", fail)
    else:
        monkeypatch.setattr("lightning_bln.cli.calibration.calibrate", fail)
    with pytest.raises(OSError, match="no space left"):
        cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(saved)])
    assert saved.read_bytes() == content
    assert sorted(path.name for path in saved.parent.iterdir()) == ["new.yaml", "x.ckpt"]


def test_what_has_no_population_is_refused(tmp_path, recipe) -> None:
    model, path = Images(norm=False), tmp_path / "plain.ckpt"
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}, path)
    options = ["--ckpt", str(path), "--model.init_args.norm", "false"]
    with pytest.raises(ValueError, match="has no layer with a population"):
        cli.main(["calibrate", "--config", str(recipe), *options])
    with pytest.raises(SystemExit, match="no such file; pass a checkpoint"):
        cli.main(["calibrate", "--config", str(recipe), "--ckpt", str(tmp_path / "none.ckpt")])


def test_a_file_of_another_model_is_refused(saved, recipe) -> None:
    calibration = calibrate(nn.Sequential(nn.BatchNorm1d(3)), [torch.randn(128, 3)])
    content = saved.read_bytes()
    with pytest.raises(ValueError, match=r"no entry '0\.running_mean', so it is not of this Sequential"):
        files.write_population(saved, calibration)
    assert saved.read_bytes() == content
