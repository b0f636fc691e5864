"""Two and three gloo processes against one process on the joined batches, in float64."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))

import distributed_worker as worker

from lightning_bln import recompute_population
from lightning_bln.distributed import is_sharded
from lightning_bln.moments import Moments

pytestmark = pytest.mark.filterwarnings("ignore")

LIMIT = 300


def test_weights_sharded_by_fsdp2_are_seen_in_every_torch() -> None:
    try:
        from torch.distributed.fsdp import FSDPModule as Sharded
    except ImportError:  # before torch 2.6
        from torch.distributed._composable import fsdp

        Sharded = getattr(fsdp, "FSDPModule", None) or fsdp.FSDP
    layer = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(layer)
    assert not is_sharded(model)
    layer.__class__ = type("FSDPLinear", (Sharded, torch.nn.Linear), {})  # as fully_shard does
    assert is_sharded(model)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    """Results of every rank."""
    world = request.param
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # processes of one xdist run share the results
    base = tmp_path_factory.getbasetemp()
    folder = (base if run is None else base.parent) / f"ranks{world}-{run}"
    folder.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            launch(world, folder)
            (folder / "done").touch()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def launch(world: int, folder: Path) -> None:
    """Run the worker on every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    common = {
        **os.environ,
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",  # tells Lightning not to start processes itself
    }
    processes = [
        subprocess.Popen(
            [sys.executable, here / "distributed_worker.py", str(rank), str(world), folder],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


def assert_close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", worker.LAYERS)
def test_a_layer_computes_what_it_would_on_the_joined_batch(name, ranks) -> None:
    alone = worker.layer_case(name, None, len(ranks))
    for step in range(2):
        assert_close(torch.cat([one[name]["outputs"][step] for one in ranks]), alone["outputs"][step])
        assert_close(torch.cat([one[name]["grads"][step] for one in ranks]), alone["grads"][step])
    for one in ranks:
        for part in ("weights", "population"):
            for actual, expected in zip(one[name][part], alone[part], strict=True):
                assert_close(actual, expected)


def test_without_synchronisation_the_outputs_would_differ() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, dtype=torch.float64)
    layer = worker.BatchLayerNorm(6, dtype=torch.float64)
    apart = torch.cat([layer(one) for one in x.split([3, 5])])
    assert (apart - layer(x)).abs().max() > 1e-2


def test_a_step_that_some_ranks_reach_is_theirs_alone(ranks) -> None:
    sequences = ranks[0]["longer"]["sequences"]
    for one in ranks:
        mean, var = one["longer"]["population"][:2]
        assert len(mean) == max(x.shape[1] for x in sequences)
        for step in range(len(mean)):
            moments = Moments.of(torch.cat([x[:, step] for x in sequences if x.shape[1] > step]))
            assert_close(mean[step], moments.mean)
            assert_close(var[step], moments.var())


def test_ddp_trains_the_weights_of_one_process_and_finds_its_population(ranks) -> None:
    alone = worker.training_case(None, len(ranks))
    for one in ranks:
        for part in ("weights", "population"):
            for actual, expected in zip(one["training"][part], alone[part], strict=True):
                assert_close(actual, expected)


def test_a_fit_with_the_callback_gives_the_weights_population_and_sweep_of_one_process(ranks, tmp_path) -> None:
    alone = worker.trainer_case(None, len(ranks), tmp_path)
    for one in ranks:
        assert one["trainer"]["mode"] == alone["mode"]
        for part in ("weights", "population", "scores"):
            for actual, expected in zip(one["trainer"][part], alone[part], strict=True):
                assert_close(actual, expected)


def test_ranks_gather_recurrent_populations_as_one_process_does(ranks) -> None:
    alone = worker.recurrent_case(None, len(ranks))
    for one in ranks:
        for actual, expected in zip(one["recurrent"]["population"], alone["population"], strict=True):
            assert_close(actual, expected)
        for actual, first in zip(one["recurrent"]["population"], ranks[0]["recurrent"]["population"], strict=True):
            assert torch.equal(actual, first)


@pytest.mark.parametrize("samples", [None, 1024])
def test_ranks_compute_running_statistics_as_one_process_does(samples, ranks) -> None:
    alone, part = worker.batchnorm_case(None, len(ranks)), f"population {samples}"
    for one in ranks:
        for actual, expected in zip(one["batchnorm"][part], alone[part], strict=True):
            assert_close(actual, expected)


def test_sharded_weights_train_alike(ranks) -> None:
    alone = worker.sharded_case(None, len(ranks))
    for one in ranks:
        if isinstance(one["sharded"], str):
            pytest.skip(f"FSDP does not run on the CPU here: {one['sharded']}")
        for part in ("weights", "population"):
            for actual, expected in zip(one["sharded"][part], alone[part], strict=True):
                assert_close(actual, expected)


def test_one_process_needs_no_process_group() -> None:
    layer = worker.BatchLayerNorm(6, sync_batch_stats=True)
    other = worker.BatchLayerNorm(6)
    x = torch.randn(4, 3, 6)
    assert torch.equal(layer(x), other(x))
    recompute_population(layer, [x])
    recompute_population(other, [x])
    assert torch.equal(layer.eval()(x), other.eval()(x))
