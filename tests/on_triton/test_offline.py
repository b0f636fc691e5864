"""Triton kernels compiled for GPUs that are not here fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bln.kernels.triton.available import installed
from tests.on_triton.helpers import interpreted

pytestmark = interpreted

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a program may have."""

ROOT = Path(__file__).parents[2]


PROGRAMS = {
    "offline": (["steps of a recurrent layer", "images"], 40),
    "offline_recurrent": ([], 14),
}
"""Arguments of each program that compiles kernels, and how many these are."""


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_fit(name, architecture, tmp_path) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if missing := [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).exists()]:
        pytest.skip(f"triton {installed()} comes without {', '.join(missing)}: nothing compiles offline")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    arguments, number = PROGRAMS[name]
    program = [sys.executable, "-m", f"tests.on_triton.{name}", str(architecture), *arguments]
    run = subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == number
    for name, taken in found.items():
        assert taken["registers"] <= 255, (name, taken)
        assert taken["spilled"] < 64, (name, taken)
        assert taken["shared"] <= SHARED_MEMORY[architecture], (name, taken)
