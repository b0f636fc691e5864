"""Hyperparameters and their distributions."""

from __future__ import annotations

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from optuna.trial import FixedTrial

from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning import Distribution, suggest_mode, suggest_norm

pytestmark = pytest.mark.filterwarnings("ignore")


def test_modes_and_norms_are_hyperparameters() -> None:
    assert suggest_mode(FixedTrial({"mode": "cpcp"})) == "cpcp"
    assert suggest_norm(FixedTrial({"norm": "batch"})) == "batch"
    study = optuna.create_study()
    trial = study.ask()
    suggest_mode(trial)
    assert trial.distributions["mode"].choices == tuple(ALL_MODES)


def test_a_number_that_yaml_reads_as_text_is_one() -> None:
    assert Distribution.parse("lr", {"low": "1e-4", "high": "1e-2", "log": True}).low == 1e-4
