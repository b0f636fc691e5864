"""Shared fixtures: where the data of the authors lies, and calm threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("BLN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data sets and the authors' results; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"no data folder at {SHARED}; point BLN_SHARED at one")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
