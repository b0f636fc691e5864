"""The models of these tests lie beside them, and a Trainer that says nothing."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

# tests are imported by path, so what they share must be findable; processes they start inherit nothing of it
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
