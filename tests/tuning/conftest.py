"""Makes ``tuning_helpers`` importable, and runs a search that several files test."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml

# pytest imports tests by path
sys.path.insert(0, str(Path(__file__).parent))

import tuning_helpers as helpers

from lightning_bln import cli


@pytest.fixture(scope="session")
def searched(tmp_path_factory):
    """A finished search of five trials, with the file each training leaves a line in."""
    import optuna

    folder = tmp_path_factory.mktemp("search")
    config = folder / "tune.yaml"
    config.write_text(yaml.safe_dump(helpers.small_search(epochs=2, log=str(folder / "log"))))
    cli.main(["tune", "--config", str(config), "--trials", "5", "--output", str(folder / "out"), "--no-progress"])
    shutil.copy(folder / "log", folder / "log of the search")  # to train the best one again adds a line
    study = optuna.load_study(study_name="bln", storage=f"sqlite:///{folder / 'out' / 'study.db'}")
    return folder, study
