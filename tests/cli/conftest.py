"""The example configuration, made small, and a checkpoint that ``bln fit`` has written by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lightning_bln import cli
from lightning_bln.demo import RowClassifier

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    recipe = yaml.safe_load(EXAMPLE.read_text().replace("runs/digits", str(folder)))
    recipe["model"]["init_args"]["hidden_size"] = 4
    recipe["trainer"] |= {
        "max_epochs": 1,
        "limit_train_batches": 3,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "limit_predict_batches": 2,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    recipe["trainer"]["callbacks"][0]["init_args"] |= {"save_dir": None, "verbose": False, "guard": "off"}
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def trained(config) -> Path:
    cli.main(["fit", "--config", str(config)])
    return config.parent / "digits.ckpt"


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    """A copy that a test may change."""
    path = tmp_path / "copy.ckpt"
    path.write_bytes(trained.read_bytes())
    return path


@pytest.fixture
def load() -> Callable[[Path], RowClassifier]:
    """The model of a checkpoint; not by load_from_checkpoint, since old versions of LightningCLI nest what it reads."""

    def load_model(path: Path) -> RowClassifier:
        model = RowClassifier(hidden_size=4)
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        return model

    return load_model
