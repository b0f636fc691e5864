"""Two processes choose one mode and freeze the statistics of all their data."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_run.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("population", ["recompute", "epoch"])
def test_ranks_agree_on_mode_scores_and_statistics(tmp_path: Path, population: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), population, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["ranks_differ"] == 0.0
    assert found["modes_differ"] == 0.0
    assert found["from_truth"] < 2e-6
    for mode, value in found["alone"].items():
        if mode.startswith("pp"):  # what others read of the batch differs, since ranks have other batches
            assert found["scores"][mode] == pytest.approx(value, rel=1e-5)
