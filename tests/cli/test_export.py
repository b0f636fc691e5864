"""``bln export``: a checkpoint's model as a file, compared on validation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_bln import BLNLSTM, cli, recompute_population, set_mode
from lightning_bln.callbacks import BLNStatsCallback
from lightning_bln.cli.exporting import Kept, samples_in
from tests.export.helpers import exports

pytest.importorskip("jsonargparse")

FORMATS = (pytest.param("onnx", marks=exports), pytest.param("pt2", marks=exports), "torch")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


class Rows(L.LightningDataModule):
    """Sequences whose last validation batch is smaller, in random order."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = TensorDataset(torch.randn(70, 6, 4, generator=generator), torch.arange(70) % 3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=16)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=16, shuffle=True)


class Reader(L.LightningModule):
    """A BLN-LSTM that folds, with a mode by a callback of its own, and validations of several kinds."""

    def __init__(self, way: str = "forward") -> None:
        super().__init__()
        self.way = way
        self.lstm = BLNLSTM(4, 5, batch_first=True, time_statistics="shared", norm_cell=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        return self.head(self.lstm(x, state)[0][:, -1])

    def configure_callbacks(self) -> list[L.Callback]:
        return [BLNStatsCallback(monitor="val_loss", candidates=["cccc"], guard="off")]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        if self.way == "random":
            x = x + torch.randn_like(x)
        logits = self.head(self.lstm(x)[0][:, -1]) if self.way == "around" else self(x)
        if self.way == "twice":
            logits = logits + self(x, (torch.zeros(1, len(x), 5), torch.zeros(1, len(x), 5)))
        self.log("val_loss", F.cross_entropy(logits, y))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of a model in mode ``pppp``."""
    torch.manual_seed(0)
    model, path = Reader(), tmp_path / "x.ckpt"
    recompute_population(model, [torch.randn(32, 6, 4) for _ in range(4)])
    set_mode(model, "pppp")
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "pytorch-lightning_version": L.__version__}, path)
    return path


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "new.yaml"
    config = {
        "model": {"class_path": f"{__name__}.Reader"},
        "data": {"class_path": f"{__name__}.Rows"},
        "trainer": {**QUIET, "precision": "bf16-mixed"},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def run(*args: Any) -> None:
    cli.main(["export", *map(str, args)])


def metrics(printed: str) -> list[list[str]]:
    return [line.split() for line in printed.splitlines() if line.startswith("val_")]


@pytest.mark.parametrize("to", FORMATS)
def test_a_checkpoint_becomes_a_file(to, saved, recipe, tmp_path, capsys) -> None:
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    output, content = tmp_path / f"model.{to}", saved.read_bytes()
    run("--config", recipe, "--ckpt", saved, "--to", to, "--output", output)
    printed = capsys.readouterr().out
    assert saved.read_bytes() == content
    assert "statistics mode: pppp\nlstm: BLNLSTM -> LSTM\n" in printed
    assert "largest difference on 5 inputs: " in printed
    assert f"wrote {output} ({to}, {output.stat().st_size / 1000:.1f} kB)" in printed
    ((name, own, file),) = metrics(printed)
    assert name == "val_loss"
    assert float(own) == pytest.approx(float(file), rel=1e-4)
    model = Reader()
    model.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    data = Rows()
    data.setup("validate")
    x, y = data.rows.tensors
    assert float(own) == pytest.approx(float(F.cross_entropy(model.eval()(x).detach(), y)), rel=1e-4)


def test_a_state_dict_loads_into_the_model_with_torchs_layers(saved, recipe, tmp_path) -> None:
    run("--config", recipe, "--ckpt", saved, "--output", tmp_path / "model.pt")
    plain, model = Reader(), Reader()
    plain.lstm = nn.LSTM(4, 5, batch_first=True)  # type: ignore[assignment]
    plain.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    model.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])
    x = torch.randn(7, 9, 4)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("around", "validation_step does not call forward, so that its metrics cannot be computed by the file"),
        ("twice", "validation_step calls forward in 2 ways, so that its metrics cannot be computed by the file"),
    ],
)
def test_metrics_that_the_file_cannot_compute_are_named(way, says, saved, recipe, tmp_path, capsys) -> None:
    run("--config", recipe, "--ckpt", saved, "--output", tmp_path / "model.pt", "--model.init_args.way", way)
    printed = capsys.readouterr().out
    assert says in printed
    assert "largest difference on 5 inputs: " in printed
    assert not metrics(printed)


def test_a_validation_that_draws_numbers_draws_the_same_for_the_file(saved, recipe, tmp_path, capsys) -> None:
    run("--config", recipe, "--ckpt", saved, "--output", tmp_path / "model.pt", "--model.init_args.way", "random")
    ((_, own, file),) = metrics(capsys.readouterr().out)
    assert float(own) == pytest.approx(float(file), rel=1e-4)


def test_few_batches_have_the_last_one_among_them(saved, recipe, tmp_path, capsys) -> None:
    run("--config", recipe, "--ckpt", saved, "--output", tmp_path / "model.pt", "--batches", "2")
    assert "on 2 inputs" in capsys.readouterr().out
    loader = DataLoader(torch.arange(70.0), batch_size=16)  # type: ignore[arg-type]
    assert [len(batch) for batch in Kept(loader, 2)] == [16, 6]
    assert [len(batch) for batch in Kept(loader, 1)] == [6]
    assert [len(batch) for batch in Kept(loader, 9)] == [16, 16, 16, 16, 6]
    kept = Kept(DataLoader(torch.arange(70.0), batch_size=16, shuffle=True), 3)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(kept, kept, strict=True))
    assert len(kept) == 3


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.arange(70.0))


def test_a_stream_gives_its_first_batches() -> None:
    assert [len(batch) for batch in Kept(DataLoader(Stream(), batch_size=16), 2)] == [16, 16]


def test_samples_are_counted_by_labels() -> None:
    assert samples_in((torch.zeros(7, 3, 4), torch.zeros(3))) == 3
    assert samples_in((torch.zeros(7, 3, 4), torch.zeros(7, 5))) == 7


def test_a_file_that_differs_is_not_kept(saved, recipe, tmp_path) -> None:
    output = tmp_path / "model.pt"
    output.write_text("earlier")
    with pytest.raises(SystemExit, match=r"bln export: the file's results differ .* the tolerance is 1e-30,"):
        run("--config", recipe, "--ckpt", saved, "--output", output, "--tolerance", "1e-30")
    assert output.read_text() == "earlier"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.pt", "new.yaml", "x.ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt", "none.ckpt", "--output", "m.pt"], "no such file; pass a checkpoint"),
        (["--ckpt", "x.ckpt", "--output", "m.zip"], "stands for no format; choose onnx"),
        (["--ckpt", "x.ckpt", "--output", "new.yaml/m.pt"], "is no folder; name a file"),
        (["--ckpt", "x.ckpt", "--output", "x.ckpt", "--to", "torch"], "is the checkpoint itself; name another file"),
        (["--ckpt", "new.yaml", "--output", "m.pt"], "new.yaml holds more than tensors"),
        (["--ckpt", "x.ckpt", "--output", "m.pt", "--to", "tensorrt"], "2"),
        (["--ckpt", "x.ckpt"], "2"),
    ],
)
def test_errors_change_nothing(options, message, saved, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match=message) as stopped:
        run("--config", recipe, *options)
    assert stopped.value.code not in (0, None)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


class Wider(Reader):
    """A Reader of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)


class Plain(Reader):
    """A Reader with a layer more, and one less."""

    def __init__(self) -> None:
        super().__init__()
        self.last = self.head
        del self.head


@pytest.mark.parametrize("command", ["export", "sweep", "calibrate"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "Wider",
            r"x.ckpt does not fit Wider: the file has head.weight of shape \[3, 5\], where the model's is \[4, 5\]",
        ),
        (
            "Plain",
            r"x.ckpt does not fit Plain: the file lacks last.weight and has head.weight, which the model does not",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_named(command, model, message, saved, recipe, tmp_path) -> None:
    options = {"export": ["--output", tmp_path / "m.pt"], "calibrate": ["--split", "validation"], "sweep": []}[command]
    given = [command, "--config", recipe, "--ckpt", saved, *options, "--model", f"{__name__}.{model}"]
    with pytest.raises(SystemExit, match=f"bln {command}: .*{message}"):
        cli.main([*map(str, given)])


def test_a_folder_that_cannot_be_made_is_named(saved, recipe, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"bln export: .* cannot be written|no permission to write"):
        run("--config", recipe, "--ckpt", saved, "--output", "/proc/none/m.pt")


class NoData(Rows):
    val_dataloader = L.LightningDataModule.val_dataloader  # type: ignore[assignment]


def test_data_without_validation_batches_is_refused(saved, recipe, tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"NoData has no val_dataloader, .* in --config"):
        run("--config", recipe, "--ckpt", saved, "--output", tmp_path / "m.pt", "--data", f"{__name__}.NoData")


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=[exports, pytest.mark.exact]), "torch"])
def test_a_checkpoint_of_bln_fit_needs_no_configuration(to, checkpoint, tmp_path, capsys) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    run("--ckpt", checkpoint, "--output", tmp_path / "model", "--to", to)
    printed = capsys.readouterr().out
    assert "largest difference on 2 inputs" in printed  # limit_val_batches of the configuration
    assert "lstm: BLNLSTM left alone" in printed
    assert [line[0] for line in metrics(printed)] == ["val_acc", "val_loss"]
    assert ("loading it needs lightning_bln, for its layers lstm" in printed) == (to == "torch")
