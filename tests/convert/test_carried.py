"""Everything that a converted layer takes over from the original besides its settings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lightning_bln
from lightning_bln import from_torch, to_bln

RECURRENT: dict[str, Callable[..., nn.Module]] = {
    "LSTM": lambda **to: nn.LSTM(3, 4, 2, bidirectional=True, **to),
    "GRU": lambda **to: nn.GRU(3, 4, bias=False, **to),
    "RNN": lambda **to: nn.RNN(3, 4, nonlinearity="relu", **to),
    "LSTMCell": lambda **to: nn.LSTMCell(3, 4, **to),
    "GRUCell": lambda **to: nn.GRUCell(3, 4, bias=False, **to),
    "RNNCell": lambda **to: nn.RNNCell(3, 4, nonlinearity="relu", **to),
}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "BatchNorm1d": lambda **to: nn.BatchNorm1d(3, **to),
    "BatchNorm2d": lambda **to: nn.BatchNorm2d(3, **to),
    "BatchNorm3d": lambda **to: nn.BatchNorm3d(3, **to),
    "SyncBatchNorm": lambda **to: nn.SyncBatchNorm(3, **to),
    "LayerNorm": lambda **to: nn.LayerNorm(3, **to),
    "LayerNorm without bias": lambda **to: nn.LayerNorm(3, bias=False, **to),
    "BatchNorm1d without weights": lambda **to: nn.BatchNorm1d(3, affine=False, **to),
}
LAYERS = RECURRENT | NORMS


def within(layer: nn.Module, **options: Any) -> nn.Module:
    """``layer`` converted as a part of a model."""
    return to_bln(nn.Sequential(nn.Identity(), layer), **options)[1]


WAYS = [(name, within) for name in LAYERS] + [(name, from_torch) for name in RECURRENT]
every_layer = pytest.mark.parametrize(("name", "convert"), WAYS)


def sample(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    axes = 2 if isinstance(layer, (nn.RNNCellBase, nn.LayerNorm, nn.BatchNorm1d, nn.SyncBatchNorm)) else 3
    axes = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}.get(type(layer), axes)
    shape = (5, 3, *(2,) * (axes - 2)) if isinstance(layer, tuple(map(type, norms()))) else (5, *(2,) * (axes - 2), 3)
    return torch.randn(shape, dtype=dtype)


def norms() -> list[nn.Module]:
    return [make() for name, make in NORMS.items() if not name.startswith("Layer")]


@every_layer
def test_requires_grad_and_values_are_kept(name, convert) -> None:
    layer = LAYERS[name]()
    for index, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter)
        parameter.requires_grad = index % 2 == 1
    converted = dict(convert(layer).named_parameters())
    for key, parameter in layer.named_parameters():
        assert torch.equal(converted[key], parameter)
        assert converted[key].requires_grad == parameter.requires_grad
        assert (converted[key] is parameter) == (convert is within), "an optimizer of the model's holds the parameters"


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [True, False])
def test_device_dtype_and_training_flag_are_kept(name, convert, dtype, device, training) -> None:
    converted = convert(LAYERS[name](dtype=dtype, device=device).train(training))
    found = [*converted.parameters(), *(one for one in converted.buffers() if one.is_floating_point())]
    assert {one.dtype for one in found} == {dtype}
    assert {one.device.type for one in found} == {device}
    assert {module.training for module in converted.modules()} == {training}


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(3, elementwise_affine=False),
        nn.BatchNorm1d(3, affine=False, track_running_stats=False),
        nn.BatchNorm1d(3, affine=False),
    ],
)
def test_a_layer_without_tensors_lies_where_the_model_lies(layer) -> None:
    model = to_bln(nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer)).double())
    assert model(torch.randn(4, 3).double()).dtype == torch.float64
    assert model[1][0].population.mean.dtype == torch.float64


def needs_public_hooks() -> None:
    if not hasattr(nn.Module, "register_load_state_dict_pre_hook"):
        pytest.skip("this torch has no public name for hooks on state dicts")


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda module, note: module.register_forward_hook(lambda *_: note()),
    "forward with kwargs": lambda module, note: module.register_forward_hook(lambda *_: note(), with_kwargs=True),
    "forward, always": lambda module, note: module.register_forward_hook(lambda *_: note(), always_call=True),
    "before forward": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
    "before forward with kwargs": lambda module, note: module.register_forward_pre_hook(
        lambda *_: note(), with_kwargs=True
    ),
    "backward": lambda module, note: module.register_full_backward_hook(lambda *_: note()),
    "before backward": lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
    "state dict": lambda module, note: module.register_state_dict_post_hook(lambda *_: note()),
    "before state dict": lambda module, note: module.register_state_dict_pre_hook(lambda *_: note()),
    "before loading": lambda module, note: module.register_load_state_dict_pre_hook(lambda *_: note()),
    "after loading": lambda module, note: module.register_load_state_dict_post_hook(lambda *_: note()),
}


@pytest.mark.parametrize(("name", "convert"), [way for way in WAYS if way[0] != "SyncBatchNorm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_run_and_their_handles_remove_them(name, convert, kind) -> None:
    if "load" in kind or "state dict" in kind:
        needs_public_hooks()
    layer, calls = LAYERS[name](), []
    handle = HOOKS[kind](layer, lambda: calls.append(1))
    x = sample(layer).requires_grad_()
    converted = convert(layer)
    own = len(calls)

    def run() -> int:
        before = len(calls)
        output = converted(x)
        while isinstance(output, tuple):
            output = output[0]
        output.sum().backward()
        converted.load_state_dict(converted.state_dict())
        return len(calls) - before

    assert own == 0
    assert run() == 1
    if convert is within:
        handle.remove()
        assert run() == 0


@every_layer
def test_hooks_get_the_layer_that_runs(name, convert) -> None:
    needs_public_hooks()
    layer, seen = LAYERS[name](), []
    layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    converted = convert(layer)
    del layer
    converted.load_state_dict(converted.state_dict())
    assert seen == [converted]


class Double(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return 2 * value


def old(function: Callable[..., nn.Module]) -> Callable[[nn.Module, str], nn.Module]:
    def apply(layer: nn.Module, name: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(layer, name)

    return apply


REPARAMETRIZED: dict[str, Callable[[nn.Module, str], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer, name: parametrize.register_parametrization(layer, name, Double()),
    "two": lambda layer, name: [parametrize.register_parametrization(layer, name, Double()) for _ in range(2)],
    "older weight_norm": old(nn.utils.weight_norm),
    "older spectral_norm": old(nn.utils.spectral_norm),
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.5),
    "pruned twice": lambda layer, name: [prune.random_unstructured(layer, name, amount=0.3) for _ in range(2)],
}


@pytest.mark.parametrize("convert", [within, from_torch])
@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_parametrizations_stay_and_learn(name, kind, convert) -> None:
    layer = RECURRENT[name]()
    weight = next(key for key, _ in layer.named_parameters() if "weight_hh" in key)
    REPARAMETRIZED[kind](layer, weight)
    layer.eval()  # spectral_norm goes on with its iteration whenever it is read in training
    before, keys = getattr(layer, weight).detach().clone(), {key for key, _ in layer.named_parameters()}
    shape = {key: value.clone() for key, value in layer.state_dict().items()}
    converted = convert(layer, norm="layer")
    assert torch.allclose(getattr(converted, weight), before)
    assert keys <= {key for key, _ in converted.named_parameters()}
    for key, value in shape.items():
        assert torch.equal(converted.state_dict()[key], value)
    converted.train()
    output = converted(sample(layer))
    while isinstance(output, tuple):
        output = output[0]
    output.sum().backward()
    grads = [value.grad for key, value in converted.named_parameters() if key in keys and weight in key]
    assert grads
    assert all(grad is not None for grad in grads)
    if convert is from_torch:
        assert all(value.grad is None for value in layer.parameters())


@pytest.mark.parametrize("kind", ["weight_norm", "own", "pruned"])
@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm"])
def test_parametrized_norms_compute_the_same(name, kind) -> None:
    layer = NORMS[name]()
    nn.init.normal_(layer.weight)
    REPARAMETRIZED["own" if kind == "weight_norm" else kind](layer, "weight")
    x = torch.randn(6, 3)
    converted = within(layer, norm="batch" if name.startswith("Batch") else "layer")
    torch.testing.assert_close(converted(x), layer(x))


@pytest.mark.parametrize("kind", ["weight_norm", "own", "pruned"])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_converted_layer_with_parametrizations_copies_and_computes_the_same(name, kind) -> None:
    layer = RECURRENT[name]()
    weight = next(key for key, _ in layer.named_parameters() if "weight_hh" in key)
    REPARAMETRIZED[kind](layer, weight)
    converted = from_torch(layer, norm=None)
    x = sample(layer)
    if kind != "own" or "Cell" in name:  # torch's own layers go on with the weights they had before
        torch.testing.assert_close(converted(x), layer(x))
    if kind != "pruned":  # the masked weight is no leaf, which torch itself does not copy
        torch.testing.assert_close(deepcopy(converted)(x), converted(x))


@every_layer
def test_what_the_user_has_added_is_kept_or_named(name, convert) -> None:
    layer: Any = LAYERS[name]()
    layer.tag, layer.gain, layer.part = "mine", nn.Parameter(torch.ones(2)), nn.Linear(1, 1)
    layer.register_buffer("seen", torch.ones(1))
    layer.register_buffer("scratch", torch.ones(1), persistent=False)
    converted = convert(layer)
    assert converted.tag == "mine"
    assert torch.equal(converted.gain, layer.gain)
    assert isinstance(converted.part, nn.Linear)
    assert "seen" in converted.state_dict()
    assert "scratch" not in converted.state_dict()
    assert torch.equal(converted.scratch, layer.scratch)
    layer.fan_in = layer.cell = layer._norm_options = layer._mode = 1
    _, report = to_bln(layer, report=True)
    (entry,) = report.entries
    taken = "cell" if name in RECURRENT else "_mode"
    assert f"attribute {taken!r}, since its counterpart has another of that name" in entry.lost


def test_the_package_converts_what_it_says() -> None:
    assert {kind.__name__ for kind in lightning_bln.convert.layers.CONVERTIBLE} == {
        type(make()).__name__ for make in LAYERS.values()
    }
