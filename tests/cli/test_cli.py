"""Lightning's subcommands on the example configuration, and the mode written into a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

from lightning_bln import cli
from lightning_bln.cli.checkpoint import write_mode
from lightning_bln.demo import DigitRows, RowClassifier
from lightning_bln.modes import ALL_MODES, set_mode, using_mode

pytest.importorskip("jsonargparse")

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The example, made small."""
    folder = tmp_path_factory.mktemp("digits")
    recipe = yaml.safe_load(EXAMPLE.read_text().replace("runs/digits", str(folder)))
    recipe["model"]["init_args"]["hidden_size"] = 4
    recipe["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 3,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "limit_predict_batches": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    recipe["trainer"]["callbacks"][0]["init_args"] |= {"save_dir": None, "verbose": False, "guard": "off"}
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def trained(config) -> Path:
    cli.main(["fit", "--config", str(config)])
    return config.parent / "digits.ckpt"


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    path = tmp_path / "copy.ckpt"
    path.write_bytes(trained.read_bytes())
    return path


def load(path: Path) -> RowClassifier:
    """The model of a checkpoint; not by load_from_checkpoint, since old versions of LightningCLI nest what it reads."""
    model = RowClassifier(hidden_size=4)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model


def assert_equal(a: object, b: object) -> None:
    """Equality of what a checkpoint holds, entry by entry."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def chosen_by_hand(checkpoint: Path, batches: int) -> str:
    """The mode with the least validation loss, computed without Trainer or callback."""
    model, data = load(checkpoint).eval(), DigitRows()
    data.setup()
    losses = {}
    for mode in ALL_MODES:
        total, count = 0.0, 0
        with using_mode(model, mode), torch.no_grad():
            for index, (rows, labels) in enumerate(data.val_dataloader()):
                if index < batches:
                    total += float(torch.nn.functional.cross_entropy(model(rows), labels, reduction="sum"))
                    count += len(labels)
        losses[mode] = total / count
    return min(losses, key=losses.__getitem__)


def test_fit_trains_and_writes_a_checkpoint_that_says_what_it_is_of(trained) -> None:
    saved = torch.load(trained, weights_only=True)
    assert yaml.safe_load(saved["bln_config"])["model"]["class_path"] == "lightning_bln.demo.RowClassifier"
    assert (trained.parent / "version_0" / "config.yaml").is_file()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(command, config, trained, capsys) -> None:
    before = trained.read_bytes()
    cli.main([command, "--config", str(config), "--ckpt_path", str(trained)])
    assert {"validate": "val_loss", "test": "test_acc"}[command] in capsys.readouterr().out
    assert trained.read_bytes() == before


def test_predict_saves_predictions(config, trained, tmp_path) -> None:
    cli.main(["predict", "--config", str(config), "--ckpt_path", str(trained), "--output", str(tmp_path / "p.pt")])
    predictions = torch.load(tmp_path / "p.pt")
    model, data = load(trained).eval(), DigitRows()
    data.setup()
    with torch.no_grad():
        expected = [model(rows).argmax(-1) for rows, _ in data.test_dataloader()][:2]
    assert_equal(predictions, expected)


def test_sweep_writes_the_best_mode_into_the_checkpoint_and_nothing_else(checkpoint, capsys) -> None:
    worst = torch.load(checkpoint, weights_only=True)
    for key in worst["state_dict"]:
        if key.endswith("_extra_state"):
            worst["state_dict"][key] = torch.tensor([False, False, False, False])
    torch.save(worst, checkpoint)
    cli.main(["sweep", "--ckpt", str(checkpoint)])
    swept = torch.load(checkpoint, weights_only=True)
    mode = load(checkpoint).lstm.mode
    assert mode == chosen_by_hand(checkpoint, batches=2)
    assert f"wrote {mode} to {checkpoint}" in capsys.readouterr().out
    for callback in swept["callbacks"].values():
        if "result" in callback:
            assert callback["result"]["chosen"] == mode
    for saved in (worst, swept):
        saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.endswith("_extra_state")}
        saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "result" not in v}
    assert_equal(worst, swept)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_sweep_needs_a_configuration_for_a_foreign_checkpoint(checkpoint, config, capsys) -> None:
    foreign = torch.load(checkpoint, weights_only=True)
    del foreign["bln_config"], foreign["callbacks"]
    torch.save(foreign, checkpoint)
    with pytest.raises(SystemExit, match="pass --config too"):
        cli.main(["sweep", "--ckpt", str(checkpoint)])
    other = checkpoint.with_name("other.ckpt")
    before = checkpoint.read_bytes()
    cli.main(["sweep", "--config", str(config), "--ckpt", str(checkpoint), "--output", str(other)])
    assert checkpoint.read_bytes() == before
    assert_equal(torch.load(other)["optimizer_states"], foreign["optimizer_states"])


def test_a_checkpoint_survives_a_write_that_fails(checkpoint, monkeypatch) -> None:
    model = load(checkpoint)
    set_mode(model, "cccc")
    before = checkpoint.read_bytes()

    def run_out_of_space(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", run_out_of_space)
    with pytest.raises(OSError, match="no space"):
        write_mode(checkpoint, model)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_mode_of_another_model_is_refused(checkpoint) -> None:
    other = torch.nn.Sequential(copy.deepcopy(RowClassifier(hidden_size=4).lstm))
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="not of this Sequential"):
        write_mode(checkpoint, other)
    assert checkpoint.read_bytes() == before


def test_a_link_to_a_checkpoint_stays_a_link(checkpoint) -> None:
    link = checkpoint.with_name("last.ckpt")
    link.symlink_to(checkpoint.name)
    model = load(checkpoint)
    set_mode(model, "cpcp")
    write_mode(link, model)
    assert link.is_symlink()
    assert load(checkpoint).lstm.mode == "cpcp"


def test_a_checkpoint_without_a_population_is_not_swept(checkpoint, config, capsys) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    fresh = RowClassifier(hidden_size=4).state_dict()
    saved["state_dict"] = {k: fresh[k] if "population" in k else v for k, v in saved["state_dict"].items()}
    torch.save(saved, checkpoint)
    with pytest.raises(RuntimeError, match="no frozen population"):
        cli.main(["sweep", "--ckpt", str(checkpoint)])


def test_help_lists_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for command in ("demo", *cli.LIGHTNING):
        assert command in printed
