"""Normalised recurrences written from their equations, one sequence and one step at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_bln import Recurrent

DELTA = 1e-4


def normalize(rows: Tensor, norm: nn.Module | None, gates: int) -> Tensor:
    """``(m, gates * hidden)`` normalised from its own statistics by the parameters of ``norm``."""
    if norm is None:
        return rows
    m, groups = len(rows), norm.groups
    inverse = 1.0 / m
    w_f, w_b = {"bln": (inverse - DELTA, 1 - inverse - DELTA), "layer": (1, 0), "batch": (0, 1)}[norm.norm]
    x = rows.reshape(m, groups, -1)
    d = x.shape[-1]
    scale = {True: d**-0.5, False: 1.0}.get(norm.scale, norm.scale) if isinstance(norm.scale, bool) else norm.scale
    mu_f = x.sum(2, keepdim=True) / d
    var_f = ((x - mu_f) ** 2).sum(2, keepdim=True) / d
    mu_b = x.sum(0, keepdim=True) / m
    var_b = ((x - mu_b) ** 2).sum(0, keepdim=True) / m
    y = w_f * (x - mu_f) / (var_f + norm.eps).sqrt() + w_b * (x - mu_b) / (var_b + norm.eps).sqrt()
    y = y.reshape(m, -1) * scale * norm.weight
    return y if norm.bias is None else y + norm.bias


def run(layer: Recurrent, sequences: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Outputs of each sequence (unpadded) and last states of each cell, from zero states."""
    kind = type(layer.cell).__name__
    outputs = sequences
    last = []
    for k in range(layer.num_layers):
        directions = []
        for suffix in [f"_l{k}", f"_l{k}_reverse"][: layer.num_directions]:
            get = lambda name, suffix=suffix: getattr(layer, name + suffix, None)  # noqa: E731
            reads = [s.flip(0) for s in outputs] if suffix.endswith("reverse") else outputs
            result, state = run_direction(kind, layer, get, reads)
            directions.append([r.flip(0) for r in result] if suffix.endswith("reverse") else result)
            last.append(state)
        outputs = [torch.cat(parts, -1) for parts in zip(*directions, strict=True)]
    return outputs, last


def run_direction(kind, layer, get, sequences):
    hidden, gates = layer.hidden_size, len(layer.cell.gates)
    zero = sequences[0].new_zeros(hidden)
    h = [zero.new_zeros(layer.state_size("h")) for _ in sequences]
    c = [zero for _ in sequences]
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for t in range(max(map(len, sequences))):
        running = [b for b, s in enumerate(sequences) if len(s) > t]
        x = torch.stack([sequences[b][t] for b in running]) @ get("weight_ih").T
        p = torch.stack([h[b] for b in running]) @ get("weight_hh").T
        x, p = normalize(x, get("norm_ih"), gates), normalize(p, get("norm_hh"), gates)
        if get("bias_ih") is not None:
            x, p = x + get("bias_ih"), p + get("bias_hh")
        if kind == "LSTM":
            i, f, g, o = (x + p).split(hidden, 1)
            cell = f.sigmoid() * torch.stack([c[b] for b in running]) + i.sigmoid() * g.tanh()
            new = o.sigmoid() * normalize(cell, get("norm_cell"), 1).tanh()
            if get("weight_hr") is not None:
                new = new @ get("weight_hr").T
        elif kind == "GRU":
            (x_r, x_z, x_n), (p_r, p_z, p_n) = x.split(hidden, 1), p.split(hidden, 1)
            z = (x_z + p_z).sigmoid()
            n = (x_n + (x_r + p_r).sigmoid() * p_n).tanh()
            new = (1 - z) * n + z * torch.stack([h[b] for b in running])
        else:
            new = (x + p).tanh() if layer.cell.nonlinearity == "tanh" else (x + p).relu()
        for row, b in enumerate(running):
            h[b] = new[row]
            outputs[b].append(new[row])
            if kind == "LSTM":
                c[b] = cell[row]
    states = (torch.stack(h), torch.stack(c)) if kind == "LSTM" else (torch.stack(h),)
    return [torch.stack(o) for o in outputs], states
