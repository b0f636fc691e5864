"""Triton kernels compiled for GPUs that are not here: registers, spilled words and shared memory of each, as JSON.

Run as a program, since a process whose kernels are interpreted cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_bln.kernels.triton.backward import norm_backward, norm_sums
from lightning_bln.kernels.triton.forward import merge_parts, norm_apply, norm_stats
from lightning_bln.kernels.triton.tiles import WARPS, Tiling, tiling

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

LAYOUTS: dict[str, tuple[Any, int, bool, str]] = {
    "steps of a recurrent layer": (lambda: torch.empty(32, 512, 2048, device="meta"), 4, False, "bf16"),
    "wide features": (lambda: torch.empty(256, 1, 8192, device="meta"), 1, False, "fp32"),
    "images": (lambda: torch.empty(64, 64, 1024, device="meta").mT, 1, False, "fp32"),
    "images, shared positions": (lambda: torch.empty(64, 64, 1024, device="meta").mT, 1, True, "fp16"),
    "one number": (lambda: torch.empty(1, 1, 1, device="meta"), 1, False, "fp32"),
    "three channels": (lambda: torch.empty(64, 3, 1024, device="meta").mT, 1, False, "bf16"),
}
"""An input, groups, whether positions are shared, and the dtype."""

SIZES = ("N", "P", "G", "F", "sn", "sp", "sg", "sf", "CHUNK")
INTEGERS = {"N", "P", "G", "F", "CHUNK", "PARTS", "COLUMNS", "WIDTH", "LENGTH", "TILES"}
NARROW = {"x", "y", "grad", "grad_x", "weight", "bias"}
"""Arrays of the input's dtype; the others hold float32."""


def constants_of(tiles: Tiling, uses: int) -> dict[Any, dict[str, Any]]:
    """Each kernel, and what it is compiled for."""
    samples, positions, features = tiles.tile
    base = {"SHARED": tiles.is_shared, "ACC": tl.float32, "BM": samples, "BP": positions, "BN": features}
    sizes = *tiles[:4], *tiles.strides, tiles.chunk
    base |= {name: 1 for name, size in zip(SIZES, sizes, strict=True) if size == 1}  # as Triton specialises them
    if tiles.groups == 1:
        base["sizes"] = None
    equation = {**base, "HAS_B": True, "HAS_F": True, "USES": uses, "SCALE": 0.3, "EPS": 1e-3}
    equation |= {} if uses else {"given": None}
    return {
        norm_stats: {**base, "NEEDS_B": True, "NEEDS_F": True},
        norm_apply: equation,
        norm_sums: {**equation, "NEEDS_COLUMNS": True, "NEEDS_F": True},
        norm_backward: equation,
        merge_parts: {"ACC": tl.float32, "BK": 64, "BC": 32, "sizes": None}
        | ({} if tiles.is_shared else {"TILES": 1, "P": 1, "BP": 1}),
    }


def signature_of(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in INTEGERS or (name.startswith("s") and len(name) == 2) or name == "BP":
            kinds[name] = "i32"
        else:
            kinds[name] = "*i64" if name == "sizes" else f"*{dtype}" if name in NARROW else "*fp32"
    return kinds


def build(kernel: Any, constants: dict[str, Any], dtype: str, architecture: int) -> dict[str, int]:
    """Resources of a kernel of norms."""
    return resources(kernel, signature_of(kernel, constants, dtype), constants, architecture, num_warps=WARPS)


def resources(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], architecture: int, **options: Any
) -> dict[str, int]:
    """Resources of a kernel, from its machine code."""
    pointers = [(index,) for index, kind in enumerate(kinds.values()) if kind.startswith("*")]
    attributes = {index: [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills = len(re.findall(r"\bSTL\b", code))
    return {"registers": int(registers[1]), "spilled": spills, "shared": compiled.metadata.shared}


def tool(name: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    found = {}
    for layout, (make, groups, is_shared, dtype) in LAYOUTS.items():
        tiles = tiling(make(), groups, is_shared)
        for uses in (0, 6) if layout in sys.argv[2:] else (0,):
            for kernel, constants in constants_of(tiles, uses).items():
                name = f"{layout}, uses {uses}: {kernel.__name__}"
                found[name] = build(kernel, constants, dtype, int(sys.argv[1]))
    print(json.dumps(found))
