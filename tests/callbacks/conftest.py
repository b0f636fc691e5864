"""Makes ``zoo``, the models of these tests, importable, and silences the Trainer."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_bln.callbacks import freezing

# pytest imports tests by path; processes that they start set their own sys.path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which a population was recomputed."""
    steps: list[int] = []
    own = freezing.recompute

    def count(trainer: Any, *args: Any, **options: Any) -> Any:
        steps.append(trainer.global_step)
        return own(trainer, *args, **options)

    monkeypatch.setattr(freezing, "recompute", count)
    return steps
