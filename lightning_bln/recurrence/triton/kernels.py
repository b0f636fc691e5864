"""Generated kernels: source, module and the names of their tensors."""

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lightning_bln.cells.cell import Cell
from lightning_bln.recurrence.program.recording import Options, Signature, without_parameters
from lightning_bln.recurrence.program.step import record_step
from lightning_bln.recurrence.triton.backward import Backward
from lightning_bln.recurrence.triton.forward import Forward
from lightning_bln.recurrence.triton.phases import NormForm
from lightning_bln.recurrence.triton.source import Kernel, Layout, Recorded

CONSTANTS = "H: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr"
OPTIONS = "ROOM: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr"
USED = (
    "all_parts", "barrier", "batch_gradient", "feature_gradient", "given_features", "hardsigmoid", "leave",
    "leave_moments", "load_batch", "load_features", "merged_moments", "multiplied", "of_batch", "of_features",
    "over_features", "over_samples", "pick", "put", "softplus", "store_batch", "store_features", "summed", "tanh",
)  # fmt: skip
"""Names of ``kernels.triton.parts`` that kernels call."""

START = (
    "pid = tl.program_id(0)",
    "n, u, kk = tl.arange(0, BM), pid * U + tl.arange(0, U), tl.arange(0, BK)",
    "units = u < H",
    "own = n[:, None] * H + u[None, :]",
    "all = (n < B)[:, None] & units[None, :]",
    "size = tl.minimum(U, H - pid * U).to(ACC)",
)
STEP = (
    "running = tl.load(sizes + t)",
    "rows, count = n < running, running.to(ACC)",
    "both = rows[:, None] & units[None, :]",
)


class Kernels(NamedTuple):
    """The kernels of a cell for one kind of call."""

    module: ModuleType
    recorded: Recorded
    forward: Kernel
    backward: Kernel | None


class Form(NamedTuple):
    """All that generated source depends on."""

    signature: Signature
    norms: tuple[tuple[Any, NormForm], ...]
    """By their keys."""
    keeps: bool
    """Whether a gradient follows."""
    units: int
    depth: int
    """Units in a tile of a product's input."""


@lru_cache(maxsize=256)
def kernels_of(kind: type[Cell], options: Options, form: Form) -> Kernels:
    """Generate, and keep, the kernels of a kind of cell."""
    cell, signature = without_parameters(kind, options), form.signature
    gates = {
        name: (number, place, len(names))
        for number, names in enumerate(signature.segments)
        for place, name in enumerate(names)
    }
    layout = Layout(gates, {index: len(names) for index, names in enumerate(cell.products)})
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        recorded = record_step(cell, gates, dict(signature.constants), signature.around)
        step = Recorded(recorded, layout, dict(form.norms))
    forward = Forward(step, form.keeps, -(-form.units // form.depth))
    backward = None
    if form.keeps:
        backward = Backward(step, [-(-form.units * step.width(one) // form.depth) for one in step.products])
    return Kernels(load(source_of(forward, backward)), step, forward, backward)


def source_of(forward: Kernel, backward: Kernel | None) -> str:
    """The text of a module of both kernels."""
    parts = [
        '"""Generated from a recorded cell."""\n\nimport triton\nimport triton.language as tl\n\n'
        f"from lightning_bln.kernels.triton.parts import {', '.join(USED)}\n",
        text_of("forward", forward, "t = 0", "t < T", "t += 1"),
    ]
    if backward is not None:
        parts.append(text_of("backward", backward, "t = T - 1", "t >= 0", "t -= 1"))
    return "\n\n".join(parts)


def text_of(name: str, kernel: Kernel, first: str, goes_on: str, then: str) -> str:
    """One kernel. Time is a ``while`` loop, of which nothing is loaded ahead across a barrier."""
    arguments = ", ".join([*kernel.pointers, "sizes", "part", "flag", "T", "B", CONSTANTS, OPTIONS])
    lines = [
        '@triton.jit(do_not_specialize=["T", "B"])',
        f"def {name}({arguments}):",
        f"    PARTS: tl.constexpr = {max(1, kernel.columns)}",
        *(f"    {line}" for line in (*START, *kernel.before, "done, step = 0, 0", first)),
        f"    while {goes_on}:",
        *(f"        {line}" for line in (*STEP, *kernel.body, then, "step += 1")),
        *(f"    {line}" for line in kernel.after),
    ]
    return "\n".join(lines) + "\n"


def load(source: str) -> ModuleType:
    """A module whose source Triton finds, though no file has it."""
    name = f"lightning_bln_generated_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    module = ModuleType(name)
    module.__file__ = file
    exec(compile(source, file, "exec"), module.__dict__)
    return module
