"""Checkpoints whose configuration names code from elsewhere, and damaged ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_bln import cli
from lightning_bln._files import FileError

from ..damage import OTHER_FORMATS, assert_names, flipped, outcome, truncated

pytest.importorskip("jsonargparse")

from lightning_bln.cli.lightning import with_value
from lightning_bln.cli.trust import check_trust, import_paths, read_config

MODULE = "stranger_module"


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file that a stranger's module writes when it is imported."""
    folder, path = tmp_path / "path", tmp_path / "ran"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(
        f"open({str(path)!r}, 'w').close()\nfrom lightning_bln.demo import RowClassifier as Model, DigitRows as Data\n"
        "from lightning import Callback as Call\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield path
    sys.modules.pop(MODULE, None)


def set_model(recipe: dict[str, Any]) -> None:
    recipe["model"]["class_path"] = f"{MODULE}.Model"


def set_model_alone(recipe: dict[str, Any]) -> None:
    recipe["model"] = f"{MODULE}.Model"


def set_model_text(recipe: dict[str, Any]) -> None:
    recipe["model"] = yaml.safe_dump({"class_path": f"{MODULE}.Model", "init_args": {"hidden_size": 4}})


def set_model_json(recipe: dict[str, Any]) -> None:
    recipe["model"] = f'{{"class_path": "{MODULE}.Model", "init_args": {{"hidden_size": 4}}}}'


def set_data(recipe: dict[str, Any]) -> None:
    recipe["data"]["class_path"] = f"{MODULE}.Data"


def add_callback(recipe: dict[str, Any]) -> None:
    recipe["trainer"]["callbacks"].append({"class_path": f"{MODULE}.Call"})


def set_logger(recipe: dict[str, Any]) -> None:
    recipe["trainer"]["logger"] = {"class_path": f"{MODULE}.Logger"}


def set_optimizer(recipe: dict[str, Any]) -> None:
    recipe["optimizer"] = {"class_path": f"{MODULE}.Optimizer", "init_args": {"lr": 0.1}}


def set_argument(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"]["norm"] = f"{MODULE}.norm"


def set_nested(recipe: dict[str, Any]) -> None:
    recipe["model"]["init_args"]["norm"] = [{"deep": ({"class_path": f"{MODULE}.Norm"},)}]


CHANGES = [
    set_model,
    set_model_alone,
    set_model_text,
    set_model_json,
    set_data,
    add_callback,
    set_logger,
    set_optimizer,
    set_argument,
    set_nested,
]


def change_config(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    recipe = yaml.safe_load(saved["bln_config"])
    change(recipe)
    saved["bln_config"] = yaml.safe_dump(recipe)
    torch.save(saved, checkpoint)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [[], ["--trust=false"], ["--trust", "false"]], ids=" ".join)
def test_foreign_classes_in_a_checkpoint_need_a_word_of_consent(change, options, checkpoint, marker) -> None:
    change_config(checkpoint, change)
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match=rf"{checkpoint} asks for '{MODULE}\.\w+'.*--trust"):
        cli.main(["sweep", "--ckpt", str(checkpoint), *options])
    assert not marker.exists()
    assert MODULE not in sys.modules
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("options", [["--trust"], ["--trust=true"], ["--trust", "true"]], ids=" ".join)
def test_with_consent_they_run(options, checkpoint, marker, load) -> None:
    change_config(checkpoint, set_model)
    cli.main(["sweep", "--ckpt", str(checkpoint), *options])
    assert marker.exists()


def test_a_file_that_a_configuration_names_is_looked_into(checkpoint, marker, tmp_path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"class_path": f"{MODULE}.Model"}))
    change_config(checkpoint, lambda recipe: recipe.update(model=str(other)))
    with pytest.raises(SystemExit, match=MODULE):
        cli.main(["sweep", "--ckpt", str(checkpoint)])
    assert not marker.exists()


def test_classes_that_the_user_names_as_well_need_no_consent(checkpoint, config, marker, tmp_path) -> None:
    change_config(checkpoint, set_model)
    recipe = yaml.safe_load(config.read_text())
    set_model(recipe)
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(recipe))
    cli.main(["sweep", "--config", str(own), "--ckpt", str(checkpoint)])
    assert marker.exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_hyperparameters_that_name_a_foreign_class_need_consent(command, checkpoint, config, marker) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    saved["hyper_parameters"] = {"_class_path": f"{MODULE}.Model", "_instantiator": "lightning.pytorch.cli.x"}
    torch.save(saved, checkpoint)
    with pytest.raises(SystemExit, match=rf"asks for '{MODULE}\.Model'.*--trust"):
        cli.main([command, "--config", str(config), "--ckpt_path", str(checkpoint)])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["sweep", "--trust"], ["sweep", "--trust=true"]),
        (["sweep", "--trust", "--ckpt", "x"], ["sweep", "--trust=true", "--ckpt", "x"]),
        (["sweep", "--trust", "false"], ["sweep", "--trust=false"]),
        (["sweep", "--trust=true"], ["sweep", "--trust=true"]),
        (["sweep", "true"], ["sweep", "true"]),
    ],
)
def test_consent_is_one_word(args, expected) -> None:
    assert with_value(args, "--trust") == expected


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"class_path": "lightning_bln.demo.RowClassifier", "init_args": {"norm": "bln", "lr": 1e-3}}},
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]}},
        {"trainer": {"callbacks": [{"class_path": "pytorch_lightning.callbacks.EarlyStopping"}]}},
        {"optimizer": {"class_path": "torch.optim.Adam"}},
        {"metric": "torchmetrics.Accuracy"},
        {"optimizer": {"class_path": "Adam"}},
        {"trainer": {"default_root_dir": "runs/digits", "devices": "auto", "precision": "16-mixed"}},
        {"data": {"file": "nowhere.ckpt", "host": "example.org", "version": "1.2.3", "text": "a: b\n- c"}},
        {"a": None, "b": 1.5, "c": [True, "", "~", "[", "{", "'"]},
    ],
)
def test_what_leads_out_of_no_trusted_package_passes(config) -> None:
    check_trust(Path("file"), config)
    assert [*import_paths(config)] == []


@pytest.mark.parametrize(
    "path", ["torchevil.Model", "lightning_bln_evil.Model", "os.system", "evil.Model", "_torch.Model", "torch_.Model"]
)
def test_only_whole_names_of_packages_are_trusted(path) -> None:
    with pytest.raises(FileError, match=rf"file asks for '{path}'"):
        check_trust(Path("file"), {"model": {"class_path": path}})


@pytest.mark.parametrize("text", [None, 7, b"a: 1", "a: [", "- a", "", "\x00", "[" * 5000])
def test_a_configuration_that_is_none_names_its_file(text) -> None:
    with pytest.raises(FileError, match=r"^file: its configuration is no YAML"):
        read_config(text, Path("file"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(damage, checkpoint) -> None:
    raw = checkpoint.read_bytes()
    kinds = {"truncated": truncated(raw), "flipped": flipped(raw, 40), "other": OTHER_FORMATS.values()}
    for changed in kinds[damage]:
        checkpoint.write_bytes(changed)
        found, message = outcome(lambda: cli.main(["sweep", "--ckpt", str(checkpoint)]) or True, SystemExit)
        if found is None:
            assert_names(message, checkpoint)
            assert checkpoint.read_bytes() == changed
        else:  # in padding, or a field that nothing reads
            assert damage == "flipped"


@pytest.mark.parametrize("content", [[1], torch.ones(2), {}, {"state_dict": 1}, {"state_dict": {}, "bln_config": 7}])
def test_a_file_of_another_content_is_named(content, tmp_path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(SystemExit, match=rf"bln sweep: {path}"):
        cli.main(["sweep", "--ckpt", str(path)])


def test_a_file_that_would_run_code_says_so(tmp_path) -> None:
    path = tmp_path / "code.pt"
    torch.save({"state_dict": {}, "x": Path("a")}, path)
    with pytest.raises(
        SystemExit, match=rf"{path} holds more than tensors and plain values; if you trust it"
    ) as caught:
        cli.main(["sweep", "--ckpt", str(path)])
    assert "\n" not in str(caught.value)
