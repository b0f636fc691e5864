"""Lightning's subcommands and ``sweep`` on the example configuration."""

from __future__ import annotations

import pytest
import torch
import yaml

from lightning_bln import cli
from lightning_bln.demo import DigitRows, RowClassifier
from lightning_bln.modes import ALL_MODES, using_mode

pytest.importorskip("jsonargparse")


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


def chosen_by_hand(model: RowClassifier, batches: int) -> str:
    """The mode with the least validation loss, computed without Trainer or callback."""
    data = DigitRows()
    data.setup()
    model.eval()
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


def test_fit_trains_and_writes_a_checkpoint_that_says_what_it_is_of(trained, load) -> None:
    saved = torch.load(trained, weights_only=True)
    assert yaml.safe_load(saved["bln_config"])["model"]["class_path"] == "lightning_bln.demo.RowClassifier"
    assert (trained.parent / "version_0" / "config.yaml").is_file()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(command, config, trained, capsys) -> None:
    before = trained.read_bytes()
    cli.main([command, "--config", str(config), "--ckpt_path", str(trained)])
    assert {"validate": "val_loss", "test": "test_acc"}[command] in capsys.readouterr().out
    assert trained.read_bytes() == before


def test_predict_saves_predictions(config, trained, tmp_path, load) -> None:
    cli.main(["predict", "--config", str(config), "--ckpt_path", str(trained), "--output", str(tmp_path / "p.pt")])
    predictions = torch.load(tmp_path / "p.pt")
    model, data = load(trained).eval(), DigitRows()
    data.setup()
    with torch.no_grad():
        expected = [model(rows).argmax(-1) for rows, _ in data.test_dataloader()][:2]
    assert_equal(predictions, expected)


def test_sweep_writes_the_best_mode_into_the_checkpoint_and_nothing_else(checkpoint, capsys, load) -> None:
    worst = torch.load(checkpoint, weights_only=True)
    for key in worst["state_dict"]:
        if key.endswith("_extra_state"):
            worst["state_dict"][key] = torch.tensor([False, False, False, False])
    torch.save(worst, checkpoint)
    cli.main(["sweep", "--ckpt", str(checkpoint)])
    swept = torch.load(checkpoint, weights_only=True)
    mode = load(checkpoint).lstm.mode
    assert mode == chosen_by_hand(load(checkpoint), batches=2)
    assert f"wrote {mode} to {checkpoint}" in capsys.readouterr().out
    for callback in swept["callbacks"].values():
        if "result" in callback:
            assert callback["result"]["chosen"] == mode
    for saved in (worst, swept):
        saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.endswith("_extra_state")}
        saved["callbacks"] = {k: v for k, v in saved["callbacks"].items() if "result" not in v}
    assert_equal(worst, swept)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("candidates", ["foldable", "[foldable]", "ppp*"])
def test_candidates_of_a_sweep_limit_the_choice_of_the_configuration(checkpoint, capsys, load, candidates) -> None:
    cli.main(["sweep", "--ckpt", str(checkpoint), "--candidates", candidates])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    scored = {line[0]: line[2:] for line in lines if line and line[0] in ALL_MODES}
    assert "folds" in scored["pppp"][-1]
    if candidates == "ppp*":
        assert {"pppp", "pppc"} <= set(scored)
        assert load(checkpoint).lstm.mode in ("pppp", "pppc")
    else:
        assert set(scored) == {"pppp"}
        assert load(checkpoint).lstm.mode == "pppp"


def test_candidates_of_a_sweep_are_checked_first(checkpoint, capsys) -> None:
    before = checkpoint.read_bytes()
    with pytest.raises((SystemExit, ValueError), match="candidates='most', but it must be"):
        cli.main(["sweep", "--ckpt", str(checkpoint), "--candidates", "most"])
    assert checkpoint.read_bytes() == before


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


def test_a_layer_that_nothing_called_keeps_no_checkpoint_from_a_sweep(checkpoint, config, capsys) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    fresh = RowClassifier(hidden_size=4).state_dict()
    norms = sorted({key.partition(".population.")[0] for key in fresh if ".population." in key})
    uncalled = f"{norms[-1]}.population."
    assert len(norms) > 1
    saved["state_dict"] = {k: fresh[k] if k.startswith(uncalled) else v for k, v in saved["state_dict"].items()}
    torch.save(saved, checkpoint)
    cli.main(["sweep", "--config", str(config), "--ckpt", str(checkpoint)])
    assert "wrote" in capsys.readouterr().out


def test_a_checkpoint_without_a_population_is_not_swept(checkpoint, config, capsys) -> None:
    saved = torch.load(checkpoint, weights_only=True)
    fresh = RowClassifier(hidden_size=4).state_dict()
    saved["state_dict"] = {k: fresh[k] if "population" in k else v for k, v in saved["state_dict"].items()}
    torch.save(saved, checkpoint)
    with pytest.raises(RuntimeError, match="no frozen population"):
        cli.main(["sweep", "--ckpt", str(checkpoint)])


@pytest.mark.parametrize("name", ["direction", "mode"])
def test_a_sweep_without_a_callback_takes_the_direction_by_either_name(
    checkpoint, config, name, tmp_path, capsys
) -> None:
    recipe = yaml.safe_load(config.read_text())
    callbacks = recipe["trainer"]["callbacks"]
    recipe["trainer"]["callbacks"] = [one for one in callbacks if "BLNStats" not in one["class_path"]]
    path = tmp_path / "without.yaml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = ["sweep", "--config", str(path), "--ckpt", str(checkpoint), f"--{name}", "max"]
    cli.main(arguments)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(line[1]) for line in lines if len(line) > 1 and line[0] in ALL_MODES]
    assert len(losses) == 16
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("norm", "expected"), [("batch", {"ppcc", "pccc", "cpcc", "cccc"}), ("layer", {"pppp", "pppc", "ppcp", "ppcc"})]
)
def test_a_sweep_scores_the_modes_that_differ(config, tmp_path, norm, expected, capsys) -> None:
    recipe = yaml.safe_load(config.read_text())
    recipe["model"]["init_args"]["norm"] = norm
    for callback in recipe["trainer"]["callbacks"]:
        if "dirpath" in callback.get("init_args", {}):
            callback["init_args"]["dirpath"] = str(tmp_path)
    path = tmp_path / "norm.yaml"
    path.write_text(yaml.safe_dump(recipe))
    cli.main(["fit", "--config", str(path)])
    capsys.readouterr()
    checkpoint = next(tmp_path.glob("*.ckpt"))
    cli.main(["sweep", "--ckpt", str(checkpoint)])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(line[0] for line in shown if line and line[0] in ALL_MODES) == sorted(expected)
    assert next(line for line in shown if line[:1] == ["wrote"])[1] in expected


def test_a_sweep_refuses_contradictory_directions(checkpoint) -> None:
    with pytest.raises(ValueError, match="direction='min' and mode='max'"):
        cli.main(["sweep", "--ckpt", str(checkpoint), "--direction", "min", "--mode", "max"])
