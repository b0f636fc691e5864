"""Generated recurrent kernels compiled for GPUs that are not here: resources of each, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from lightning_bln.cells.gates import Gates
from lightning_bln.cells.registry import build
from lightning_bln.recurrence.program.recording import Signature, options_of
from lightning_bln.recurrence.program.step import Around
from lightning_bln.recurrence.triton.kernels import Form, Kernels, kernels_of
from lightning_bln.recurrence.triton.phases import NormForm
from lightning_bln.recurrence.triton.run import depth_of, units_of, warps_of
from tests.on_triton.offline import resources

SIZES = ((64, 256), (25, 128), (32, 512), (16, 768))
"""Samples and units."""
CASES = [("lstm", "bln", *size) for size in SIZES] + [("lstm", None, 64, 256), ("gru", "bln", 64, 256)]
CASES += [("mgu", "bln", 32, 512)]


def kernels(name: str, norm: str | None, units: int) -> Kernels:
    """The kernels of a cell that trains."""
    cell = build(name)
    segments = tuple(cell.prepare(Gates(torch.zeros(1, 1, len(cell.gates) * 4), cell.gates), None).segments())
    around = Around(True, False, False, norm is not None, norm is not None and cell.has_norm_cell, False, (), None)
    widths = {index: len(names) for index, names in enumerate(cell.products)} if norm else {}
    widths |= {"cell": 1} if around.norm_cell else {}
    forms = tuple(
        ((key, width), NormForm(width, False, True, True, (False,) * 4, 1e-3, True)) for key, width in widths.items()
    )
    options: Any = options_of(cell)
    return kernels_of(type(cell), options, Form(Signature(segments, (), around), forms, True, units, depth_of(units)))


def compiled(name: str, norm: str | None, samples: int, units: int, architecture: int) -> dict[str, dict[str, int]]:
    """Resources of both kernels."""
    made, found = kernels(name, norm, units), {}
    programs = -(-units // units_of(units))
    constants = {
        "H": units,
        "U": units_of(units),
        "BM": max(16, triton.next_power_of_2(samples)),
        "BK": depth_of(units),
        "PROGRAMS": programs,
        "ROOM": triton.next_power_of_2(programs),
        "PRECISION": "tf32",
        "WIDE": False,
        "ACC": tl.float32,
    }
    dtype = "fp32" if architecture >= 90 else "bf16"  # in float32 the largest needs more shared memory than sm_80 has
    wide = ("mixing", "batch", "feature", "given")
    for which in ("forward", "backward"):
        kernel = getattr(made.module, which)
        kinds = {n: "constexpr" if n in constants else f"*{dtype}" for n in kernel.arg_names}
        kinds |= {n: "*fp32" for n in kernel.arg_names if n.startswith(wide) or n == "part"}
        kinds |= {"flag": "*i32", "sizes": "*i32", "T": "i32", "B": "i32"}
        options = {"num_warps": warps_of(units), "num_stages": 1, "launch_cooperative_grid": True}
        found[f"{name}, {norm}, {samples} x {units}: {which}"] = resources(
            kernel, kinds, constants, architecture, **options
        )
    return found


if __name__ == "__main__":
    every: dict[str, dict[str, int]] = {}
    for case in CASES:
        every |= compiled(*case, int(sys.argv[1]))
    print(json.dumps(every))
