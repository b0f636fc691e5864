"""Modes said to be equal give the same output bit for bit, and modes said to differ do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_bln import ALL_MODES, BatchLayerNorm, ConvBLN1d, Recurrent, fan_out, recompute_population, set_mode
from lightning_bln.equal_modes import (
    depends_on_batch,
    differing_modes,
    letters_read,
    present_mode,
    settle,
    standard,
)
from lightning_bln.modes import HasMode, StatisticsMode, mode_layers
from lightning_bln.norm import Normalization

BATCH = ("ppcc", "pccc", "cpcc", "cccc")
FEATURE = ("pppp", "pppc", "ppcp", "ppcc")
FEATURES = 6


def perceptron(*norms: str) -> nn.Module:
    layers = [
        nn.Sequential(nn.Linear(FEATURES, FEATURES), Normalization(FEATURES, norm=one), nn.Tanh()) for one in norms
    ]
    return nn.Sequential(*layers, nn.Linear(FEATURES, 2))


class Reads(nn.Module):
    """Recurrent layers in a row, each with its own norm, and their states' outputs alone."""

    def __init__(self, *norms: str | None, cell: str = "lstm", **options: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent(cell, FEATURES, FEATURES, norm=one, **options) for one in norms)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, 4, -1).movedim(0, 1).cumsum(0)
        for layer in self.layers:
            x, _ = layer(x)
        return x.movedim(0, 1)


class Own(HasMode):
    """A user's layer, which says nothing of the letters that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Normalization(FEATURES, norm="batch")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + sum(place * used for place, used in enumerate(self.mode.uses_population, 1))


class MeanOnly(Own):
    """A user's layer that reads one letter."""

    reads_letters = (True, False, False, False)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.register_buffer("center", torch.tensor(0.25))

    def forward(self, x: Tensor) -> Tensor:
        return x - (self.center if self.mode.uses_population[0] else x.mean(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "batch norms": (lambda: perceptron("batch", "batch"), BATCH),
    "layer norms": (lambda: perceptron("layer", "layer"), FEATURE),
    "both halves": (lambda: perceptron("batch", "layer"), ALL_MODES),
    "BLN": (lambda: perceptron("bln"), ALL_MODES),
    "BLN among batch norms": (lambda: perceptron("batch", "bln"), ALL_MODES),
    "a convolution block": (lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), ConvBLN1d(3, 4, 1)), ALL_MODES),
    "recurrent, batch": (lambda: Reads("batch"), BATCH),
    "recurrent, layer": (lambda: Reads("layer"), FEATURE),
    "recurrent, joint layer": (lambda: Reads("layer", gate_statistics="joint", time_statistics="shared"), FEATURE),
    "recurrent, BLN": (lambda: Reads("bln"), ALL_MODES),
    "recurrent, batch, reference": (lambda: Reads("batch", backend="reference"), BATCH),
    "recurrent, layer, reference": (lambda: Reads("layer", cell="gru", backend="reference"), FEATURE),
    "a GRU, batch, both directions": (lambda: Reads("batch", cell="gru", bidirectional=True), BATCH),
    "no norm and batch": (lambda: Reads(None, "batch"), BATCH),
    "no norm and layer": (lambda: Reads("layer", None), FEATURE),
    "no norm and BLN": (lambda: Reads(None, "bln"), ALL_MODES),
    "recurrent, batch, and layer": (lambda: Reads("batch", "layer"), ALL_MODES),
    "a user's layer": (Own, ALL_MODES),
    "a user's layer of one letter": (MeanOnly, ("ppcc", "cpcc")),
}


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name][0]()
    data = torch.randn(32, FEATURES) * 2 + 0.5
    if name != "a user's layer of one letter":
        recompute_population(model, list(data.split(8)))
    return model.eval(), torch.randn(5, FEATURES) + 1


@pytest.mark.parametrize("name", MODELS)
def test_modes_are_equal_where_said_and_nowhere_else(name: str) -> None:
    model, x = prepared(name)
    layers, outputs = mode_layers(model), dict[StatisticsMode, Tensor]()
    assert differing_modes(layers) == MODELS[name][1]
    for mode in ALL_MODES:
        set_mode(model, mode)
        with torch.no_grad():
            outputs[mode] = model(x)
    letters = letters_read(layers)
    for mode, out in outputs.items():
        representative = standard(mode, letters)
        assert representative in MODELS[name][1]
        assert torch.equal(out, outputs[representative]), f"{mode} is not {representative}"
    distinct = [outputs[StatisticsMode(mode)] for mode in MODELS[name][1]]
    assert not any(torch.equal(one, other) for place, one in enumerate(distinct) for other in distinct[:place])


@pytest.mark.parametrize("name", MODELS)
def test_a_mode_that_is_said_not_to_depend_on_the_batch_does_not(name: str) -> None:
    model, x = prepared(name)
    layers = mode_layers(model)
    for mode in ALL_MODES:
        set_mode(model, mode)
        with torch.no_grad():
            is_same = torch.allclose(model(x)[:2], model(x[:2]), atol=1e-6)
        assert is_same != depends_on_batch(layers, mode), mode


@pytest.mark.parametrize("name", ["batch norms", "layer norms", "recurrent, batch", "recurrent, layer"])
def test_a_fan_out_over_the_modes_that_differ_equals_each_alone(name: str) -> None:
    model, x = prepared(name)
    modes = differing_modes(mode_layers(model))
    with torch.no_grad(), fan_out(model, modes):
        together = model(x).unflatten(0, (len(modes), -1))
    for mode, out in zip(modes, together, strict=True):
        set_mode(model, mode)
        with torch.no_grad():
            torch.testing.assert_close(out, model(x))


def layers_of(*norms: str, modes: tuple[str, ...] = ()) -> list[HasMode]:
    layers: list[HasMode] = [Normalization(FEATURES, norm=norm) for norm in norms]
    for layer, mode in zip(layers, modes, strict=False):
        layer.mode = mode
    return layers


@pytest.mark.parametrize(
    ("norm", "candidates", "expected"),
    [
        ("batch", ["pppp", "ppcc", "cccc"], ("ppcc", "cccc")),
        ("batch", ["pppp", "pppc", "cccp"], ("pppp", "cccp")),
        ("batch", [mode for mode in ALL_MODES if mode.is_batch_independent], ("ppcc",)),
        ("layer", ["cccc", "ppcc", "cccp"], ("ppcc", "cccp")),
        ("layer", ["cc**".replace("*", letter) for letter in "pc"], ("ccpp", "cccc")),
        ("bln", ["cccc", "pppp"], ("cccc", "pppp")),
    ],
)
def test_a_class_is_represented_by_the_default_letters_or_its_first(
    norm: str, candidates: list[str], expected: tuple[str, ...]
) -> None:
    assert differing_modes(layers_of(norm), candidates) == expected


def test_layers_are_settled_on_the_candidate_that_equals_their_mode() -> None:
    for mode, settled in [("pppp", "ppcc"), ("pcpp", "pccc"), ("ppcc", "ppcc")]:
        layers = layers_of("batch", "batch", modes=(mode, mode))
        assert settle(layers, ALL_MODES) == BATCH
        assert {layer.mode for layer in layers} == {settled}
    # by other names, but each layer does what it would do in ccpc
    layers = layers_of("batch", "layer", modes=("cccc", "pppc"))
    settle(layers, ALL_MODES)
    assert {layer.mode for layer in layers} == {"ccpc"}


def test_layers_in_no_candidate_keep_their_modes_unless_there_is_one_alone() -> None:
    layers = layers_of("batch", "batch", modes=("pppp", "cccc"))
    settle(layers, ALL_MODES)
    assert [layer.mode for layer in layers] == ["pppp", "cccc"]
    assert present_mode(layers, BATCH_MODES) is None
    settle(layers, [StatisticsMode("pcpp"), StatisticsMode("pccp")])
    assert {layer.mode for layer in layers} == {"pcpp"}
    assert present_mode(layers, [StatisticsMode("cccc")]) == "pcpp"


BATCH_MODES = [StatisticsMode(mode) for mode in BATCH]


def test_no_layer_reads_no_letter() -> None:
    assert letters_read([]) == (False,) * 4
    assert letters_read([BatchLayerNorm(2)]) == (True,) * 4
    assert differing_modes([]) == ("ppcc",)
