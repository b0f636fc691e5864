"""The search: one training a trial, pruning, a queue of exactly so many trials, and a report that trains again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

sys.path.insert(0, str(Path(__file__).parent))

import tuning_helpers as helpers
from optuna.trial import FixedTrial, TrialState, create_trial

from lightning_bln import cli
from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning import (
    Distribution,
    Recipe,
    explained_variance,
    suggest_mode,
    suggest_norm,
    tune,
)
from lightning_bln.tuning.objective import MODE, SCORES
from lightning_bln.tuning.queue import OWNER, SLOT, Queue, Store
from lightning_bln.tuning.recipe import DEMO, set_path

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished search of five trials, with the file each training leaves a line in."""
    folder = tmp_path_factory.mktemp("search")
    config = folder / "tune.yaml"
    config.write_text(yaml.safe_dump(helpers.small_search(epochs=2, log=str(folder / "log"))))
    cli.main(["tune", "--config", str(config), "--trials", "5", "--output", str(folder / "out"), "--no-progress"])
    study = optuna.load_study(study_name="bln", storage=f"sqlite:///{folder / 'out' / 'study.db'}")
    return folder, study


def test_modes_and_norms_are_hyperparameters() -> None:
    assert suggest_mode(FixedTrial({"mode": "cpcp"})) == "cpcp"
    assert suggest_norm(FixedTrial({"norm": "batch"})) == "batch"
    study = optuna.create_study()
    trial = study.ask()
    suggest_mode(trial)
    assert trial.distributions["mode"].choices == tuple(ALL_MODES)


def test_a_trial_trains_once_and_scores_every_mode(searched) -> None:
    folder, study = searched
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) == 5
    assert len((folder / "log").read_text().splitlines()) == 5
    for trial in complete:
        assert set(trial.user_attrs[SCORES]) == set(ALL_MODES)
        assert trial.value == trial.user_attrs[SCORES][trial.user_attrs[MODE]]
        assert list(trial.intermediate_values) == [0, 1]
        assert trial.intermediate_values[1] == pytest.approx(trial.value)


def test_the_best_configuration_is_one_that_bln_fit_accepts_and_scores_the_same(searched, tmp_path) -> None:
    folder, study = searched
    best = yaml.safe_load((folder / "out" / "best.yaml").read_text())
    assert best["model"]["init_args"]["lr"] == study.best_params["model.init_args.lr"]
    best["trainer"]["callbacks"][0]["init_args"] |= {"save_dir": str(tmp_path), "verbose": False}
    best["trainer"] |= {
        "default_root_dir": str(tmp_path),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    (tmp_path / "best.yaml").write_text(yaml.safe_dump(best))
    cli.main(["fit", "--config", str(tmp_path / "best.yaml")])
    result = json.loads((tmp_path / "bln_sweep.json").read_text())
    assert result["scores"][result["chosen"]]["val_loss"] == pytest.approx(study.best_value, rel=1e-6)


def test_the_report_has_plots_and_the_share_of_the_mode(searched) -> None:
    folder, _ = searched
    shares = json.loads((folder / "out" / "importance.json").read_text())
    assert set(shares) == {"model.init_args.lr", "model.init_args.norm", "statistics mode"}
    assert 0 < sum(shares.values()) <= 1 + 1e-6
    for name in ("history", "slice", "parallel", "importance", "modes", "curves"):
        assert (folder / "out" / f"{name}.png").stat().st_size > 1000
    assert len((folder / "out" / "trials.csv").read_text().splitlines()) == 6


def swept_study(score) -> optuna.Study:
    """Trials of one hyperparameter x, whose modes score ``score(x, place of the mode)``."""
    study = optuna.create_study()
    for x in (value / 10 for value in range(10)):
        scores = {mode: score(x, place) for place, mode in enumerate(ALL_MODES)}
        study.add_trial(
            create_trial(
                params={"x": x},
                distributions={"x": optuna.distributions.FloatDistribution(0, 1)},
                value=min(scores.values()),
                user_attrs={SCORES: scores, MODE: min(scores, key=scores.get)},
            )
        )
    return study


@pytest.mark.parametrize(
    ("score", "share"),
    [(lambda x, place: float(place in (3, 7)), 1.0), (lambda x, place: x, 0.0), (lambda x, place: x + place / 16, 0.5)],
    ids=["mode alone", "x alone", "both alike"],
)
def test_the_mode_explains_what_it_does(score, share) -> None:
    shares = explained_variance(swept_study(score))
    assert shares["statistics mode"] == pytest.approx(share, abs=0.1)
    assert shares["x"] == pytest.approx(1 - share, abs=0.1)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruner": "best"}, "pruner='best'"),
        ({"search": {}}, "search is empty"),
        ({"trainer": {}}, "may have monitor"),
        ({"search": {"model.init_args.lr": {"low": 2, "high": 1}}}, "at most high"),
        ({"search": {"model.init_args.lr": {"from": 1}}}, "is no distribution"),
        ({"search": {"trainer.max_epochs.x": [1]}}, "leads nowhere"),
        ({"search": {"model.init_args.depth": [1, 2]}}, "cannot be built"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_stored(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        tune(Recipe.parse(helpers.small_search() | change), output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_path_may_lead_into_a_list() -> None:
    config = {"trainer": {"callbacks": [{"init_args": {"monitor": "a"}}]}}
    set_path(config, "trainer.callbacks.0.init_args.monitor", "b")
    assert config["trainer"]["callbacks"][0]["init_args"]["monitor"] == "b"
    assert Distribution.parse("lr", {"low": "1e-4", "high": "1e-2", "log": True}).low == 1e-4


def test_the_example_is_the_demo() -> None:
    path = Path(__file__).parents[2] / "examples" / "tune.yaml"
    assert Recipe.load(path) == Recipe.parse(DEMO)


@pytest.mark.parametrize("kind", ["sqlite:///", "journal:"])
def test_a_killed_study_goes_on_where_it_was(kind, tmp_path) -> None:
    url = f"{kind}{tmp_path / 'study'}"

    def queue(trials: int) -> Queue:
        store = Store(url)
        study = optuna.create_study(storage=store.storage, study_name="s", load_if_exists=True)
        return Queue(store, study, trials)

    first = queue(3)
    one = first.claim()
    first.study.tell(one, one.suggest_float("x", 0, 1))
    two = first.claim()
    x = two.suggest_float("x", 0, 1)
    second = queue(3)
    three = second.claim()
    assert three.number == 2
    assert second.claim() is None  # two still runs
    assert not second.is_finished()
    first._lock.release()  # as the system does when a process dies
    again = second.claim()
    assert again.suggest_float("x", 0, 1) == x
    assert again.user_attrs[SLOT] == two.user_attrs[SLOT]
    second.study.tell(again, 0.0)
    second.study.tell(three, 0.0)
    assert second.claim() is None
    assert second.is_finished()
    assert len(second.finished()) == 3
    longer = queue(4)
    assert longer.claim().number == 4
    assert longer.claim() is None


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
    log = tmp_path / "log"
    config = tmp_path / "tune.yaml"
    config.write_text(yaml.safe_dump(helpers.small_search(log=str(log), wait=0.3) | {"pruner": "none"}))
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
        study = None
        deadline = time.monotonic() + 240
        while True:
            assert time.monotonic() < deadline, "the processes did not share the work"
            assert victim.poll() is None, victim.stderr.read()[-2000:]
            assert survivor.poll() is None, survivor.stderr.read()[-2000:]
            time.sleep(0.02)
            try:
                study = study or optuna.load_study(study_name="bln", storage=Store(storage).storage)
            except KeyError:
                continue
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            owners = {one.user_attrs[OWNER].partition("-")[0] for one in running}
            if owners == {str(one.pid) for one in processes}:
                victim.send_signal(signal.SIGKILL)
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
