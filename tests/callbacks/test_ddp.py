"""Two processes choose one mode and freeze the statistics of all their data."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch.distributed import fsdp

from lightning_bln import BatchLayerNorm
from lightning_bln._torch import ignore_in_ddp
from lightning_bln.callbacks.stats import population_buffers

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def run(script: str, case: str, folder: Path) -> Any:
    """What rank 0 of two writes down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    out = folder / "found.json"
    command = [sys.executable, str(Path(__file__).with_name(script)), case, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_names_that_ddp_ignores_follow_the_model_and_are_a_list_in_copies() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model._ddp_params_and_buffers_to_ignore = ["0.mine"]  # type: ignore[assignment]
    for _ in range(2):  # as two fits do
        ignore_in_ddp(model, population_buffers)
    model.append(BatchLayerNorm(2))
    expected = ["0.mine", *(f"1.population.{name}" for name, _ in model[1].population.named_buffers())]
    assert len(expected) > 5
    assert list(model._ddp_params_and_buffers_to_ignore) == expected  # type: ignore[arg-type]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._ddp_params_and_buffers_to_ignore == expected


@pytest.mark.parametrize("population", ["recompute", "epoch"])
def test_ranks_agree_on_mode_scores_and_statistics(tmp_path: Path, population: str) -> None:
    found = run("ddp_run.py", population, tmp_path)
    assert found["ranks_differ"] == 0.0
    assert found["modes_differ"] == 0.0
    assert found["from_truth"] < 2e-6
    for mode, value in found["alone"].items():
        if mode.startswith("pp"):  # what others read of the batch differs, since ranks have other batches
            assert found["scores"][mode] == pytest.approx(value, rel=1e-5)


@pytest.mark.exact
@pytest.mark.parametrize("case", ["recompute", "epoch", "buffer"])
def test_uneven_data_count_by_what_each_rank_has(tmp_path: Path, case: str) -> None:
    found = run("uneven_run.py", case, tmp_path)
    assert found["ranks_differ"] == 0.0
    assert found["modes_differ"] == 0.0
    assert not found["results_differ"]
    assert found["positions"] == 7
    assert found["from_truth"] < 2e-6
    # one process has the very batches of both ranks, so all modes must agree, those that read the batch too
    assert set(found["scores"]) == set(found["alone"])
    for mode, value in found["alone"].items():
        assert found["scores"][mode] == pytest.approx(value, rel=2e-5)


NEEDS_TWO_GPUS = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="FullyShardedDataParallel and the Trainer's FSDPStrategy refuse the CPU; needs two GPUs",
)

NEEDS_FULLY_SHARD = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"),
    reason="fully_shard is public from torch 2.6 on; the prototype in torch 2.3 cannot run without CUDA's streams",
)
CASES = [pytest.param("fsdp", marks=NEEDS_TWO_GPUS), pytest.param("fsdp2", marks=NEEDS_FULLY_SHARD)]


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_have_the_population_and_mode_of_all_data(tmp_path: Path, case: str) -> None:
    found = run("sharded_run.py", case, tmp_path)
    assert found["ranks_differ"] == 0.0
    assert found["modes_differ"] == 0.0
    assert found["saved_differs"] == 0.0
    assert found["from_truth"] < 2e-6
    assert found["mode"] == found["chosen"]
    for mode, value in found["alone"].items():
        assert found["scores"][mode] == pytest.approx(value, rel=2e-5)


@pytest.mark.exact
@pytest.mark.parametrize("hook", ["init", "setup", "configure_model"])
def test_layers_made_late_gather_from_all_ranks_too(tmp_path: Path, hook: str) -> None:
    assert run("ranks_run.py", f"late:{hook}", tmp_path)["off"] < 1e-6


@pytest.mark.exact
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("val_loss/other", "rank 1 did not log it; log it on every rank"),
        ("other/val_loss", "rank 0 did not log it; log it on every rank"),
        ("one/other", "the validation logged one, other;"),
        ("val_loss extra/val_loss", ""),  # what only one rank logs is its own business, unless it is monitored
    ],
)
def test_a_monitor_that_a_rank_lacks_is_an_error_on_all(tmp_path: Path, names: str, words: str) -> None:
    errors = run("ranks_run.py", f"uneven:{names}", tmp_path)
    assert errors[0] == errors[1]
    assert words in errors[0]
    assert bool(words) == ("monitor='val_loss'" in errors[0])


@pytest.mark.parametrize("samples", [0, 1024])
def test_population_and_scores_are_those_of_the_first_ranks_buffers(tmp_path: Path, samples: int) -> None:
    found = run("ranks_run.py", f"buffers:{samples}", tmp_path)
    assert found["population"] < 2e-6
    assert len(found["scores"]) == 4
    assert max(found["scores"].values()) < 2e-6
    assert "compared" not in found


@pytest.mark.exact
@pytest.mark.parametrize("samples", [0, 1024])
def test_running_statistics_are_those_of_all_ranks(tmp_path: Path, samples: int) -> None:
    found = run("ranks_run.py", f"buffers:{samples} batchnorm", tmp_path)
    assert found["population"] < 2e-6
    assert max(found["scores"].values()) < 2e-6
    assert found["compared"] < 2e-6
    assert found["gained"] > 1e-5


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_what_workers_chose_reaches_the_process_that_started_them(tmp_path: Path, strategy: str) -> None:
    if strategy == "ddp_spawn" and zoo.IS_OLDEST:
        pytest.skip("a worker of torch 2.3 is torn down while it still exchanges")
    found = run("spawn_run.py", strategy, tmp_path)
    assert found["chosen"] == found["mode"] == found["history"][-1][2] == found["logged"]
    assert len(found["history"]) == 2
    # the population that came back is that of the worker's choice: the score is found again
    assert found["validated"] == pytest.approx(found["score"], rel=1e-5)
    assert found["left"] == []
    assert found["alone"] != found["history"]  # a fit in this process then counts as any other
    assert len(found["alone"]) == 1
