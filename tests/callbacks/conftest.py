"""Makes ``zoo``, the models of these tests, importable, and silences the Trainer."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

# pytest imports tests by path; processes that they start set their own sys.path
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
