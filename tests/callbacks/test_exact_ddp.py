"""On two ranks, too, the table of the callback is that of sixteen plain validations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_run import KINDS
from test_ddp import run

pytestmark = pytest.mark.exact

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tables of all kinds, from one start of two processes."""
    return run("exact_run.py", "all", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks(tables: Any, name: str) -> None:
    assert len(tables[name]) == 2
    for scores, plain, reason in tables[name]:
        assert set(scores) == set(plain)
        for mode, value in plain.items():
            assert scores[mode] == pytest.approx(value, rel=1e-5, abs=1e-6), f"{mode}: {reason}"
        assert len({f"{value:.5g}" for value in plain.values()}) >= 4
