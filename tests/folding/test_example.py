"""Numbers of axes, known from an example or a trace, and the comparison of a folded model with the model on it."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln import BatchLayerNorm, Normalization, fold, recompute_population, set_mode
from lightning_bln.convert import to_bln
from lightning_bln.folding import Affine
from lightning_bln.folding.difference import difference, leaves
from lightning_bln.modes import mode_layers

SIZE = 4
"""Features and length, so that no size tells which axis is which."""


def with_statistics(model: nn.Module) -> Any:
    """The model in float64 and evaluation mode, with random parameters and statistics that differ by feature."""
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, Normalization):
            shape = [3, *[SIZE] * (3 if module.channel_dim == -3 else 2)]
            shape[module.channel_dim] = SIZE
            recompute_population(module, [2 * torch.randn(*shape, dtype=torch.float64) + torch.arange(SIZE)])
    if mode_layers(model):
        set_mode(model, "pppp")
    return model.eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) + 1


def assert_same(plain: nn.Module, model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


def bln(channel_dim: int) -> nn.Module:
    return BatchLayerNorm(SIZE, channel_dim=channel_dim, positions="shared")


def linear() -> nn.Module:
    return nn.Linear(SIZE, SIZE)


NORMS = {"batchnorm": lambda: nn.BatchNorm1d(SIZE), "sync": lambda: nn.SyncBatchNorm(SIZE), "bln": lambda: bln(1)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", ["behind", "before"])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_norm_on_axis_1_goes_into_a_linear_layer_where_an_example_has_two_axes(norm, order, axes) -> None:
    parts = [linear(), nn.Dropout(), NORMS[norm]()]
    model = with_statistics(nn.Sequential(*(parts if order == "behind" else parts[::-1])))
    x, others = inputs(*[3, SIZE, SIZE][:axes]), [inputs(3, SIZE), inputs(3, SIZE, SIZE)]
    plain, report = fold(model, report=True)
    assert "depends on the input; pass example=" in str(report)
    for one in others:
        assert_same(plain, model, one)
    assert any(isinstance(one, Affine) for one in plain)
    plain, report = fold(model, report=True, example=x)
    assert_same(plain, model, x)
    assert any(isinstance(one, Affine) for one in plain) == (axes == 3)
    reason = (
        "for inputs of as many axes as the example's" if axes == 2 else "its feature axis is not that of the Linear"
    )
    assert reason in str(report)


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "is_folded", "with_example"),
    [
        (linear, lambda: bln(-1), (3, SIZE), True, True),
        (linear, lambda: bln(-1), (3, SIZE, SIZE), True, True),
        (linear, lambda: bln(2), (3, SIZE, SIZE), False, True),
        (lambda: nn.Conv1d(SIZE, SIZE, 1), lambda: nn.BatchNorm1d(SIZE), (3, SIZE, SIZE), True, True),
        (lambda: nn.Conv1d(SIZE, SIZE, 1), lambda: bln(-2), (3, SIZE, SIZE), True, True),
        (lambda: nn.Conv1d(SIZE, SIZE, 1), lambda: bln(2), (3, SIZE, SIZE), False, False),
        (lambda: nn.Conv2d(SIZE, SIZE, 1), lambda: nn.BatchNorm2d(SIZE), (3, SIZE, SIZE, SIZE), True, True),
        (lambda: nn.Conv2d(SIZE, SIZE, 1), lambda: nn.BatchNorm1d(SIZE), (SIZE, SIZE, SIZE), False, False),
        (lambda: nn.Conv2d(SIZE, SIZE, 1), lambda: bln(-3), (3, SIZE, SIZE, SIZE), True, True),
        (lambda: nn.Conv3d(SIZE, SIZE, 1), lambda: nn.BatchNorm2d(SIZE), (SIZE, SIZE, SIZE, SIZE), False, False),
        (linear, lambda: nn.BatchNorm2d(SIZE), (3, SIZE, SIZE, SIZE), False, False),
        (linear, lambda: to_bln(nn.BatchNorm2d(SIZE), norm="keep"), (3, SIZE, SIZE, SIZE), False, False),
    ],
)
def test_axes_that_agree_whatever_the_input_need_no_example(layer, norm, shape, is_folded, with_example) -> None:
    model = with_statistics(nn.Sequential(layer(), norm()))
    x = inputs(*shape)
    for example, expected in ((None, is_folded), (x, with_example)):
        plain = fold(model, example=example)
        assert isinstance(plain[1], nn.Identity) == expected
        assert_same(plain, model, x)


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm1d(SIZE), lambda: bln(1)])
def test_an_example_without_a_batch_axis_shows_that_a_convolution_has_none(norm) -> None:
    model, x = with_statistics(nn.Sequential(nn.Conv1d(SIZE, SIZE, 1), norm())), inputs(SIZE, SIZE)
    plain = fold(model, example=x)
    assert isinstance(plain[1], Affine)
    assert_same(plain, model, x)


class Head(nn.Module):
    """Convolution and a classifier, flattened in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv1d(SIZE, 1, 1)
        self.flat = nn.Flatten(*(() if way == "layer" else (0, 1)))
        self.first, self.norm, self.last = linear(), nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way in ("layer", "first axes"):
            x = self.flat(x)
        elif self.way == "function":
            x = torch.flatten(x, start_dim=1)
        elif self.way == "method":
            x = x.flatten(1)
        elif self.way == "view":
            x = x.view(x.size(0), -1)
        elif self.way == "three":
            x = x.view(x.size(0), SIZE, -1).expand(-1, -1, SIZE)
        return self.last(F.relu(self.norm(self.first(F.dropout(x, training=False)))))


@pytest.mark.parametrize(
    ("way", "is_folded"),
    [("layer", True), ("function", True), ("method", True), ("view", True), ("three", False), ("first axes", False)],
)
def test_a_trace_proves_two_axes_behind_flatten(way: str, is_folded: bool) -> None:
    model, x = with_statistics(Head(way)), inputs(3, SIZE, SIZE)
    plain = fold(model)
    assert isinstance(plain.norm, nn.Identity) == is_folded
    assert_same(plain, model, x)
    assert_same(fold(model, example=x), model, x)


class Changes(nn.Module):
    """A view with two axes, which is given another shape in place."""

    def __init__(self, change: Any, way: str) -> None:
        super().__init__()
        self.change, self.way = change, way
        self.first, self.norm = linear(), nn.BatchNorm1d(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1) if self.way == "flatten" else x.view(-1, SIZE)
        self.change(F.dropout(y, training=False) if self.way == "alias" else y)
        return self.norm(self.first(y))


@pytest.mark.parametrize("way", ["flatten", "view", "alias"])
@pytest.mark.parametrize(
    ("change", "is_folded"),
    [
        (lambda y: y.unsqueeze_(0), False),
        (lambda y: y.resize_(1, SIZE, SIZE), False),
        (lambda y: y.relu_(), True),
        (lambda y: y.mul_(2).add_(1), True),
        (torch.relu_, True),
    ],
)
def test_a_shape_that_changes_in_place_proves_nothing(change, is_folded, way) -> None:
    model = with_statistics(Changes(change, way))
    plain = fold(model)
    assert isinstance(plain.norm, nn.Identity) == is_folded
    x = inputs(SIZE, SIZE)
    assert_same(lambda _: plain(x.clone()), lambda _: model(x.clone()), x)  # type: ignore[arg-type]


def any_layer(rng: random.Random, axes: int) -> tuple[nn.Module, int]:
    """A layer for values of so many axes of equal size, and the axes behind it."""
    kinds = ["linear", "linear", "norm", "norm", "act", "dropout"] + ["conv", "flatten"] * (axes == 3)
    kind = rng.choice(kinds)
    if kind == "linear":
        return nn.Linear(SIZE, SIZE, bias=rng.random() < 0.5), axes
    if kind == "norm":
        dims = [1, -1] if axes == 2 else [1, -1, -2, 2]
        return rng.choice([nn.BatchNorm1d(SIZE), bln(rng.choice(dims))]), axes
    if kind == "conv":
        return nn.Conv1d(SIZE, SIZE, 1), axes
    if kind == "flatten":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, SIZE)), 2
    return (nn.Tanh() if kind == "act" else nn.Dropout()), axes


@pytest.mark.parametrize("seed", range(60))
def test_sizes_that_tell_no_axis_from_another_mislead_no_fold(seed: int) -> None:
    rng = random.Random(seed)
    first = axes = rng.choice([2, 3])
    layers = []
    for _ in range(rng.randint(2, 8)):
        layer, axes = any_layer(rng, axes)
        layers.append(layer)
    cut = rng.randint(0, len(layers))
    model = with_statistics(nn.Sequential(nn.Sequential(*layers[:cut]), *layers[cut:]))
    x = inputs(*[5, SIZE, SIZE][:first])
    plain = fold(model)
    assert_same(plain, model, x)
    exact = fold(model, example=x)
    assert_same(exact, model, x)
    affine = [sum(isinstance(one, Affine) for one in made.modules()) for made in (exact, plain)]
    assert affine[0] <= affine[1]
    if first == 2:  # the same layers, if none needs two or three axes
        try:
            expected = model(inputs(5, SIZE, SIZE))
        except RuntimeError:
            return
        assert_same(plain, model, inputs(*expected.shape))


def test_a_norm_that_the_example_does_not_reach_stays_open() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = linear(), nn.BatchNorm1d(SIZE)

        def forward(self, x: Tensor, whole: bool = True) -> Tensor:
            return self.norm(self.linear(x)) if whole else x

    model = with_statistics(Skips())
    assert isinstance(fold(model, example=(inputs(2, SIZE), False)).norm, Affine)
    assert isinstance(fold(model, example={"x": inputs(2, SIZE), "whole": True}).norm, nn.Identity)
    assert isinstance(fold(model, example={"x": inputs(2, SIZE)}).norm, nn.Identity)


class Counts(nn.Module):
    """A forward that writes into buffers, attributes and its input, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = linear(), nn.BatchNorm1d(SIZE)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        x += torch.rand_like(x)
        self.last = self.norm(self.linear(x)).sum()
        return {"y": self.norm(self.linear(x)) * torch.rand(()), "nan": x.new_tensor(float("nan"))}, self.last, "name"


def test_an_example_leaves_model_input_and_random_generators_alone() -> None:
    model, x = with_statistics(Counts()).train(), inputs(3, SIZE)
    before, given, state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    plain = fold(model, example=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert model.training
    assert model.last is None
    assert plain.last is None
    for made in (model, plain):
        assert made.calls == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert isinstance(plain.norm, nn.Identity)


class Walks(nn.Module):
    """A forward that a trace does not show: it keeps what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Conv1d(SIZE, SIZE, 1), nn.BatchNorm1d(SIZE))

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.isnan().any():
            return []
        found = []
        for part in self.parts:
            x = part(x)
            found.append(x)
        return found


def test_a_folded_model_that_gives_other_outputs_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model = with_statistics(Walks())
    fold(model)
    caplog.clear()
    with pytest.raises(ValueError, match=r"output\[0\] of the folded model differs .* example=, by .* of its size"):
        fold(model, example=inputs(3, SIZE, SIZE))
    assert not caplog.records
    assert isinstance(model.parts[1], nn.BatchNorm1d)


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fold(linear(), example=torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"example has the keys \[1\], but a dict holds arguments by name"):
        fold(linear(), example={1: torch.randn(2, SIZE)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    parts = [one for _ in range(12) for one in (nn.Linear(32, 32), BatchLayerNorm(32), nn.Tanh())]
    model = nn.Sequential(*parts)
    recompute_population(model, [torch.randn(64, 32) + 5])
    set_mode(model, "pppp")
    model = model.to(dtype)
    try:
        model.eval()(torch.randn(2, 32).to(dtype))
    except RuntimeError as error:  # of torch's own operators, in earlier versions
        if "not implemented for" not in str(error):
            raise
        return
    fold(model, example=torch.randn(16, 32).to(dtype))


def test_rounding_within_autocast_is_no_difference() -> None:
    class Casts(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    model = with_statistics(Casts(linear(), nn.BatchNorm1d(SIZE), nn.Tanh(), linear())).float()
    fold(model, example=torch.randn(16, SIZE))


@dataclasses.dataclass
class Output:
    logits: Any
    names: tuple[str, ...] = ("a",)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("found", "expected", "gap"),
    [
        (torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0]), 0.125),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), INF),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, INF]), 0.0),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF]), INF),
        (torch.tensor([0.25]), torch.tensor([0.0]), 0.25),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5]), 0.25),
        (torch.tensor([True]), torch.tensor([True]), 0.0),
        (torch.zeros(2), torch.zeros(3), INF),
        (torch.zeros(2), torch.zeros(2).double(), INF),
        (torch.zeros(0), torch.zeros(0), 0.0),
        (torch.tensor([3.0 + 4.0j]), torch.tensor([3.0 + 3.0j]), 18**-0.5),
        (np.array([2.0]), np.array([1.0]), 1.0),
        (2.0, 1.0, 1.0),
        (2.0, 1, 1.0),
        (2, 1, INF),
        (2**70, 2**70, 0.0),
        (NAN, NAN, 0.0),
        (True, False, INF),
        ({"a"}, {"a"}, 0.0),
        ({"a"}, {"b"}, INF),
        (torch.Size([2]), torch.Size([3]), INF),
        (object(), object(), 0.0),
        ([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], INF),
        (torch.tensor([2**62]), torch.tensor([2**62 + 1]), 1.0),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), INF),
        (torch.tensor([complex(NAN, 1)]), torch.tensor([complex(NAN, 1)]), 0.0),
        ("a", "b", INF),
        (None, None, 0.0),
        (None, torch.zeros(2), INF),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse(), 0.0),
        (torch.zeros(2, device="meta"), torch.zeros(2, device="meta"), 0.0),
    ],
)
def test_a_difference_is_relative_to_the_largest_number(found: Any, expected: Any, gap: float) -> None:
    assert difference(found, expected, 0.1).relative == pytest.approx(gap)


def test_a_tolerance_that_is_no_number_is_never_kept() -> None:
    assert not difference(torch.zeros(2), torch.zeros(2), NAN).is_alike
    assert not difference([torch.zeros(2), 1.0], [torch.zeros(2), 1.0], NAN).is_alike
    assert difference(torch.zeros(2), torch.zeros(2), 0.0).is_alike
    assert not difference(torch.zeros(2), torch.ones(2), 0.0).is_alike


def test_leaves_have_places() -> None:
    output: Any = {"a": [torch.zeros(1), 2], "b": Output(3.0)}
    output["c"] = output
    assert [name for name, _ in leaves(output)] == ["['a'][0]", "['a'][1]", "['b'].logits", "['b'].names[0]", "['c']"]
    packed = nn.utils.rnn.pack_sequence([torch.zeros(2, 1), torch.zeros(1, 1)])
    assert [name for name, _ in leaves(packed)] == ["[0]", "[1]", "[2]", "[3]"]
