"""The recurrence of any cell as one loop operator of an exported program, for any number of steps."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_bln._torch import CAN_EXPORT_LOOPS, is_exporting, scan, tree_flatten, tree_unflatten
from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.equation import Equation, Statistics
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.inductor import parts_of, run_chunk
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Result, Sequences


def is_looped(sequences: Sequences, weights: HiddenWeights, noise: Noise) -> bool:
    """Whether ``torch.export`` traces the evaluation of sequences whose number of steps is to stay open."""
    if not (CAN_EXPORT_LOOPS and is_exporting() and isinstance(sequences.x.shape[0], torch.SymInt)):
        return False
    observes = any(norm is not None and norm.observes for norm in (*weights.norm_hh, weights.norm_cell))
    return sequences.sizes is None and sequences.x.ndim == 4 and noise.kept is None and not observes


def looped_recurrence(cell: Cell, sequences: Sequences, weights: HiddenWeights, noise: Noise) -> Result:
    """:func:`~lightning_bln.recurrence.reference.recurrence` of sequences of one length, the step traced once.

    It has no gradient: torch takes none of a loop whose step holds sizes that are open.
    """
    parts = parts_of(cell.prepare(Gates(sequences.x.flatten(-2), cell.gates), cell.State(*sequences.state)))
    *norm_hh, norm_cell = (of_steps(norm) for norm in (*weights.norm_hh, weights.norm_cell))
    timed, time_tree = tree_flatten((parts, norm_hh, norm_cell))
    parameters = {name: getattr(cell, name) for name in cell.parameters}
    lasting = parameters, with_norms(weights, map(without_steps, (*weights.norm_hh, weights.norm_cell))), noise
    held, held_tree = tree_flatten(lasting)

    def step(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        state = tuple(islice(given, len(sequences.state)))
        parts, norm_hh, norm_cell = tree_unflatten([value[None] for value in islice(given, len(timed))], time_tree)
        own, weights, noise = tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in held], held_tree)
        pairs = zip((*weights.norm_hh, weights.norm_cell), (*norm_hh, norm_cell), strict=True)
        weights = with_norms(weights, (with_step(*pair) for pair in pairs))
        of_cell = copy(cell)
        vars(of_cell).update(own)
        result = run_chunk(of_cell, parts, Sequences(next(iter(parts.values())), state, None), weights, noise)
        # a loop returns memory of its own
        return [value.clone() for value in (*result.state, result.outputs[0])]

    constants = [value.detach() for value in held if isinstance(value, Tensor)]
    first = [value.detach().clone() for value in sequences.state]
    *state, outputs = scan(step, first, [value.detach() for value in timed], constants)
    return Result(outputs, tuple(state), (), None)


def of_steps(norm: SequenceNorm | None) -> dict[str, Tensor]:
    """Tensors that a norm reads at each step, time first: statistics that are given, and mixing weights."""
    if norm is None:
        return {}
    pairs = zip(Statistics._fields, norm.source.given, norm.source.uses, strict=True)
    read: dict[str, Any] = {name: value for name, value, use in pairs if use is True}
    read |= {"w_feature": norm.equation.w_feature, "w_batch": norm.equation.w_batch}
    return {name: value for name, value in read.items() if isinstance(value, Tensor) and value.ndim}


def without_steps(norm: SequenceNorm | None) -> SequenceNorm | None:
    """A norm without the tensors that :func:`of_steps` gives."""
    if norm is None:
        return None
    mixing: dict[str, Any] = dict.fromkeys(name for name in of_steps(norm) if name in Equation._fields)
    equation, source = norm.equation._replace(**mixing), norm.source._replace(given=Statistics())
    return norm._replace(equation=equation, source=source, rows=None)


def with_step(norm: SequenceNorm | None, numbers: dict[str, Tensor]) -> SequenceNorm | None:
    """A norm :func:`without_steps` given those of one."""
    if norm is None:
        return None
    mixing: dict[str, Any] = {name: value for name, value in numbers.items() if name in Equation._fields}
    given = Statistics(**{name: value for name, value in numbers.items() if name in Statistics._fields})
    return norm._replace(equation=norm.equation._replace(**mixing), source=norm.source._replace(given=given))


def with_norms(weights: HiddenWeights, norms: Iterable[SequenceNorm | None]) -> HiddenWeights:
    """Weights with other norms, that of the cell state last."""
    *norm_hh, norm_cell = norms
    return weights._replace(norm_hh=tuple(norm for norm in norm_hh if norm is not None), norm_cell=norm_cell)
