"""The search: pruning, failures, and several processes on one study."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

import tuning_helpers as helpers
from optuna.trial import TrialState

from lightning_bln.tuning import Recipe, tune
from lightning_bln.tuning.objective import MODE, SCORES
from lightning_bln.tuning.queue import OWNER, SLOT, Store

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_pruner_ends_a_bad_trial_early(pruner, tmp_path) -> None:
    spec = helpers.small_search(epochs=4, log=str(tmp_path / "log")) | {"sampler": "random", "pruner": pruner}
    spec["search"] = {"model.init_args.lr": [1e-2, 1e-9]}
    recipe = Recipe.parse(spec)
    study = tune(recipe, trials=9, output=tmp_path, progress=False)
    states = Counter(one.state for one in study.trials)
    assert states[TrialState.PRUNED] >= 1
    assert states[TrialState.PRUNED] + states[TrialState.COMPLETE] == 9
    for trial in study.get_trials(states=(TrialState.PRUNED,)):
        assert trial.params["model.init_args.lr"] == 1e-9
        assert len(trial.intermediate_values) < 4
    assert len((tmp_path / "log").read_text().splitlines()) == states[TrialState.COMPLETE]


def test_hyperband_and_two_objectives(tmp_path) -> None:
    spec = helpers.small_search()
    hyperband = Recipe.parse(spec | {"pruner": "hyperband"})
    assert len(tune(hyperband, trials=2, output=tmp_path / "a", progress=False).trials) == 2
    both = Recipe.parse(spec | {"latency": True})
    study = tune(both, trials=2, output=tmp_path / "b", progress=False)
    for trial in study.trials:
        loss, milliseconds = trial.values
        assert loss == trial.user_attrs[SCORES][trial.user_attrs[MODE]]
        assert 0 < milliseconds < 1e4
    assert (tmp_path / "b" / "pareto.png").is_file()
    with pytest.raises(ValueError, match="whose directions are"):
        tune(hyperband, trials=2, storage=f"sqlite:///{tmp_path / 'b' / 'study.db'}", progress=False)


def test_a_trial_that_raises_is_kept_as_failed_and_the_search_goes_on(tmp_path) -> None:
    recipe = Recipe.parse(helpers.small_search(fail_once=str(tmp_path / "failed")))
    study = tune(recipe, trials=3, output=tmp_path, progress=False)
    assert [one.state.name for one in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "fails the first time" in study.trials[0].user_attrs["bln_error"]


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    else:
        pytest.importorskip("psycopg", reason="psycopg is not installed; pip install 'lightning-bln[postgresql]'")
        with helpers.postgresql_server() as url:
            yield url


def test_two_processes_finish_a_study_though_one_is_killed(storage, tmp_path) -> None:
    trials = 8
    log, held = tmp_path / "log", tmp_path / "held"
    held.touch()  # nothing is trained to its end before one of the two is dead
    config = tmp_path / "tune.yaml"
    config.write_text(yaml.safe_dump(helpers.small_search(log=str(log), held_by=str(held)) | {"pruner": "none"}))
    command = [sys.executable, "-m", "lightning_bln.cli", "tune", "--config", str(config), "--no-progress"]
    command += ["--trials", str(trials), "--storage", storage, "--heartbeat", "1", "--output", str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            command, env=helpers.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    victim, survivor = processes
    try:
        study = store = None
        deadline = time.monotonic() + 240
        while True:
            assert time.monotonic() < deadline, "the processes did not share the work"
            assert victim.poll() is None, victim.stderr.read()[-2000:]
            assert survivor.poll() is None, survivor.stderr.read()[-2000:]
            time.sleep(0.02)
            try:
                store = store or Store(storage)  # one for all tries: each has connections of its own
                study = study or optuna.load_study(study_name="bln", storage=store.storage)
            except KeyError:
                continue
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owners = {one.user_attrs[OWNER].partition("-")[0] for one in running}
            if owners == {str(one.pid) for one in processes}:
                victim.kill()
                victim.wait()
                held.unlink()
                break
        _, errors = survivor.communicate(timeout=240)
        assert survivor.returncode == 0, errors[-2000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    every = study.get_trials()
    complete = [one for one in every if one.state == TrialState.COMPLETE]
    lost = [one for one in every if one.state != TrialState.COMPLETE]
    assert sorted(one.user_attrs[SLOT] for one in complete) == list(range(trials))
    assert [one.state for one in lost] == [TrialState.FAIL]
    assert lost[0].user_attrs[OWNER].startswith(f"{victim.pid}-")
    again = next(one for one in complete if one.user_attrs[SLOT] == lost[0].user_attrs[SLOT])
    assert lost[0].params.items() <= again.params.items()
    trained = [float(line) for line in log.read_text().splitlines()]
    assert sorted(trained) == sorted(one.params["model.init_args.lr"] for one in complete)


def test_jobs_are_processes_of_their_own(tmp_path) -> None:
    recipe = Recipe.parse(helpers.small_search(log=str(tmp_path / "log")))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in helpers.environment().items():
            patch.setenv(name, value)
        study = tune(recipe, trials=4, jobs=2, output=tmp_path / "out", progress=False)
    assert sorted(one.user_attrs[SLOT] for one in study.trials) == [0, 1, 2, 3]
    assert len((tmp_path / "log").read_text().splitlines()) == 4
