"""Module paths of earlier versions, which pickled models and YAML files name, and where each module lies now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "_compat": "_torch",
    "cells.listing": "cli.cells_table",
    "cells.projection": "recurrence.projection",
    "cells.single": "recurrence.cell_modules",
    "cells.weights": "recurrence.parameters",
    "checkpoint": "cli.checkpoint",
    "fanned": "recurrence.fan_out",
    "fanout": "sweep.shared_forward",
    "gate_norm": "recurrence.gate_norm",
    "heat_map": "sweep.plot",
    "kernels.adjoint": "recurrence.program.autodiff",
    "kernels.choice": "recurrence.backends",
    "kernels.compiled": "recurrence.inductor",
    "kernels.cpu": "kernels.recurrent",
    "kernels.dense": "kernels.batch_layer_norm",
    "kernels.gather": "recurrence.statistics",
    "kernels.layer": "recurrence.fused",
    "kernels.operators": "kernels.custom_ops",
    "kernels.product": "kernels.matmul",
    "kernels.program": "recurrence.program.codegen",
    "kernels.reference": "recurrence.reference",
    "kernels.scan": "recurrence.scan",
    "kernels.torch_ops": "recurrence.backends",
    "kernels.trace": "recurrence.program.graph",
    "kernels.traced": "recurrence.program.runtime",
    "lightning_cli": "cli.lightning",
    "models.keras": "models.paper.keras",
    "models.networks": "models.paper.networks",
    "prefix": "sweep.prefix_cache",
    "sequences": "recurrence.sequences",
    "shared": "sweep.shared_forward",
    "trees": "sweep.pytree",
}
"""Paths of version 0.1.0 and those of today, within the package."""


SPECS: dict[str, ModuleSpec | None] = {}
"""Each module's own spec, in place of which the import system puts that of the path asked for."""


class MovedModules:
    """A finder and loader that imports the module of today under its earlier path."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        return ModuleSpec(name, cls) if package == __package__ and rest in MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__package__}.{MOVED[spec.name.partition('.')[2]]}")
        SPECS.setdefault(module.__name__, module.__spec__)
        return module

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__spec__ = SPECS[module.__name__]


def install() -> None:
    """Let the import system find modules by their earlier paths, where nothing else does."""
    if not any(finder is MovedModules for finder in sys.meta_path):
        sys.meta_path.append(MovedModules)


def attribute(package: str, name: str) -> ModuleType:
    """A module that was an attribute of a package under its earlier path.

    Raises:
        AttributeError: There was none of that name.
    """
    path = f"{package}.{name}"
    if path.removeprefix(f"{__package__}.") not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return import_module(path)
