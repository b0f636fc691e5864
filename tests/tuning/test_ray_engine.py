"""The search on Ray: two local workers, a trial that fails once, and the same report."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import yaml

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'lightning-bln[ray]'")
pytest.importorskip("ray.tune")
pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")

import tuning_helpers as helpers
from optuna.trial import TrialState

from lightning_bln import cli
from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning import Distribution, Recipe
from lightning_bln.tuning.objective import MODE, SCORES
from lightning_bln.tuning.ray_engine import as_domain, tune_on_ray

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.exact
def test_two_workers_finish_every_trial_though_one_failed_once(tmp_path, monkeypatch) -> None:
    for name, value in helpers.environment().items():
        monkeypatch.setenv(name, value)
    model = {"log": str(tmp_path / "log"), "fail_once": str(tmp_path / "failed")}
    recipe = Recipe.parse(helpers.small_search(epochs=2, **model) | {"pruner": "none"})
    study = tune_on_ray(recipe, trials=4, jobs=2, output=tmp_path / "out", progress=False)

    assert (tmp_path / "failed").exists()
    assert [one.state for one in study.trials] == [TrialState.COMPLETE] * 4
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    for trial in study.trials:
        assert set(trial.user_attrs[SCORES]) == set(ALL_MODES)
        assert trial.value == pytest.approx(trial.user_attrs[SCORES][trial.user_attrs[MODE]])
        assert len(trial.intermediate_values) == 2
    hosts = [json.loads(path.read_text().splitlines()[-1]) for path in (tmp_path / "out" / "bln").glob("*/result.json")]
    assert len({one["pid"] for one in hosts}) > 1

    assert list((tmp_path / "out" / "bln").glob("**/checkpoint.ckpt"))
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["model"]["init_args"]["lr"] == pytest.approx(study.best_params["model.init_args.lr"])
    assert "statistics mode" in json.loads((tmp_path / "out" / "importance.json").read_text())


@pytest.mark.exact
def test_on_a_cluster_a_failed_trial_goes_on_from_its_checkpoint(tmp_path) -> None:
    """The command on a cluster that was there before; a trial that fails in its third epoch is run again from there."""
    model = {"epochs_log": str(tmp_path / "epochs"), "fail_once": str(tmp_path / "failed"), "fail_epoch": 2}
    spec = helpers.small_search(epochs=4, **model) | {"search": {"model.init_args.lr": [1e-2]}, "pruner": "none"}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "lightning_bln.cli", "tune", "--engine", "ray", "--trials", "1", "--no-progress"]
    command += ["--config", str(tmp_path / "tune.yaml"), "--output", str(tmp_path / "out")]
    with helpers.ray_cluster() as (address, allowed):
        done = subprocess.run(
            [*command, "--address", address], env=allowed, capture_output=True, text=True, timeout=400, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr[-3000:]
    started = [tuple(map(float, line.split())) for line in (tmp_path / "epochs").read_text().splitlines()]
    # rate, epoch and step, of which there are two an epoch: weights and optimizer go on, not the count of epochs alone
    assert started == [(1e-2, 0, 0), (1e-2, 1, 2), (1e-2, 2, 4), (1e-2, 2, 4), (1e-2, 3, 6)]
    with (tmp_path / "out" / "trials.csv").open() as file:
        assert [one["state"] for one in csv.DictReader(file)] == ["COMPLETE"]


def test_two_objectives_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="one objective"):
        tune_on_ray(Recipe.parse(helpers.small_search() | {"latency": True}), output=tmp_path)
    with pytest.raises(SystemExit, match="--storage is for --engine optuna"):
        cli.main(["tune", "--engine", "ray", "--storage", "sqlite:///x"])
    with pytest.raises(SystemExit, match="--address=auto is for --engine ray"):
        cli.main(["tune", "--address", "auto"])


@pytest.mark.parametrize(
    ("distribution", "low", "high"),
    [
        (Distribution(low=1, high=3), 1, 3),
        (Distribution(low=1, high=100, log=True), 1, 100),
        (Distribution(low=2, high=8, step=2), 2, 8),
        (Distribution(low=0.1, high=0.2), 0.1, 0.2),
        (Distribution(low=1e-4, high=1e-2, log=True), 1e-4, 1e-2),
        (Distribution(choices=(4, 5)), 4, 5),
    ],
)
def test_ray_draws_from_the_same_ranges(distribution, low, high) -> None:
    values = [as_domain(distribution).sample() for _ in range(300)]
    assert low <= min(values)
    assert max(values) <= high
    if distribution.is_integer:
        assert {type(value) for value in values} <= {int} or all(float(value).is_integer() for value in values)
        assert max(values) == high or distribution.log
