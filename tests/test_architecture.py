"""The floors of the package: imports run down, nothing runs in circles, and private names of others have one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_bln

PACKAGE = Path(lightning_bln.__file__).parent
NAME = PACKAGE.name

FLOORS = (
    ("_torch", "_moved", "_scoped", "_writing", "_files", "_checks"),
    ("equation", "masks"),
    ("per_mode",),
    ("functional", "moments", "modes", "equal_modes", "traced"),
    ("kernels",),
    ("distributed", "population", "merging", "batchnorm", "mixing"),
    ("joining", "together", "recomputation", "averaging", "sample_order", "calibration"),
    ("fused_norm", "norm_warnings", "norm"),
    ("cells",),
    ("recurrence",),
    ("recurrent", "conv"),
    ("sweep",),
    ("convert", "folding", "exporting"),
    ("models", "data"),
    ("callbacks",),
    ("cli",),
    ("tuning", "reproduce", "demo"),
)
"""Files and folders from the ground up; docs/architecture.md says what each is for."""

HEAVY = ("lightning", "pytorch_lightning", "matplotlib", "rich", "optuna", "ray", "torchmetrics")

PRIVATE_PLACES = {"_torch.py", "callbacks/_lightning.py", "kernels/triton/_interpreter.py", "tuning/_private.py"}
"""Files that may use private names of other libraries."""

HOOKS = {"_load_from_state_dict", "_apply", "_extra_state", "_asdict", "_replace", "_fields", "_fields_"}
"""Names with an underscore that are public: of nn.Module for subclasses, of named tuples and of ctypes."""

LINES, FUNCTION_LINES = 400, 60

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of the package that a file imports, also within functions and for type checking, and the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == NAME)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            if (node.module or "").split(".")[0] == NAME:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield (whole if whole in MODULES else str(node.module)), node.lineno


def floor_of(module: str) -> int:
    place = module.removeprefix(NAME).lstrip(".").split(".")[0]
    return next((level for level, names in enumerate(FLOORS) if place in names), len(FLOORS))


def named(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(PACKAGE)))


@named(FILES)
def test_imports_run_down(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # which names what is public, from all floors
    own = floor_of(module_of(path))
    assert own < len(FLOORS), "this file is on no floor"
    up = [f"line {line}: {module}" for module, line in imports_of(path) if floor_of(module) > own]
    assert not up


def test_no_file_imports_itself_through_others() -> None:
    graph = {module: {name for name, _ in imports_of(path)} - {module} for module, path in MODULES.items()}
    # importing from a package runs its __init__ first, but that is no use of it by the files inside
    for module, found in graph.items():
        found -= {package for package in MODULES if module.startswith(package + ".")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@named(FILES)
def test_nothing_imports_a_private_name_of_another_file(path: Path) -> None:
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            names = {f"{node.module}.{alias.name}": alias.name for alias in node.names}
            found += [name for whole, name in names.items() if name.startswith("_") and whole not in MODULES]
    assert not found


@cache
def own_private_names() -> set[str]:
    """Names with one leading underscore that the package defines itself."""
    found = set(HOOKS)
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.asname or node.name.split(".")[-1])
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@named([path for path in FILES if str(path.relative_to(PACKAGE)) not in PRIVATE_PLACES])
def test_private_names_of_other_libraries_have_one_place(path: Path) -> None:
    own = own_private_names()
    found = [f"line {line}: {name}" for name, line in private_names(tree(path)) if name not in own]
    assert not found


def private_names(root: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes with one leading underscore that are read or written, by a dot, ``getattr`` or ``__dict__``."""
    for node in ast.walk(root):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names = [one.value for one in node.args if isinstance(one, ast.Constant)]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("__dict__"):
            names = [node.slice.value] if isinstance(node.slice, ast.Constant) else []
        else:
            continue
        yield from ((name, node.lineno) for name in names if isinstance(name, str) and re.match(r"_[a-z]", name))


def test_the_package_alone_loads_nothing_heavy() -> None:
    code = f"import sys; from {NAME} import *; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", [*lightning_bln.__all__, "BLNStatsCallback"])
def test_every_public_name_imports(name: str) -> None:
    assert getattr(lightning_bln, name) is not None


@named(FILES)
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.read_text().count("\n") <= LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= FUNCTION_LINES, f"line {node.lineno}: {node.name} has {length} lines"


RIDDLES = ("What", "Why", "Who", "Where", "When", "How", "That")


@named(FILES)
def test_docstrings_open_with_a_noun_or_a_verb(path: Path) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree(path)) if isinstance(node, documented)]
    assert [text.splitlines()[0] for text in texts if text and text.split()[0] in RIDDLES] == []
