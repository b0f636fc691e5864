"""One training a trial, scored in every mode."""

from __future__ import annotations

import pytest

pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from optuna.trial import TrialState

from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning.objective import MODE, SCORES

pytestmark = pytest.mark.filterwarnings("ignore")


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
