"""One training a trial, scored in every mode."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from optuna.trial import TrialState

from lightning_bln.demo import RowClassifier
from lightning_bln.modes import ALL_MODES
from lightning_bln.sweep import SweepResult
from lightning_bln.tuning.objective import MODE, SCORES, monitored

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_trial_trains_once_and_scores_every_mode(searched) -> None:
    folder, study = searched
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(complete) == 5
    assert len((folder / "log of the search").read_text().splitlines()) == 5
    for trial in complete:
        assert set(trial.user_attrs[SCORES]) == set(ALL_MODES)
        assert trial.value == trial.user_attrs[SCORES][trial.user_attrs[MODE]]
        assert list(trial.intermediate_values) == [0, 1]
        assert trial.intermediate_values[1] == pytest.approx(trial.value)


@pytest.mark.parametrize(("norm", "distinct"), [("batch", 4), ("layer", 4), ("bln", 1)])
def test_modes_that_were_not_run_have_the_score_of_their_equals(norm: str, distinct: int) -> None:
    evaluated = {"batch": ["ppcc", "pccc", "cpcc", "cccc"], "layer": ["pppp", "pppc", "ppcp", "ppcc"], "bln": ["cccp"]}
    scores = {mode: {"val_loss": float(place), "val_acc": 1.0} for place, mode in enumerate(evaluated[norm])}
    found = monitored(SweepResult(scores, "val_loss"), RowClassifier(hidden_size=4, norm=norm))
    assert list(found) == (["cccp"] if norm == "bln" else list(ALL_MODES))
    assert len(set(found.values())) == distinct
    half = slice(0, 2) if norm == "batch" else slice(2, 4)
    for mode, values in scores.items():
        assert {value for name, value in found.items() if name[half] == mode[half]} == {values["val_loss"]}
