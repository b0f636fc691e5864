"""The choice of a mode, the published numbers, and the tables that hold both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_bln.reproduce import report
from lightning_bln.reproduce.report import chosen_mode, published, tables, unusable_modes
from lightning_bln.reproduce.training import modes_of

from .small import small_run


def made_result(losses: dict[str, float], norm: str = "bln") -> dict[str, Any]:
    scores = {mode: {"loss": losses.get(mode, 1.0), "acc": 0.5, "acc_authors": 0.5} for mode in modes_of(norm)}
    return {"norm": norm, "validation": {"paper": scores}, "test": {"paper": scores, "recomputed": scores}}


def test_choice_prefers_finite_then_low_then_batch_independent() -> None:
    assert chosen_mode(made_result({"cccc": 0.2, "ppcc": 0.2, "pccc": math.nan}), "paper") == "ppcc"
    assert chosen_mode(made_result({"cccc": 0.1, "ppcc": 0.2}), "paper") == "cccc"
    assert chosen_mode(made_result({"cccc": 0.1, "ppcc": 0.2}), "paper", among=["ppcc", "pppp"]) == "ppcc"
    assert unusable_modes(made_result({"cccp": math.inf, "pccc": math.nan})) == ["pccc", "cccp"]


def test_published_numbers_are_the_authors(shared: Path) -> None:
    theirs = json.loads((shared / "paper_results.json").read_text())["experiments"]
    names = {"bln": "BLN", "batch": "BN", "layer": "LN"}
    assert len(published()) == 6
    for key, norms in published().items():
        name, fraction, size = key.split("-")
        methods = theirs[f"{name}/{'whole' if fraction == '1' else fraction}/{size}"]["methods"]
        for norm, ours in norms.items():
            method = methods[names[norm]]
            assert ours["val_loss"] == pytest.approx(method["history"]["val_loss"], abs=1e-4)
            assert ours["best_epoch"] == method["checkpoint_epoch_lowest_val_loss"]
            if norm == "bln":
                for config, value in method["test_16_configs"].items():
                    mode = config.replace("T", "p").replace("F", "c")
                    assert ours["test"][mode][1] == pytest.approx(value["acc"], abs=1e-4)
            else:
                assert next(iter(ours["test"].values()))[1] == pytest.approx(method["test"]["acc"], abs=1e-4)


def test_paper_stands_beside_ours(tmp_path: Path) -> None:
    result = {**small_run(tmp_path), "fraction": 0.2, "batch_size": 25}
    text = tables([result])
    assert "0.5051" in text  # the paper's best validation loss
    assert "0.7712" in text  # its test accuracy in cccc
    assert "the authors: 0 of 16" in text
    assert "-" in tables([{**result, "fraction": 0.3}])
    assert report.published()["imdb-0.2-bs1"]["bln"]["test"]["pppp"][0] is None
