"""Trained models folded: the same outputs and scores on real data, in torch's modules where the report says so."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader

from benchmarks.resnet import Residual, residual_network
from lightning_bln import BLNLSTM, BLNStatsCallback, fold, recompute_population, set_mode, to_bln
from lightning_bln.data import LabelledTexts, read_cifar10, read_imdb
from lightning_bln.demo import QUIET, DigitRows, RowClassifier
from lightning_bln.folding import Affine
from lightning_bln.models.paper import Classifier
from lightning_bln.reproduce import experiments
from lightning_bln.reproduce.training import Settings, run
from lightning_bln.sweep.plot import number

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

LOADS = """
import sys, torch
from torch import nn
sys.modules["lightning_bln"] = None  # an import fails

class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[1][0][-1])

model = Rows().eval()
state, x, expected = torch.load(sys.argv[1], weights_only=True)
model.load_state_dict(state)
assert torch.equal(model(x), expected)
assert not any(name.startswith("lightning_bln.") for name in sys.modules)
"""


def assert_equal(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max().clamp(min=1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


@torch.no_grad()
def assert_folds(model: nn.Module, x: Tensor, plain: nn.Module | None = None) -> None:
    """Outputs of the folded model are those of the model, and so they are in float64."""
    plain = fold(model) if plain is None else plain
    assert_equal(plain(x), model(x))
    exact = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    assert_equal(fold(exact)(x), exact(x))


def has_none_of_ours(model: nn.Module) -> bool:
    return not any(type(one).__module__.startswith("lightning_bln") for one in model.modules())


@pytest.fixture(scope="module")
def digits() -> tuple[RowClassifier, DigitRows, BLNStatsCallback, L.Trainer]:
    """The demo's classifier with the options that let its LSTM fold, after three epochs in the mode that does."""
    L.seed_everything(0)
    data, model = DigitRows(), RowClassifier()
    model.lstm = BLNLSTM(8, 64, batch_first=True, time_statistics="shared", norm_cell=False)
    statistics = BLNStatsCallback(candidates="foldable", log=False)
    trainer = L.Trainer(max_epochs=3, callbacks=[statistics], **QUIET)
    trainer.fit(model, datamodule=data)
    return model.eval(), data, statistics, trainer


def test_a_trained_lstm_is_torchs_and_scores_the_same(digits) -> None:
    model, data, statistics, trainer = digits
    assert model.lstm.mode == "pppp"
    assert model.trainer is trainer
    plain: Any
    plain, report = fold(model, report=True, result=statistics.result)
    assert str(report) == "lstm: BLNLSTM -> LSTM"
    assert type(plain.lstm) is nn.LSTM
    x = data.splits["test"].tensors[0]
    assert_folds(model, x, plain)
    assert torch.equal(plain(x).argmax(1), model(x).argmax(1))
    scores = [L.Trainer(**QUIET).test(one, data.test_dataloader(), verbose=False)[0] for one in (plain, model)]
    assert scores[0] == scores[1]
    assert scores[0]["test_acc"] > 0.8
    for steps in (1, 3):  # the statistics are those of all steps
        assert_folds(model, x[:5, :steps], plain)


def test_its_state_dict_loads_where_the_package_is_missing(digits, tmp_path: Path) -> None:
    model, data, _, _ = digits
    plain, x = fold(model), data.splits["test"].tensors[0][:16]
    with torch.no_grad():
        torch.save((plain.state_dict(), x, plain(x)), tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path / "model.pt")], check=True, cwd=tmp_path)


def test_the_folded_lstm_can_be_trained_further(digits) -> None:
    model, data, _, _ = digits
    plain: Any = fold(model)
    losses = [L.Trainer(**QUIET).validate(plain, data.val_dataloader(), verbose=False)[0]["val_loss"]]
    L.Trainer(max_epochs=1, **QUIET).fit(plain.train(), data.train_dataloader())
    losses += [L.Trainer(**QUIET).validate(plain, data.val_dataloader(), verbose=False)[0]["val_loss"]]
    assert losses[1] < losses[0]


def test_a_trained_lstm_of_other_modes_stays_and_the_report_names_the_price(digits) -> None:
    model, data, _, _ = digits
    other = copy.deepcopy(model)
    statistics = BLNStatsCallback(candidates=["ppcc", "pppp"], log=False)
    L.Trainer(callbacks=[statistics], **QUIET).validate(other, data.val_dataloader(), verbose=False)
    assert statistics.result is not None
    set_mode(other, "ppcc")
    _, report = fold(other, report=True, result=statistics.result)
    affine, own = (number(statistics.result.scores[mode]["val_loss"]) for mode in ("pppp", "ppcc"))
    price = f"pppp would fold: val_loss {affine} instead of {own}"
    assert str(report) == f"lstm: BLNLSTM left alone (mode='ppcc' takes statistics from each input; {price})"


PAPERS: dict[tuple[str, str], tuple[str, int]] = {
    ("cifar10", "bln"): (
        "network.norm1, network.norm2: Normalization left alone (statistics of each position; train with "
        "positions='shared')\n"
        "network.norm3, network.norm4: Normalization -> Identity (in the weights of the Linear behind it)",
        0,
    ),
    ("cifar10", "batch"): (
        "network.norm1: Normalization -> Identity (in the weights of the Conv2d behind it)\n"
        "network.norm2: Normalization -> Affine\n"
        "network.norm3, network.norm4: Normalization -> Identity (in the weights of the Linear behind it)",
        1,
    ),
    ("imdb", "bln"): (
        "network.norm1: Normalization left alone (statistics of each position; train with positions='shared')\n"
        "network.norm2, network.norm3: Normalization -> Affine\n"
        "model: PaperIMDB -> PaperIMDB (cannot be traced, so that norms fold within its parts alone",
        2,
    ),
}
"""Reports on the paper's networks, and the number of ``Affine``."""


@pytest.mark.exact
@pytest.mark.parametrize(("name", "norm"), PAPERS)
def test_the_papers_networks_fold_as_far_as_they_can(name, norm, shared: Path, tmp_path: Path, monkeypatch) -> None:
    def few(directory: Path, **options: Any) -> list[LabelledTexts]:
        texts = read_imdb(directory, **options)
        return [LabelledTexts(one.texts[::50], one.labels[::50], one.classes) for one in texts]

    monkeypatch.setattr(experiments, "read_imdb", few)
    built: list[Classifier] = []
    experiment = experiments.EXPERIMENTS[name]
    samples = experiment.read(shared / "data", False)
    if name == "imdb":
        experiment = dataclasses.replace(experiment, full_size=500 + experiments.VALIDATION_POOL)
    keeps = dataclasses.replace(experiment, build=lambda *made: built.append(experiment.build(*made)) or built[-1])
    fraction = 0.1 if name == "cifar10" else 0.05
    result = run(keeps, *samples, Settings(norm, 0, fraction=fraction, epochs=2, limit=20), tmp_path)
    model = built[0].eval()  # at the best epoch, with the averages of that epoch; the other one shares its weights
    set_mode(model, "pppp")
    plain: Any
    plain, report = fold(model, report=True)
    text, affine = PAPERS[name, norm]
    assert str(report).startswith(text)
    assert sum(isinstance(one, Affine) for one in plain.modules()) == affine
    test = keeps.split(*samples, fraction, 0)[2].batches(25, 40)
    for x, _ in test[:4]:
        assert_folds(model, x, plain)
    with torch.no_grad():
        outputs = torch.cat([plain(x) for x, _ in test])
    labels = torch.cat([y for _, y in test])
    found = float(model.loss(outputs, labels)), float((prediction(outputs) == labels).float().mean())
    scores = result["test"]["paper"]["ppcc" if norm == "batch" else "pppp"]
    assert found == pytest.approx((scores["loss"], scores["acc"]), rel=1e-5)


def prediction(logits: Tensor) -> Tensor:
    return logits.argmax(-1) if logits.ndim == 2 else (logits > 0).long()


@pytest.fixture(scope="module")
def images(shared: Path) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A residual network of BatchNorms after three epochs on a few images, and those it has not seen."""
    torch.manual_seed(0)
    train, _ = read_cifar10(shared / "data")
    x, y = (train.pixels[:2_000].float() / 255 - 0.473) / 0.251, train.labels[:2_000]
    model = residual_network(nn.BatchNorm2d, (8, 8, 16, 32))
    assert isinstance(model, nn.Sequential)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        for batch, labels in DataLoader(list(zip(x[:1_600], y[:1_600], strict=True)), 50, shuffle=True):
            loss = F.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), x[1_600:], y[1_600:]


def fused_blocks(model: nn.Sequential) -> nn.Sequential:
    """Each convolution fused with the norm behind it, one by one, by torch's function."""
    made = copy.deepcopy(model)
    for chain in (made, *(one.body for one in made if isinstance(one, Residual))):
        for place in range(len(chain) - 1):
            if isinstance(chain[place + 1], nn.BatchNorm2d):
                chain[place] = fuse_conv_bn_eval(chain[place], chain[place + 1])
                chain[place + 1] = nn.Identity()
    return made


@pytest.mark.exact
@torch.no_grad()
def test_a_trained_resnet_folds_as_torch_fuses_it(images) -> None:
    model, x, y = images
    plain = fold(model)
    assert has_none_of_ours(plain)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in plain.modules())
    assert_folds(model, x, plain)
    expected = model(x)
    for theirs in (fuse(copy.deepcopy(model)), fused_blocks(model)):
        assert not any(isinstance(one, nn.BatchNorm2d) for one in theirs.modules())
        assert_equal(plain(x), theirs(x))
    for one, other in zip(plain.parameters(), fused_blocks(model).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    accuracy = (expected.argmax(1) == y).float().mean()
    assert accuracy > 0.2  # it has learned
    assert accuracy == (plain(x).argmax(1) == y).float().mean()


@pytest.mark.exact
@pytest.mark.parametrize("mode", ["pppp", "ppcc"])
@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_trained_resnet_in_a_chosen_mode_becomes_a_plain_one(images, mode, is_recomputed) -> None:
    model, x, _ = images
    converted = to_bln(copy.deepcopy(model), norm="keep")
    if is_recomputed:
        recompute_population(converted, x.split(50))
    set_mode(converted, mode)
    plain = fold(converted.eval())
    assert has_none_of_ours(plain)
    kinds = {type(one) for one in plain.modules()} - {Residual}
    allowed = {nn.Sequential, nn.Conv2d, nn.Identity, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert kinds == allowed
    assert_folds(converted, x, plain)
    if not is_recomputed:
        with torch.no_grad():
            assert_equal(plain(x), model(x))
