"""Recurrent layers as modules that torch.jit.script takes: each direction a loop over a traced step."""

# without postponed annotations, which torch.jit.script does not resolve

import warnings
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.inductor import parts_of, run_chunk
from lightning_bln.recurrence.parameters import HasCells, Weights
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Sequences

PACKAGE = Path(__file__).parent.parent


class Prepared(nn.Module):
    """Products of the input with the weights, normalised, and what a cell computes of them for all steps at once."""

    cell: Any
    norms: Any
    weight_ih: Tensor
    bias_ih: Tensor | None

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.cell = weights.cell
        hold(self, {f"own_{name}": value for name, value in vars(self.cell).items()})
        hold(self, {"weight_ih": weights.weight_ih, "bias_ih": weights.bias_ih})
        self.norms = nn.ModuleList([norm for norm in (weights.norm_ih,) if norm is not None])

    def parts(self, x: Tensor, state: Sequence[Tensor], maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parts of the gates by their names."""
        gates = F.linear(x, self.weight_ih, None if len(self.norms) else self.bias_ih)
        for norm in self.norms:
            found = norm.by(*maps)
            found = found._replace(equation=found.equation._replace(bias=self.bias_ih))
            gates = found(gates.unflatten(-1, (norm.gates, -1)), slice(None))[0].flatten(-2)
        return parts_of(self.cell.prepare(Gates(gates, self.cell.gates), self.cell.State(*state)))

    def forward(self, x: Tensor, state: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
        """Parts of the gates, ``(T, B, size)`` each.

        Args:
            x: ``(T, B, input_size)``.
            state: First states.
            maps: Means and variances of the input's norm at each step; anything where there is none.
        """
        return [*self.parts(x, state, maps).values()]


class Step(nn.Module):
    """One step of a cell."""

    cell: Any
    norms: Any
    weight_hh: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None

    def __init__(self, weights: Weights, zoneout: float, names: list[str]) -> None:
        super().__init__()
        self.cell, self.zoneout, self.names = copy(weights.cell), zoneout, names
        hold(self, {f"own_{name}": value for name, value in vars(self.cell).items()})
        norms = [*weights.norm_hh, weights.norm_cell]
        self.norms = nn.ModuleList([norm for norm in norms if norm is not None])
        self.has_norm_cell = weights.norm_cell is not None
        weight_hh = None if weights.weight_hh is None else self.cell.act(weights.weight_hh)
        hold(self, {"weight_hh": weight_hh, "bias_hh": weights.bias_hh, "weight_hr": weights.weight_hr})
        self.cell.act = lambda weight: weight  # it is taken once, not at each step

    def forward(self, parts: list[Tensor], state: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
        """States and output after a step, from the gates' parts ``(B, size)`` and the norms' means and variances."""
        norms: list[Any] = [
            norm.by(mean[None], var[None]) for norm, mean, var in zip(self.norms, maps[::2], maps[1::2], strict=False)
        ]
        norm_cell = norms.pop() if self.has_norm_cell else None
        weights = HiddenWeights(self.weight_hh, self.bias_hh, self.weight_hr, tuple(norms), norm_cell)
        gates = {name: part[None] for name, part in zip(self.names, parts, strict=True)}
        sequences = Sequences(next(iter(gates.values())), tuple(state), None)
        found = run_chunk(self.cell, gates, sequences, weights, Noise(None, self.zoneout, None))
        return [*found.state, found.outputs[0]]


def hold(module: nn.Module, values: Any) -> None:
    """Let a module hold tensors, so that they are parts of what is traced, and no constants."""
    for name, value in values.items():
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, value)
        elif value is None or isinstance(value, Tensor):
            module.register_buffer(name, value)


class Rows(nn.Module):
    """A norm's maps, of which each step has one, or all have the same."""

    mean: Tensor
    var: Tensor

    def __init__(self, norm: FrozenNorm) -> None:
        super().__init__()
        self.register_buffer("mean", norm.mean)
        self.register_buffer("var", norm.var)

    def forward(self, first: int, end: int) -> list[Tensor]:
        """Means and variances at some steps, of which those beyond the last have the last one's."""
        rows = torch.arange(first, end, device=self.mean.device).clamp(max=self.mean.size(0) - 1)
        return [self.mean[rows], self.var[rows]]


class Direction(nn.Module):
    """One layer in one direction, forward in time."""

    @torch.no_grad()
    def __init__(self, layer: HasCells, suffix: str) -> None:
        super().__init__()
        weights = layer._weights(suffix)
        like, prepared = weights.weight_ih.detach(), Prepared(weights)
        x = like.new_ones(2, 3, like.shape[1])
        state = [like.new_zeros(3, layer.state_size(name)) for name in weights.cell.states]
        # a list of none has no type
        maps = [value[[0, 0]] for norm in prepared.norms for value in (norm.mean, norm.var)] or [like]
        parts = prepared.parts(x, state, maps)
        step = Step(weights, layer.zoneout, [*parts])
        self.input_rows = nn.ModuleList([Rows(norm) for norm in prepared.norms])
        self.rows = nn.ModuleList([Rows(norm) for norm in step.norms])
        of_step = [value[0] for norm in step.norms for value in (norm.mean, norm.var)] or [like]
        self.prepared = traced(prepared, (x, state, maps), weights.cell)
        self.step = traced(step, ([part[0] for part in parts.values()], state, of_step), weights.cell)

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs and last states from ``(T, B, input_size)`` and first states ``(B, size)``."""
        of_input: list[Tensor] = []
        for of_norm in self.input_rows:
            of_input = of_norm(0, x.size(0))
        parts = self.prepared(x, state, of_input if len(of_input) else [x])
        outputs: list[Tensor] = []
        for t in range(x.size(0)):
            now: list[Tensor] = []
            for part in parts:
                now.append(part[t])
            maps: list[Tensor] = []
            for rows in self.rows:
                for one in rows(t, t + 1):
                    maps.append(one[0])
            state = self.step(now, state, maps if len(maps) else [x])
            outputs.append(state.pop())
        return torch.stack(outputs), state


def traced(module: nn.Module, example: tuple[Any, ...], cell: Cell) -> Any:
    """A module traced.

    Raises:
        ValueError: What a cell does depends on the numbers or the sizes of tensors, which a trace does not follow.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = torch.jit.trace(module, example, strict=False, check_trace=False)
    for one in seen:
        text, place = str(one.message), Path(one.filename)
        is_ours = PACKAGE in place.parents and place.parent.name != "cells"
        if not is_ours and ("to a Python" in text or "Using len" in text):
            raise ValueError(
                f"{type(cell).__name__} cannot be scripted, since what it does depends on numbers or sizes of tensors "
                f"({place.name}, line {one.lineno}); use torch operations there, or export with torch.export"
            )
    return found


class Scripted(nn.Module):
    """A layer's directions in order, those of the first layer first."""

    sizes: list[int]
    input_size: int

    def __init__(self, layer: Any, suffixes: list[str], directions: int) -> None:
        super().__init__()
        self.directions = nn.ModuleList([Direction(layer, suffix) for suffix in suffixes])
        self.both, self.batch_first = directions == 2, bool(getattr(layer, "batch_first", False))
        self.input_size = layer.input_size
        self.sizes = [layer.state_size(name) for name in layer.cell.states]

    def zeros(self, x: Tensor, cells: int) -> list[Tensor]:
        """First states, ``(cells, B, size)`` each, for ``(..., B, input_size)``."""
        return [torch.zeros(cells, x.size(-2), size, dtype=x.dtype, device=x.device) for size in self.sizes]

    def run(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs and last states from ``(T, B, input_size)`` and first states ``(cells, B, size)``."""
        last: list[list[Tensor]] = []
        for _ in state:
            none: list[Tensor] = []
            last.append(none)
        outputs = x
        for number, direction in enumerate(self.directions):
            is_back = self.both and number % 2 == 1
            if not is_back:
                x = outputs
            y, final = direction(x.flip([0]) if is_back else x, [one[number] for one in state])
            outputs = torch.cat([outputs, y.flip([0])], -1) if is_back else y
            for k in range(len(final)):
                last[k].append(final[k])
        return outputs, [torch.stack(parts) for parts in last]

    def sequence(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """A layer's call."""
        if x.size(-1) != self.input_size:
            raise ValueError("the input's feature axis (dim -1) does not have input_size features; change one of them")
        if x.dim() != 2 and x.dim() != 3:
            raise ValueError("the input has neither 2 nor 3 axes; add or drop some")
        is_batched = x.dim() == 3
        if not is_batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if state is None:
            state = self.zeros(x, len(self.directions))
        elif not is_batched:
            state = [one.unsqueeze(1) for one in state]
        for one in state:
            if one.dim() != 3 or one.size(0) != len(self.directions) or one.size(1) != x.size(1):
                raise ValueError("hx does not fit the input; each state is (layers * directions, batch, size)")
        outputs, last = self.run(x, state)
        if not is_batched:
            return outputs.squeeze(1), [one.squeeze(1) for one in last]
        return outputs.transpose(0, 1) if self.batch_first else outputs, last

    def single(self, x: Tensor, state: list[Tensor] | None) -> list[Tensor]:
        """A single-step cell's call."""
        if x.dim() != 1 and x.dim() != 2:
            raise ValueError("the input has neither 1 nor 2 axes; a cell takes one step")
        is_batched = x.dim() == 2
        if state is not None and is_batched:
            for one in state:
                if one.dim() != 2 or one.size(0) != x.size(0):
                    raise ValueError("hx does not fit the input; each state is (batch, size)")
        if state is not None:
            state = [one.unsqueeze(0) if is_batched else one.unsqueeze(0).unsqueeze(0) for one in state]
        row = x if is_batched else x.unsqueeze(0)
        _, last = self.run(row.unsqueeze(0), self.zeros(row, 1) if state is None else state)
        return [one[0] if is_batched else one[0, 0] for one in last]


class ScriptedLayer(Scripted):
    """A layer with one state, as nn.GRU is called."""

    @staticmethod
    def of(layer: Any) -> nn.Module:
        """The module for a layer's number of states."""
        suffixes = [suffix for n in range(layer.num_layers) for suffix in layer._suffixes(n)]
        kind = {1: ScriptedLayer, 2: ScriptedLayer2}.get(len(layer.cell.states), ScriptedLayerN)
        return kind(layer, suffixes, layer.num_directions).eval()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, last = self.sequence(input, None if hx is None else [hx])
        return outputs, last[0]


class ScriptedLayer2(Scripted):
    """A layer with two states, as nn.LSTM is called."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs, last = self.sequence(input, None if hx is None else [hx[0], hx[1]])
        return outputs, (last[0], last[1])


class ScriptedLayerN(Scripted):
    """A layer with more states, in lists."""

    def forward(self, input: Tensor, hx: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        return self.sequence(input, hx)


class ScriptedCell(Scripted):
    """A cell with one state, as nn.GRUCell is called."""

    @staticmethod
    def of(cell: Any) -> nn.Module:
        """The module for a cell's number of states."""
        kind = {1: ScriptedCell, 2: ScriptedCell2}.get(len(cell.cell.states), ScriptedCellN)
        return kind(cell, [""], 1).eval()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return self.single(input, None if hx is None else [hx])[0]


class ScriptedCell2(Scripted):
    """A cell with two states, as nn.LSTMCell is called."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        last = self.single(input, None if hx is None else [hx[0], hx[1]])
        return last[0], last[1]


class ScriptedCellN(Scripted):
    """A cell with more states, in lists."""

    def forward(self, input: Tensor, hx: list[Tensor] | None = None) -> list[Tensor]:
        return self.single(input, hx)
