"""The pages and the README name files, modules and public names that exist, and their short examples run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, ConvBLN2d
from tests.export.helpers import exports

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs from a clone")

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]}
CODE = {page: "\n".join(re.findall(r"`[^`\n]+`|```.*?```|(?<=\n) {4}.*", text, re.S)) for page, text in PAGES.items()}
FOLDERS = ("lightning_bln", "tests", "benchmarks", "docs", "examples")


def imported_names(code: str) -> set[tuple[str, str]]:
    """Modules and the names imported from them; an empty name for a module that is named alone."""
    found = set()
    for module, names in re.findall(r"from (lightning_bln[\w.]*) import (\([^)]*\)|[^\n`]+)", code):
        found |= {(module, name) for name in re.findall(r"\w+", names)}
    for path in re.findall(r"\blightning_bln(?:\.\w+)+", code):
        module, _, name = path.rpartition(".")
        found.add((module, name))
    return found


NAMES = sorted({(page, *one) for page, code in CODE.items() for one in imported_names(code)})
PATHS = sorted(
    {
        (page, path)
        for page, text in PAGES.items()
        for path in re.findall(rf"(?:`|\()((?:\.\./)?(?:{'|'.join(FOLDERS)})/[\w./-]+)", text)
    }
)
LINKS = sorted(
    {
        (page, link)
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text)
        if not link.startswith("http")
    }
)


@pytest.mark.parametrize(("page", "module", "name"), NAMES)
def test_a_name_on_a_page_imports(page: str, module: str, name: str) -> None:
    try:
        assert hasattr(import_module(module), name) or import_module(f"{module}.{name}")
    except ImportError as error:
        if error.name is None or error.name.startswith("lightning_bln"):
            raise
        pytest.skip(f"{module}.{name} needs {error.name}")


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_a_file_on_a_page_exists(page: str, path: str) -> None:
    assert (ROOT / page).parent.joinpath(path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_on_a_page_leads_to_a_file(page: str, link: str) -> None:
    assert (ROOT / page).parent.joinpath(link).exists()


def test_the_architecture_page_lists_the_packages_files() -> None:
    listing = re.search(r"```text\n(.+?)```", PAGES["docs/architecture.md"], re.S)
    assert listing is not None
    listed = set(files_of(listing[1]))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_bln").rglob("*.py")}
    there = {path for path in there if not path.endswith(("__init__.py", "__main__.py")) and "/cells/" not in path}
    assert {path for path in listed if "/cells/" not in path} == there


def files_of(listing: str) -> list[str]:
    """Python files of an indented listing of folders and files."""
    found, folders = [], ["lightning_bln/"]
    for line in listing.splitlines()[1:]:
        names, *text = re.split(r"  +", line.strip(), maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [names.split()[0]] if "/" in names else []
        inside = "".join(folders[:depth])
        if "/" not in names:
            found += [inside + name for name in re.findall(r"\w+\.py", names)]
        else:
            found += [inside + names.split()[0] + name for name in re.findall(r"\w+\.py", " ".join(text))]
    return found


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.+?)```", PAGES[page], re.S)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_python_on_a_page_is_python(page: str) -> None:
    for block in blocks(page):
        compile(block, page, "exec")


def test_the_readmes_example_in_plain_torch_runs() -> None:
    batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    names: dict[str, Any] = {"train_batches": batches}
    exec(next(block for block in blocks("README.md") if "recompute_population" in block), names)
    net: nn.Module = names["net"]
    assert isinstance(next(iter(net.children())), ConvBLN2d)
    assert net(batches[0]).shape == (4, 84)


def test_the_pages_sweep_without_a_trainer_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), import_module("lightning_bln").BatchLayerNorm(8))
    loader: list[tuple[Tensor, Tensor]] = [(torch.randn(8, 4), torch.randint(8, (8,))) for _ in range(2)]
    names: dict[str, Any] = {
        "model": model,
        "train_loader": loader,
        "val_loader": loader,
        "cross_entropy": nn.functional.cross_entropy,
    }
    exec(next(block for block in blocks("docs/callback.md") if "sweep_modes" in block), names)
    assert set(names["result"].scores) == set(ALL_MODES)


@exports
@pytest.mark.filterwarnings("ignore")
def test_the_deploy_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime", "sklearn"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    every = blocks("docs/deploy.md")
    alone = [block for block in every if "class Served" in block]
    assert len(alone) == 1
    names: dict[str, Any] = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    for block in every:
        if block in alone:  # where the package is not installed
            program = "import sys; sys.modules['lightning_bln'] = None\n" + block
            subprocess.run([sys.executable, "-c", program], check=True)
        else:
            exec(block, names)
    assert names["scores"].shape == (1, 10)
