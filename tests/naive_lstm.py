"""An LSTM with norms from its equations, by statistics of the current batch or of a population, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DELTA, EPS = 1e-4, 1e-3
Steps = dict[str, list[tuple[Tensor, ...]]]
"""For each norm and step: mean and variance over the samples, mean and variance over the features."""


def run_lstm(
    layer: Any, x: Tensor, batch_size: float, population: Steps | None = None, mode: str = "cccc"
) -> tuple[Tensor, Steps]:
    """Outputs and statistics of ``(T, B, size)``, from a zero state.

    The weights of the two parts are those of ``batch_size``; statistics over samples are unbiased in what is returned.
    """
    samples, hidden = x.shape[1], layer.hidden_size
    h = c = torch.zeros(samples, hidden, dtype=x.dtype)
    outputs, seen = [], Steps(ih=[], hh=[], cell=[])

    def norm(name: str, rows: Tensor, gates: int, t: int) -> Tensor:
        module, grouped = getattr(layer, f"norm_{name}_l0"), rows.view(samples, gates, hidden)
        own = (
            grouped.mean(0),
            grouped.var(0, correction=0),
            grouped.mean(2),
            grouped.var(2, correction=0),
        )
        seen[name].append((own[0], grouped.var(0), own[2].mean(0), own[3].mean(0)))
        used = list(own)
        if population is not None:
            given = population[name][min(t, len(population[name]) - 1)]
            used = [theirs if letter == "p" else ours for letter, theirs, ours in zip(mode, given, own, strict=True)]
        w_f, w_b = 1 / batch_size - DELTA, 1 - 1 / batch_size - DELTA
        feature = (grouped - used[2][..., None]) / (used[3][..., None] + EPS).sqrt()
        batch = (grouped - used[0]) / (used[1] + EPS).sqrt()
        y = module.scale * (w_f * feature + w_b * batch)
        y = y.reshape(samples, -1) * module.weight
        return y if module.bias is None else y + module.bias

    with torch.no_grad():
        for t, rows in enumerate(x):
            a = norm("ih", rows @ layer.weight_ih_l0.T, 4, t) + layer.bias_ih_l0
            a = a + norm("hh", h @ layer.weight_hh_l0.T, 4, t) + layer.bias_hh_l0
            i, f, g, o = a.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(norm("cell", c, 1, t))
            outputs.append(h)
    return torch.stack(outputs), seen
