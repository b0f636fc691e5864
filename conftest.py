"""Names that doctests may use without importing them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lightning_bln._torch import HAS_CUSTOM_OPS

collect_ignore = [] if HAS_CUSTOM_OPS else ["lightning_bln/kernels/custom_ops.py"]

collect_ignore_glob = [
    pattern
    for needed, pattern in {
        "jsonargparse": "lightning_bln/cli/lightning.py",
        "optuna": "lightning_bln/tuning/*.py",
        "ray": "lightning_bln/tuning/ray_engine.py",
    }.items()
    if find_spec(needed) is None
]
"""Modules of extras that are not installed here have no doctests to run."""


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict) -> None:
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
