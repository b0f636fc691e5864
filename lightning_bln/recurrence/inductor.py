"""The recurrence of any cell on inductor: its steps fused by torch.compile, ten at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.equation import Statistics
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences, unroll

STEPS = 10
"""Steps compiled together: more take longer to compile, fewer cost more calls."""
COMPILER = "inductor"


def inductor_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence` of sequences of one length, a chunk of steps at a time."""
    state: tuple[Tensor, ...] = cell.State(*sequences.state)
    x = cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), state)
    cut = {name: part.split(STEPS) for name, part in parts_of(x).items()}
    kind: Any = type(cell)
    results = []
    for k, chunk in enumerate(sequences.x.split(STEPS)):
        window = slice(k * STEPS, k * STEPS + len(chunk))
        run = compiled_chunk(kind, COMPILER) if len(chunk) == STEPS else run_chunk
        result = run(
            cell,
            {name: pieces[k] for name, pieces in cut.items()},
            Sequences(chunk, tuple(state), None),
            weights._replace(
                norm_hh=tuple(norm.at(window) for norm in weights.norm_hh),
                norm_cell=None if weights.norm_cell is None else weights.norm_cell.at(window),
            ),
            noise.at(window),
        )
        state = result.state
        results.append(result)
    return Result(
        torch.cat([result.outputs for result in results]),
        tuple(state),
        tuple(map(join, zip(*(result.norm_hh for result in results), strict=True))),
        None if results[0].norm_cell is None else join([result.norm_cell for result in results]),
    )


def parts_of(x: Gates) -> dict[str, Tensor]:
    """Prepared gates in the tensors that they are held in, by name; one that holds all has no name."""
    return x.split() if x._value is None else {"": x.joint()}


def run_chunk(
    cell: Cell, parts: dict[str, Tensor], sequences: Sequences, weights: HiddenWeights, noise: Noise
) -> Result:
    """Some steps of a recurrence, its gates prepared."""
    x = Gates(parts[""], cell.gates) if "" in parts else Gates(None, cell.gates, parts)
    return unroll(copy(cell), x, sequences, weights, noise)  # what is set on an argument would outlive the graph


@cache
def compiled_chunk(kind: type[Cell], compiler: str) -> Callable[..., Result]:
    """:func:`run_chunk` compiled for one kind of cell; compiled code is kept by code object, so each has its own."""
    own = FunctionType(run_chunk.__code__.replace(co_name=f"run_{kind.__name__}"), run_chunk.__globals__)
    return torch.compile(own, dynamic=False, backend=compiler)


def join(pieces: Any) -> Any:
    """Statistics of all steps from those of each chunk."""
    return None if pieces[0] is None else Statistics(*map(torch.cat, zip(*pieces, strict=True)))
