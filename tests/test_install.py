"""The package builds with or without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in")
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a clone"),
    pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools"),
]


def setup(folder: Path, *arguments: str, **variables: str) -> None:
    """Run setup.py on a copy of what it builds from."""
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "lightning_bln/kernels/csrc", folder / "lightning_bln/kernels/csrc")
    command = [sys.executable, "setup.py", "-q", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **variables})
    assert run.returncode == 0, run.stderr


def test_without_a_compiler_the_build_goes_on_without_the_kernels(tmp_path) -> None:
    setup(tmp_path, "build_ext", "--build-lib", "built", CC="/bin/false", CXX="/bin/false")
    assert not list(tmp_path.rglob("*.so"))


def test_the_source_distribution_has_what_the_kernels_are_built_from(tmp_path) -> None:
    setup(tmp_path, "sdist")
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        found = {Path(name).name for name in packed.getnames() if "/csrc/" in name}
    assert found == {path.name for path in (ROOT / "lightning_bln/kernels/csrc").iterdir()}
