"""Copies in plain torch modules: what they compute, what they are made of, what the report says."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_bln import (
    BLNGRU,
    BatchLayerNorm,
    ConvBLN1d,
    ConvBLN2d,
    Normalization,
    SweepResult,
    fold,
    recompute_population,
    set_mode,
    to_bln,
)
from lightning_bln.folding import Affine
from lightning_bln.modes import ALL_MODES, mode_layers
from lightning_bln.moments import Moments

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
AFFINE_MODES = {"bln": ["pppp"], "batch": ["pppp", "ppcc"], "layer": ["pppp", "ccpp"]}


def populated(model: nn.Module, shape: tuple[int, ...], mode: str = "pppp", shift: float = 3.0) -> Any:
    """The model with random parameters and a population of inputs that are not centred, in evaluation mode."""
    dtype = next(model.parameters()).dtype
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    batches = [(2 * torch.randn(16, *shape) + shift).to(dtype) for _ in range(3)]
    recompute_population(model.train(), batches)
    if mode_layers(model):
        set_mode(model, mode)
    return model.eval()


def assert_equal(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float64) -> None:
    scale = float(expected.abs().max().clamp(min=1.0))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def assert_folds(model: nn.Module, shape: tuple[int, ...], *, affine: int = 0, has_example: bool = False) -> nn.Module:
    """The folded model computes the same, is made of torch's modules and of so many ``Affine``, all else untouched."""
    dtype = next(model.parameters()).dtype
    before = copy.deepcopy(model.state_dict())
    x = (2 * torch.randn(4, *shape) + 3).to(dtype)
    with torch.no_grad():
        expected = model(x)
    state = torch.get_rng_state()
    plain = fold(model, example=x if has_example else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(plain(x), expected, dtype)
    assert torch.equal(model(x), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    ours = [one for one in plain.modules() if type(one).__module__.startswith("lightning_bln")]
    assert [type(one) for one in ours] == [Affine] * affine
    assert not plain.training
    return plain


LINEAR: dict[str, tuple[Any, int, tuple[int, ...]]] = {
    "linear": (nn.Linear, 6, (4,)),
    "conv1d": (lambda i, o, **k: nn.Conv1d(i, o, 3, **k), 6, (4, 9)),
    "conv2d": (lambda i, o, **k: nn.Conv2d(i, o, 3, stride=2, **k), 6, (4, 9, 9)),
    "conv3d": (lambda i, o, **k: nn.Conv3d(i, o, 2, **k), 6, (4, 4, 5, 3)),
    "grouped": (lambda i, o, **k: nn.Conv2d(i, o, 3, groups=2, **k), 6, (4, 7, 7)),
    "reflecting": (lambda i, o, **k: nn.Conv2d(i, o, 3, padding=1, padding_mode="reflect", **k), 6, (4, 7, 7)),
    "circular": (lambda i, o, **k: nn.Conv1d(i, o, 3, padding=1, padding_mode="circular", **k), 6, (4, 7)),
    "zeros": (lambda i, o, **k: nn.Conv2d(i, o, 3, padding=1, **k), 6, (4, 7, 7)),
    "same": (lambda i, o, **k: nn.Conv2d(i, o, 3, padding="same", **k), 6, (4, 7, 7)),
    "transposed1d": (lambda i, o, **k: nn.ConvTranspose1d(i, o, 3, stride=2, **k), 6, (4, 7)),
    "transposed2d": (lambda i, o, **k: nn.ConvTranspose2d(i, o, 3, groups=2, padding=1, **k), 6, (4, 5, 5)),
    "transposed3d": (lambda i, o, **k: nn.ConvTranspose3d(i, o, 2, **k), 6, (4, 3, 3, 3)),
}
INEXACT = {"zeros", "same", "transposed1d", "transposed2d", "transposed3d"}
"""Layers that read zeros beside their input."""


@pytest.mark.exact
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("norm", "mode"), [(norm, mode) for norm, modes in AFFINE_MODES.items() for mode in modes])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("order", ["behind", "before", "apart"])
def test_a_norm_beside_a_layer_folds(name, norm, mode, dtype, order) -> None:
    rng = random.Random(f"{name}{norm}{mode}{dtype}{order}")
    make, outputs, shape = LINEAR[name]
    layer = make(4, outputs, bias=rng.random() < 0.5, dtype=torch.float64)
    features = 4 if order == "before" else outputs
    options: dict[str, Any] = {"scale": rng.choice([True, False, 0.3]), "affine": rng.random() < 0.7}
    options |= {"population": rng.choice(["pooled", "paper"]), "bias": rng.random() < 0.7, "dtype": torch.float64}
    axis = -1 if name == "linear" else 1  # the same one, but for a linear layer not of inputs of any number of axes
    own = Normalization(features, norm=norm, channel_dim=axis, positions="shared", **options)
    parts = {"behind": [layer, own], "before": [own, layer], "apart": [layer, nn.Tanh(), own]}[order]
    model = populated(nn.Sequential(*parts), shape, mode).to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        return assert_folds_in_half(model, shape, dtype)
    stays = order == "apart" or (order == "before" and name in INEXACT)
    plain = assert_folds(model, shape, affine=int(stays))
    assert sum(isinstance(one, nn.Identity) for one in plain.modules()) == (not stays)


def assert_folds_in_half(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Weights are those of a float64 model, rounded once."""
    plain = fold(model)
    exact = fold(copy.deepcopy(model).double())
    for one, other in zip(plain.parameters(), exact.parameters(), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))
    x = torch.randn(3, *shape).to(dtype)
    try:
        found = plain(x)
    except RuntimeError as error:  # of torch's own operators, in earlier versions
        if "not implemented for" not in str(error):
            raise
        return
    assert found.dtype == dtype
    assert_equal(found.double(), exact(x.double()), dtype)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e6])
def test_large_means_leave_the_factors_exact(shift: float) -> None:
    model = populated(nn.Sequential(nn.Linear(3, 5), BatchLayerNorm(5)).double(), (3,), shift=shift)
    x = torch.randn(8, 3, dtype=torch.float64) + shift
    # as rounding allows, of products that large
    torch.testing.assert_close(fold(model)(x), model(x), rtol=0, atol=1e-13 * max(abs(shift), 1.0))
    norm = copy.deepcopy(model[1])
    plain = fold(norm)
    population = norm.population
    inverse = 1 / population.batch_size[0]
    by_hand = (inverse - norm.delta) / (population.feature_var[0] + norm.eps).sqrt()
    by_hand = by_hand + (1 - inverse - norm.delta) / (population.batch_var[0] + norm.eps).sqrt()
    torch.testing.assert_close(plain.weight, norm.weight.data * by_hand / 5**0.5, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batchnorm_behind_a_linear_layer_folds_as_torch_folds_it(kind, affine, bias) -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), kind(5, affine=affine)).double()
    model = populated(model, (4,)) if affine else model.eval()
    plain = assert_folds(model, (4,), has_example=True)
    if affine:
        expected = fuse_linear_bn_eval(model[0], model[1])
        torch.testing.assert_close(plain[0].weight, expected.weight)
        torch.testing.assert_close(plain[0].bias, expected.bias)


class Residual(nn.Module):
    def __init__(self, channels: int, norm: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Residual(6, norm), Residual(6, norm))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def fused_by_torch(model: nn.Module) -> nn.Module:
    """Each convolution and the norm behind it, fused by torch's function."""
    traced = fx.symbolic_trace(copy.deepcopy(model))
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if isinstance(modules.get(str(node.target)), nn.BatchNorm2d):
            (source,) = node.all_input_nodes
            parent, _, name = str(source.target).rpartition(".")
            setattr(modules[parent], name, fuse_conv_bn_eval(modules[source.target], modules[node.target]))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def test_a_resnet_of_batchnorms_folds_as_torch_fuses_it() -> None:
    model = populated(ResNet().double(), (3, 9, 9))
    plain = assert_folds(model, (3, 9, 9))
    assert not any(isinstance(one, nn.BatchNorm2d) for one in plain.modules())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_equal(plain(x), fused_by_torch(model)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resnet_of_bln_folds_and_its_state_dict_loads_without_the_library(dtype) -> None:
    model = populated(to_bln(ResNet().double()), (3, 9, 9)).to(dtype)
    plain = assert_folds(model, (3, 9, 9))

    class Plain(ResNet):
        def __init__(self) -> None:
            super().__init__(lambda channels: nn.Identity())
            for name, child in self.named_modules():
                if isinstance(child, nn.Conv2d) and child.bias is None:
                    child.bias = nn.Parameter(torch.zeros(child.out_channels))
                assert "norm" not in name or isinstance(child, nn.Identity)

    other = Plain().to(dtype)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    assert torch.equal(other(x), plain(x))


class Branching(nn.Module):
    """A convolution's output that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class FunctionalBetween(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x)))


class ReadsWeights(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.sum()


class WithFlag(Branching):
    def forward(self, x: Tensor, returns_early: bool = False) -> Tensor:
        y = self.conv(x)
        return y if returns_early else self.norm(y)


class ChoosesByValue(Branching):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if y.sum() > 0 else self.norm(-y)


class Keeps(Branching):
    kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x)
        return self.norm(self.kept)


class OneNormTwice(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(2 * x))


class TwoInputsOfANorm(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


class OtherMethods(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).relu()

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        (Branching, 1),
        (FunctionalBetween, 1),
        (ReadsWeights, 1),
        (WithFlag, 0),
        (ChoosesByValue, 1),
        (Keeps, 0),
        (OneNormTwice, 0),
        (TwoInputsOfANorm, 1),
        (OtherMethods, 0),
    ],
)
def test_a_norm_folds_where_all_that_a_layer_feeds_is_the_norm(kind, affine) -> None:
    model = populated(kind().double(), (3, 5, 5))
    plain: Any = assert_folds(model, (3, 5, 5), affine=affine)
    assert kind is not Keeps or isinstance(plain.kept, Tensor)


def test_what_cannot_be_traced_is_reported_and_folds_within_its_parts() -> None:
    class Net(ChoosesByValue):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(6, 2, 1), nn.Dropout(), nn.BatchNorm2d(2))
            self.others = nn.ModuleList([Residual(2, nn.BatchNorm2d)])

        def forward(self, x: Tensor) -> Tensor:
            return self.others[0](self.inner(super().forward(x)))

    model = populated(Net().double(), (3, 5, 5))
    assert_folds(model, (3, 5, 5), affine=1)
    _, report = fold(model, report=True)
    assert "model: Net -> Net (cannot be traced, so that norms fold within its parts alone: TraceError" in str(report)
    _, report = fold(populated(WithFlag(), (3, 5, 5)), report=True)
    assert "model: WithFlag -> WithFlag (traced as called without its optional arguments)" in str(report)


def test_a_sequence_with_a_part_that_cannot_be_traced_folds_by_its_order() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if float(x.sum()) else x

    parts = [nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), Refuses(), nn.BatchNorm1d(4), Refuses(), nn.Conv1d(4, 2, 1)]
    plain = assert_folds(populated(nn.Sequential(*parts).double(), (3, 8)), (3, 8), affine=1)
    assert isinstance(plain[1], nn.Identity)


def test_layers_in_several_places_fold_once_or_not_at_all() -> None:
    conv, norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
    for parts, affine in [
        ([conv, norm, nn.ReLU(), conv, norm], 0),
        ([conv, norm, nn.ReLU(), conv], 1),
        ([conv, norm, nn.Conv1d(4, 4, 1), norm], 2),
    ]:
        model = populated(copy.deepcopy(nn.Sequential(*parts)).double(), (4, 6))
        plain = fold(model)
        x = torch.randn(2, 4, 6, dtype=torch.float64)
        assert_equal(plain(x), model(x))
        assert sum(isinstance(one, Affine) for one in plain) == affine


@pytest.mark.parametrize("order", ["conv-act-norm", "conv-norm-act"])
@pytest.mark.parametrize("activation", [nn.ReLU, torch.tanh, F.gelu, None, nn.PReLU])
@pytest.mark.parametrize("padding", [0, "same"])
def test_convolution_blocks_become_sequences(order, activation, padding) -> None:
    options: dict[str, Any] = {"order": order, "activation": activation, "positions": "shared", "padding": padding}
    blocks = [ConvBLN2d(3, 6, 3, groups=3, **options), ConvBLN2d(6, 4, 3, **options), nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*blocks)
    model(torch.randn(2, 3, 7, 7))
    model = populated(model.double(), (3, 7, 7))
    is_before = order == "conv-act-norm" and activation is not None
    plain = assert_folds(model, (3, 7, 7), affine=(2 if padding else 1) if is_before else 0)
    assert list(plain[0].state_dict())[:2] == ["conv.weight", "conv.bias"]
    assert type(plain[0]) is nn.Sequential


def test_blocks_that_a_sequence_cannot_stand_for_stay() -> None:
    block = populated(ConvBLN1d(3, 4, 3, positions="shared", activation=torch.sin, order="conv-norm-act"), (3, 8))
    plain, report = fold(block, report=True)
    assert isinstance(plain, ConvBLN1d)
    assert isinstance(plain.norm, nn.Identity)
    assert "its activation is a function, which torch has no module for" in str(report)
    x = torch.randn(2, 3, 8)
    assert_equal(plain(x), block(x), torch.float32)
    block.activation = nn.ReLU()
    block.register_forward_hook(lambda *_: None)
    assert "model: ConvBLN1d left alone (it has hooks, which a Sequential would not run)" in str(
        fold(block, report=True)[1]
    )


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBLN1d(3, 4, 3, positions="shared")
        self.norm = BatchLayerNorm(4, channel_dim=1, positions="shared")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.block(x, mask), None if mask is None else self.block.output_mask(mask))


def test_layers_that_are_called_with_a_mask_stay() -> None:
    model = populated(Masked(), (3, 8))
    plain, report = fold(model, report=True)
    assert [entry.became for entry in report.left_alone] == [None, None]
    assert "it is called with a mask, which no plain layer takes" in str(report)
    x, mask = torch.randn(2, 3, 8), torch.arange(8) < torch.tensor([[8], [6]])
    assert torch.equal(plain(x, mask), model(x, mask))


@pytest.mark.exact
@pytest.mark.parametrize("seed", range(40))
def test_random_nested_models_fold(seed: int) -> None:
    rng = random.Random(seed)

    def make(channels: int, depth: int) -> tuple[list[nn.Module], int]:
        parts: list[nn.Module] = []
        for _ in range(rng.randint(1, 4)):
            kind = rng.choice(["conv", "conv", "norm", "norm", "batch", "act", "nest", "residual", "block", "dropout"])
            if kind == "conv":
                outputs = rng.choice([2, 4, 6])
                padding = rng.choice([{"padding": 0}, {"padding": 1}, {"padding": 1, "padding_mode": "replicate"}])
                kind_of_conv = rng.choice([nn.Conv2d, nn.Conv2d, nn.ConvTranspose2d])
                extra = padding if kind_of_conv is nn.Conv2d else {}
                groups = rng.choice([1, 2])
                parts.append(kind_of_conv(channels, outputs, 3, groups=groups, bias=rng.random() < 0.5, **extra))
                channels = outputs
            elif kind == "norm":
                parts.append(BatchLayerNorm(channels, channel_dim=1, positions="shared", scale=False))
            elif kind == "batch":
                parts.append(rng.choice([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, affine=False)]))
            elif kind == "act":
                parts.append(rng.choice([nn.ReLU(), nn.Tanh(), nn.GELU()]))
            elif kind == "dropout":
                parts.append(rng.choice([nn.Dropout(), nn.Identity()]))
            elif kind == "residual":
                parts.append(Residual(channels, nn.BatchNorm2d))
            elif kind == "block":
                order = rng.choice(["conv-act-norm", "conv-norm-act"])
                parts.append(ConvBLN2d(channels, 4, 3, positions="shared", order=order, padding=1))
                channels = 4
            elif depth < 2:
                inner, channels = make(channels, depth + 1)
                parts.append(nn.Sequential(*inner))
        return parts, channels

    parts, channels = make(4, 0)
    model = nn.Sequential(*parts, nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2))
    model = populated(model.double(), (4, 12, 12))
    x = torch.randn(3, 4, 12, 12, dtype=torch.float64) + 1
    plain = fold(model)
    assert_equal(plain(x), model(x))
    ours = [one for one in plain.modules() if type(one).__module__.startswith("lightning_bln")]
    assert all(isinstance(one, Affine) for one in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parametrized_weights_are_baked_in_the_copy_alone(dtype) -> None:
    layer = nn.Linear(4, 5, dtype=dtype)
    model = nn.Sequential(layer, BatchLayerNorm(5, dtype=dtype))
    populated(model, (4,))
    parametrizations.weight_norm(layer)
    plain = assert_folds(model, (4,))
    assert type(plain[0]) is nn.Linear
    assert "weight" in plain[0].state_dict()
    assert hasattr(model[0], "parametrizations")
    model(torch.randn(2, 4, dtype=dtype)).sum().backward()
    assert model[0].parametrizations.weight.original0.grad is not None


def test_hooks_keep_layers_as_they_are() -> None:
    model = populated(nn.Sequential(nn.Linear(4, 5), BatchLayerNorm(5)), (4,))
    handle = model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    plain, report = fold(model, report=True)
    assert isinstance(plain[1], Affine)
    assert "1: BatchLayerNorm -> Affine (the Linear beside it has hooks)" in str(report)
    x = torch.randn(3, 4)
    assert_equal(plain(x), model(x), torch.float32)
    handle.remove()
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    plain, report = fold(model, report=True)
    assert isinstance(plain[1], BatchLayerNorm)
    assert "left alone (it has hooks, which a plain layer would not run)" in str(report)
    assert torch.equal(plain(x), model(x))


def test_hooks_of_containers_stand_between_layers_and_do_not_run() -> None:
    seen: list[Any] = []
    inner = nn.Sequential(nn.Linear(4, 5), BatchLayerNorm(5), nn.Linear(5, 5))
    model = populated(nn.Sequential(inner, BatchLayerNorm(5)), (4,))
    inner.register_forward_hook(lambda module, inputs, output: seen.append(output) or output * 3)
    plain = fold(model)
    assert not seen
    assert isinstance(plain[0][1], nn.Identity)
    assert isinstance(plain[1], Affine)
    x = torch.randn(3, 4)
    assert_equal(plain(x), model(x), torch.float32)


def test_tied_parameters_stay_tied() -> None:
    model = populated(nn.Sequential(nn.Linear(4, 4), BatchLayerNorm(4), nn.ReLU(), nn.Linear(4, 4)), (4,))
    model[3].weight = model[0].weight
    plain, report = fold(model, report=True)
    assert plain[3].weight is plain[0].weight
    assert "1: BatchLayerNorm -> Affine (the Linear beside it has tied parameters)" in str(report)


@pytest.mark.parametrize("norm", ["bln", "batch", "layer"])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_modes_that_read_the_input_stay(norm, mode) -> None:
    layer = Normalization(4, norm=norm)
    model = populated(nn.Sequential(nn.Linear(3, 4), layer), (3,), mode)
    plain, report = fold(model, report=True)
    x = torch.randn(5, 3)
    assert_equal(plain(x), model(x), torch.float32)
    affine = {"bln": mode == "pppp", "batch": mode[:2] == "pp", "layer": mode[2:] == "pp"}[norm]
    assert isinstance(plain[1], nn.Identity) == affine
    if not affine:
        folds = {"bln": "pppp", "batch": f"pp{mode[2:]}", "layer": f"{mode[:2]}pp"}[norm]
        expected = f"1: Normalization left alone (mode='{mode}' takes statistics from each input; {folds} would fold)"
        assert str(report) == expected


def test_the_report_names_what_a_mode_that_folds_would_cost() -> None:
    model = populated(nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4)), (3,), "ppcc")
    result = SweepResult({"ppcc": {"val_loss": 0.0734}, "pppp": {"val_loss": 0.0736}}, monitor="val_loss")
    _, report = fold(model, report=True, result=result)
    assert "pppp would fold: val_loss 0.0736 instead of 0.0734" in str(report)
    result = SweepResult({"cccc": {"val_loss": 0.0734}}, monitor="val_loss")
    assert str(fold(model, report=True, result=result)[1]).endswith("pppp would fold)")
    scores = {mode: {"acc": index / 10} for index, mode in enumerate(("ccpp", "pppp", "cpcc"))}
    model = populated(nn.Sequential(nn.Linear(3, 4), Normalization(4, norm="layer")), (3,), "ppcc")
    _, report = fold(model, report=True, result=SweepResult(scores, monitor="acc", direction="max"))
    assert "pppp would fold: acc 0.1000 instead of 0.2000" in str(report)


class OwnForward(BatchLayerNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "mode", "reason"),
    [
        (lambda: BatchLayerNorm(3), "pppp", "statistics of each position; train with positions='shared'"),
        (
            lambda: BatchLayerNorm(3),
            "cccc",
            "mode='cccc' takes statistics from each input; pppp is needed; statistics of each position",
        ),
        (lambda: OwnForward(3, positions="shared"), "pppp", "it has a forward of its own"),
        (lambda: nn.BatchNorm1d(5, track_running_stats=False), None, "tracks no running statistics"),
        (lambda: nn.LayerNorm(3), None, "it normalises by each input's own statistics"),
        (lambda: nn.GroupNorm(1, 5), None, "it normalises by each input's own statistics"),
        (lambda: nn.InstanceNorm1d(5, track_running_stats=True), None, "also with running statistics"),
        (lambda: BatchLayerNorm(3, device="meta"), "pppp", "no population is frozen"),
        (lambda: nn.BatchNorm1d(5, device="meta"), None, "its tensors are on the meta device"),
    ],
)
def test_the_report_says_why_a_norm_stays(layer, mode, reason) -> None:
    model = nn.Sequential(layer())
    if mode is not None and not any(one.is_meta for one in model.parameters()):
        populated(model, (5, 3), mode)
    elif mode is not None:
        set_mode(model, mode)
    plain, report = fold(model, report=True)
    assert type(plain[0]) is type(model[0])
    assert reason in str(report)
    assert "left alone" in str(report)


def test_an_empty_population_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4))
    set_mode(model, "pppp")
    assert "no population is frozen; call recompute_population before" in str(fold(model, report=True)[1])


def test_axes_that_differ_leave_an_affine_map() -> None:
    model = populated(nn.Sequential(nn.Linear(3, 4), Normalization(6, channel_dim=1, positions="shared")), (6, 3))
    plain, report = fold(model, report=True)
    assert "its feature axis is not that of the Linear beside it" in str(report)
    x = torch.randn(2, 6, 3)
    assert_equal(plain(x), model(x), torch.float32)
    _, report = fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), report=True)
    assert "whether its feature axis is that of the Linear beside it depends on the input" in str(report)
    _, report = fold(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm2d(4)), report=True)
    assert "its feature axis is not that of the Linear beside it" in str(report)


def test_models_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match="1 is a LazyBatchNorm1d that has seen no input yet; run a batch"):
        fold(nn.Sequential(nn.ReLU(), nn.LazyBatchNorm1d()))


def test_an_outdated_population_is_named() -> None:
    model = populated(nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4)), (3,))
    model.train()(torch.randn(4, 3)).sum().backward()
    assert "its population is older than its weights" in str(fold(model, report=True)[1])


def test_sequences_of_any_length_after_one_position() -> None:
    model = populated(nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4)), (1, 3))
    x = torch.randn(2, 7, 3)
    assert_equal(fold(model)(x), model(x), torch.float32)


@pytest.mark.parametrize("way", ["script", "trace", "export"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_affine_maps_script_trace_and_export(way, channel_dim) -> None:
    layer, x = Affine(torch.randn(4), torch.randn(4), channel_dim), torch.randn(2, 4, 4)
    made: Any
    if way == "script":
        made = torch.jit.script(layer)
    elif way == "trace":
        made = torch.jit.trace(layer, (x,))
    else:
        made = torch.export.export(layer, (x,)).module()
    assert torch.equal(made(x), layer(x))


@pytest.mark.parametrize("order", list(itertools.permutations(["conv", "bln", "batch"])))
def test_norms_behind_one_another_go_into_one_layer(order) -> None:
    made = {"conv": nn.Conv1d(3, 3, 2), "batch": nn.BatchNorm1d(3)}
    made["bln"] = BatchLayerNorm(3, channel_dim=1, positions="shared")
    model = populated(nn.Sequential(*(made[name] for name in order)).double(), (3, 8))
    assert_folds(model, (3, 8), affine=int(order[-1] == "conv"))


def test_requires_grad_and_memory_format_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    plain: Any = fold(model)
    assert not plain[0].weight.requires_grad
    assert plain[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_pickle_of_a_folded_model_does_not_name_the_library() -> None:
    block = ConvBLN2d(3, 4, 3, positions="shared", order="conv-norm-act", activation=F.relu)
    recurrent = BLNGRU(3, 4, norm=None)
    for model in (populated(block, (3, 6, 6)), recurrent.eval(), populated(ResNet(), (3, 9, 9)).stem):
        assert b"lightning_bln" not in pickle.dumps(fold(model))


def test_moments_are_no_part_of_a_folded_model() -> None:
    model = populated(nn.Sequential(nn.Linear(3, 4), BatchLayerNorm(4)), (3,))
    assert not [key for key in fold(model).state_dict() if any(name in key for name in Moments._fields)]
