"""The best configuration, the variance explained, and the plots."""

from __future__ import annotations

import json

import pytest
import yaml

optuna = pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

from optuna.trial import create_trial

from lightning_bln import cli
from lightning_bln.modes import ALL_MODES
from lightning_bln.tuning import explained_variance
from lightning_bln.tuning.objective import MODE, SCORES

pytestmark = pytest.mark.filterwarnings("ignore")


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
