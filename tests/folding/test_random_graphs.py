"""Models of random graphs, with shared layers, branches, functions between and parts that cannot be traced."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ConvBLN1d, Normalization, fold, recompute_population, set_mode
from lightning_bln.folding import Affine
from lightning_bln.modes import mode_layers

KINDS = ("conv", "pointwise", "batchnorm", "norm", "relu", "identity", "dropout", "sequence", "block", "graph")


class Graph(nn.Module):
    """Layers on 4 channels, in a random order, on the last values or earlier ones."""

    def __init__(self, rng: random.Random, depth: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.plan: list[tuple[int, int, bool]] = []
        self.can_be_traced = rng.random() < 0.8
        for index in range(rng.randint(2, 7)):
            if index and rng.random() < 0.15:
                layer = rng.randrange(len(self.layers))
            else:
                self.layers.append(any_layer(rng, depth))
                layer = len(self.layers) - 1
            back = 0 if rng.random() < 0.8 else rng.randint(0, index)
            self.plan.append((layer, back, rng.random() < 0.15))

    def forward(self, x: Tensor) -> Tensor:
        values = [x * 1.0]
        if not self.can_be_traced and x.isnan().any():
            return x
        for layer, back, adds in self.plan:
            source = values[-1 - back]
            y = self.layers[layer](source.clone() if back else source)  # some layers write into their input
            values.append(y + values[0].mean() if adds else y)
        return values[-1]


def any_layer(rng: random.Random, depth: int) -> nn.Module:
    kind = rng.choice(KINDS)
    if kind == "conv":
        padding = rng.choice(["zeros", "circular"])
        return nn.Conv1d(4, 4, 3, padding=1, padding_mode=padding, bias=rng.random() < 0.5)
    if kind == "pointwise":
        return nn.Conv1d(4, 4, 1)
    if kind == "norm":
        norm = rng.choice(["bln", "batch", "layer"])
        return Normalization(4, channel_dim=1, positions="shared", scale=False, norm=norm)
    if kind in ("relu", "dropout"):
        return {"relu": nn.ReLU, "dropout": nn.Dropout}[kind](inplace=rng.random() < 0.3)
    if kind == "identity":
        return nn.Identity()
    if kind == "sequence":
        return nn.Sequential(*(any_layer(rng, depth) for _ in range(rng.randint(1, 3))))
    if kind == "block":
        order = rng.choice(["conv-act-norm", "conv-norm-act"])
        activation = rng.choice([None, nn.ReLU, torch.tanh])
        return ConvBLN1d(4, 4, 3, padding=1, positions="shared", order=order, activation=activation)
    return Graph(rng, depth + 1) if kind == "graph" and depth < 2 else nn.BatchNorm1d(4)


@pytest.mark.exact
@pytest.mark.parametrize("seed", range(80))
def test_any_model_folds(seed: int) -> None:
    model = nn.Sequential(Graph(random.Random(seed)), nn.Conv1d(4, 2, 1), nn.BatchNorm1d(2)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    recompute_population(
        model.train(), [torch.randn(6, 4, 10, dtype=torch.float64) + 2 for _ in range(2)], samples=None
    )
    if mode_layers(model):
        set_mode(model, "pppp")
    x = torch.randn(3, 4, 10, dtype=torch.float64) + 1
    with torch.no_grad():
        expected = model.eval()(x)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        plain = fold(model)
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kinds = {type(one) for one in plain.modules() if type(one).__module__.startswith("lightning_bln")}
    assert kinds <= {Affine}
