"""The configuration of a search."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("jsonargparse")
pytest.importorskip("optuna_integration")

import tuning_helpers as helpers

from lightning_bln.tuning import Recipe, tune
from lightning_bln.tuning.recipe import DEMO, set_path

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_the_example_is_the_demo() -> None:
    path = Path(__file__).parents[2] / "examples" / "tune.yaml"
    assert Recipe.load(path) == Recipe.parse(DEMO)
