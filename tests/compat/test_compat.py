"""Files that released versions wrote still load, predict the same and go on training."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import torch
import yaml
from torch import Tensor
from torch.torch_version import TorchVersion

import lightning_bln
from lightning_bln._moved import MOVED
from lightning_bln._torch import HAS_CUSTOM_OPS
from tests.compat import cases

RELEASES = sorted(path.parent for path in Path(__file__).parent.glob("*/versions.json"))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
"""Rounding of outputs of order one, which differs between sets of kernels."""
TRAINED = {"rtol": 1e-4, "atol": 1e-5}
"""Two epochs of training on other kernels let rounding grow."""

LAYERS = [(release, name) for release in RELEASES for name in torch.load(release / "state_dicts.pt", weights_only=True)]
CONFIGS = [
    (release, index)
    for release in RELEASES
    for index, _ in enumerate(yaml.safe_load_all((release / "configs.yaml").read_text()))
]
CLASSES = [(release, path) for release in RELEASES for path in json.loads((release / "class_paths.json").read_text())]

each_release = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)


def each(pairs: list[tuple[Path, object]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("release", "name"), pairs, ids=[f"{release.name}-{name}" for release, name in pairs]
    )


def needs_the_versions_of(release: Path) -> None:
    """Skip where torch or lightning is older than what wrote a release's pickles, which neither promises to read."""
    for package, version in json.loads((release / "versions.json").read_text()).items():
        installed = {"torch": torch, "lightning": lightning}[package].__version__
        if TorchVersion(installed) < version:
            pytest.skip(f"pickled under {package} {version}, and {installed} is older")


def import_or_skip(module: str) -> ModuleType:
    """A module of the package; a skip where it needs an extra, or a newer torch, that is not installed."""
    if module == "lightning_bln.kernels.custom_ops" and not HAS_CUSTOM_OPS:
        pytest.skip(f"torch {torch.__version__} has no custom operators")
    try:
        return import_module(module)
    except ImportError as error:
        if error.name is None or error.name.startswith("lightning_bln"):
            raise
        pytest.skip(f"{module} needs {error.name}")


def assert_predicts(layer: torch.nn.Module, kept: dict) -> None:
    found = cases.predictions(layer, kept["x"])
    assert list(found) == list(kept["predictions"])
    torch.testing.assert_close(found, kept["predictions"], **TOLERANCE)


@each(LAYERS)
def test_a_state_dict_gives_a_new_layer_the_kept_predictions(release: Path, name: str) -> None:
    kept = torch.load(release / "state_dicts.pt", weights_only=True)[name]
    make, _ = cases.LAYERS[name]
    layer = make()
    layer.load_state_dict(kept["state_dict"])
    assert_predicts(layer.eval(), kept)


@each(LAYERS)
def test_a_state_dict_is_written_as_it_was_read(release: Path, name: str) -> None:
    kept = torch.load(release / "state_dicts.pt", weights_only=True)[name]["state_dict"]
    make, _ = cases.LAYERS[name]
    layer = make()
    layer.load_state_dict(kept)
    state = layer.state_dict()
    assert list(state) == list(kept)
    torch.testing.assert_close(dict(state), dict(kept), rtol=0, atol=0, equal_nan=True)


@each(LAYERS)
def test_a_pickled_layer_gives_the_kept_predictions(release: Path, name: str) -> None:
    needs_the_versions_of(release)
    layer = torch.load(release / "modules.pt", weights_only=False)[name]
    kept = torch.load(release / "state_dicts.pt", weights_only=True)[name]
    assert type(layer) is type(cases.LAYERS[name][0]())
    assert_predicts(layer, kept)


@each_release
def test_training_goes_on_from_a_checkpoint(release: Path, tmp_path: Path) -> None:
    needs_the_versions_of(release)
    kept = torch.load(release / "resumed.pt", weights_only=True)
    network, callback, trainer = cases.fit(tmp_path, 4, release / "trainer.ckpt", samples=None)  # as it was then
    assert callback.result is not None
    assert str(callback.result.chosen) == kept["mode"]
    assert [row[:3] for row in callback.history] == [row[:3] for row in kept["history"]]
    assert [row[3] for row in callback.history] == pytest.approx([row[3] for row in kept["history"]], rel=1e-3)
    scores = {str(mode): values for mode, values in callback.result.scores.items()}
    assert scores.keys() == kept["scores"].keys()
    for mode, values in kept["scores"].items():
        assert scores[mode] == pytest.approx(values, rel=1e-3)
    assert set(trainer.callback_metrics) >= set(kept["metrics"])
    weights: dict[str, Tensor] = dict(network.state_dict())
    torch.testing.assert_close(weights, dict(kept["state_dict"]), **TRAINED)


@pytest.mark.parametrize("earlier", MOVED)
def test_a_module_that_moved_is_found_by_its_earlier_path(earlier: str) -> None:
    today = import_or_skip(f"lightning_bln.{MOVED[earlier]}")
    name = today.__name__
    assert import_module(f"lightning_bln.{earlier}") is today
    assert today.__name__ == name == today.__spec__.name


@each(CLASSES)
def test_a_class_is_found_where_a_release_had_it(release: Path, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert isinstance(getattr(import_or_skip(module), attribute), type)


@pytest.mark.skipif(find_spec("jsonargparse") is None, reason="needs jsonargparse")
@each(CONFIGS)
def test_a_configuration_builds_model_and_data(release: Path, name: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bln.cli.lightning import CLI

    monkeypatch.setattr("sys.argv", ["bln"])
    recipe = list(yaml.safe_load_all((release / "configs.yaml").read_text()))[name]
    built = CLI(args=recipe, run=False)
    for part, one in (("model", built.model), ("data", built.datamodule)):
        assert type(one).__name__ == recipe[part]["class_path"].rpartition(".")[2]
    callbacks = built.trainer.callbacks
    for callback in recipe["trainer"].get("callbacks", ()):
        # an instance of a subclass where both namespaces of the Trainer are in use
        assert any(isinstance(one, lightning_bln.BLNStatsCallback) for one in callbacks), callback["class_path"]


@pytest.mark.parametrize("name", ["gate_norm", "kernels.reference", "cells.single", "trees"])
def test_moved_modules_are_attributes_of_their_packages(name: str) -> None:
    value: Any = lightning_bln
    for part in name.split("."):
        value = getattr(value, part)
    assert value is import_module(f"lightning_bln.{MOVED[name]}")
    assert value.__spec__.name == value.__name__


@pytest.mark.parametrize(
    "name", ["BACKENDS", "HiddenWeights", "Noise", "Result", "Sequences", "available", "recurrence", "run"]
)
def test_the_kernels_package_has_its_earlier_names(name: str) -> None:
    assert getattr(lightning_bln.kernels, name) is not None


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    for package in (lightning_bln, lightning_bln.kernels, lightning_bln.cells):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018
