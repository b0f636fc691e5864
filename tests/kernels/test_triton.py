"""The way to Triton kernels and what bars it, for which no kernel has to run, and the layouts of their calls."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

import lightning_bln
from lightning_bln import BatchLayerNorm, ConvBLN2d
from lightning_bln.kernels import available as backends
from lightning_bln.kernels.gate import serves_triton
from lightning_bln.kernels.triton import available
from lightning_bln.kernels.triton.tiles import PARTS, PLANAR_TILE, TILE, power, tiling

x = torch.randn(4, 3)
SHAPES = [(1, 1, 1), (32, 512, 2048), (256, 1, 8192), (64, 1024, 64), (3, 7, 5), (10**6, 1, 3)]


@pytest.fixture
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if triton were installed and compiled for a device."""
    monkeypatch.setattr(available, "installed", lambda: "3.7.1")
    monkeypatch.setattr(available, "is_interpreted", lambda: False)
    monkeypatch.setattr(available, "capability", lambda index: (9, 0))


@pytest.mark.usefixtures("_compiled")
def test_tensors_on_the_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='triton', but a tensor is on cpu.*TRITON_INTERPRET=1.*'auto'"):
        BatchLayerNorm(3, backend="triton")(x)
    with pytest.raises(ValueError, match="backend='triton', but a tensor is on cpu"):
        ConvBLN2d(2, 3, 1, backend="triton")(torch.randn(2, 2, 3, 3))


def test_without_triton_the_error_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(available, "installed", lambda: None)
    with pytest.raises(ValueError, match="backend='triton', but triton is not installed; pip install triton"):
        BatchLayerNorm(3, backend="triton")(x)
    assert backends()["triton"] is None


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize(
    ("capability", "dtype", "device", "reason"),
    [
        ((9, 0), torch.float32, "cuda:0", None),
        ((7, 5), torch.bfloat16, "cuda:0", None),
        ((9, 0), torch.float64, "cuda:0", "the dtype is torch.float64"),
        ((7, 0), torch.float32, "cuda:0", "compute capability"),
        ((9, 0), torch.float32, "mps", "a tensor is on mps"),
    ],
)
def test_devices_and_dtypes(capability, dtype, device, reason, monkeypatch) -> None:
    monkeypatch.setattr(available, "capability", lambda index: capability)
    found = available.reason_of_device(dtype, device)
    assert found is None if reason is None else reason in found


def test_masks_and_autocast_are_refused() -> None:
    layer = BatchLayerNorm(3, backend="triton")
    with pytest.raises(ValueError, match="backend='triton', but mask is given"):
        layer(x, torch.ones(4, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="backend='triton', but under autocast"):
        layer(x)


def test_an_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="backend='cuda', but it must be one of 'auto', 'reference', 'cpu', 'triton'"):
        BatchLayerNorm(3, backend="cuda")


class OnCuda:
    """All of a tensor that the choice of a backend looks at."""

    device, dtype = torch.device("cuda", 0), torch.float32


def test_auto_takes_triton_where_it_is_asked_for_alone(monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.kernels.gate.reason_against_triton", lambda dtype, tensors: None)
    there, here = (OnCuda(), None), (x,)
    for wanted, on_cuda in (("0", False), ("1", True)):
        monkeypatch.setenv("LIGHTNING_BLN_TRITON", wanted)
        assert serves_triton("auto", torch.float32, there) == on_cuda
        assert not serves_triton("auto", torch.float32, here)
        assert not serves_triton("reference", torch.float32, there)
        assert not serves_triton("cpu", torch.float32, there)
        assert serves_triton("triton", torch.float32, there)


def test_auto_falls_back_where_triton_does_not_serve(monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_BLN_TRITON", "1")
    monkeypatch.setattr("lightning_bln.kernels.gate.reason_against_triton", lambda dtype, tensors: "of a reason")
    assert not serves_triton("auto", torch.float32, (OnCuda(),))


def test_layers_that_run_elsewhere_do_without_triton() -> None:
    """Torch itself may import it, but takes none as an answer."""
    code = """
import sys
sys.modules["triton"] = None
import torch, lightning_bln
lightning_bln.BatchLayerNorm(3)(torch.randn(4, 3))
print(*(name for name in sys.modules if name.startswith("lightning_bln.kernels.triton.")))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert {name.split(".")[-1] for name in run.stdout.split()} == {"_interpreter", "available", "dense"}, run.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_interpreter_is_named() -> None:
    code = "from lightning_bln.kernels import available; print(available()['triton'])"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip().endswith(", interpreter"), run.stderr


def test_the_operator_is_there_without_triton() -> None:
    assert "triton" in lightning_bln.kernels.available()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("is_planar", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (32, 512, 2048), (256, 1, 8192), (64, 1024, 64), (3, 7, 5), (10**6, 1, 3)]
)
def test_tiles_cover_the_array(shape, is_planar, is_shared) -> None:
    samples, positions, features = shape
    like = (
        torch.empty(samples, features, positions, device="meta").mT if is_planar else torch.empty(shape, device="meta")
    )
    found = tiling(like, 1, is_shared)
    assert found.samples * found.positions == samples * positions
    assert found.chunk % found.tile[0] == 0
    assert found.chunks * found.chunk >= found.samples > (found.chunks - 1) * found.chunk
    assert found.position_tiles * found.tile[1] >= found.positions
    assert found.feature_parts * found.tile[2] >= found.features
    assert found.chunks <= PARTS
    assert all(power(size) == size for size in found.tile)
    size = found.tile[0] * found.tile[1] * found.tile[2]
    assert size <= TILE
    if is_planar and positions > 1 < features:
        assert size <= PLANAR_TILE
    assert found.places == (1 if is_shared else positions)
    assert found.places * found.rows == samples * positions
