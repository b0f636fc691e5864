"""Operators under transforms and tracers, and what keeps or changes their tensors between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_bln import BLNLSTM, BatchLayerNorm, Population, Recurrent, freeze_population, set_mode
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.modes import FanOut, mode_layers
from tests.kernels.helpers import built, flat

pytestmark = [built, pytest.mark.filterwarnings("ignore:.*(jit|deprecated)")]

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "array": lambda **options: BatchLayerNorm(4, **options),
    "fused": lambda **options: BLNLSTM(4, 5, **options),
    "recorded": lambda **options: Recurrent("mgu", 4, 5, norm=None, **options),
    "step by step": lambda **options: Recurrent("mgu", 4, 5, **options),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
x = torch.arange(24.0).reshape(3, 2, 4).sin()


def first(value: Any) -> Tensor:
    return flat(value)[0]


def frozen(layer: nn.Module, mode: str = "pppp") -> nn.Module:
    layer(x)
    if list(mode_layers(layer)):
        freeze_population(layer)
        set_mode(layer, mode)
    return layer.eval()


@pytest.mark.exact
@pytest.mark.skipif(not HAS_CUSTOM_OPS, reason="torch 2.3 breaks the graph at the kernels")
@each_layer
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_within_what_is_compiled(name, transform) -> None:
    layer = frozen(LAYERS[name]())
    run: Callable[[Tensor], Tensor] = {
        "jvp": lambda x: torch.func.jvp(lambda x: first(layer(x)), (x,), (x,))[1],
        "grad": lambda x: torch.func.grad(lambda x: first(layer(x)).square().sum())(x),
        "vmap": lambda x: torch.vmap(lambda x: first(layer(x)))(torch.stack([x, 2 * x])),
    }[transform]
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("name", ["array", "fused"])
def test_a_population_written_to_after_the_forward_pass_changes_no_gradient(name) -> None:
    layer, data = frozen(LAYERS[name]()), x.clone().requires_grad_()
    loss = first(layer(data)).square().sum()
    (expected,) = torch.autograd.grad(loss, data, retain_graph=True)
    for module in layer.modules():
        if isinstance(module, Population):
            module.batch_mean.mul_(3).add_(1)
    (found,) = torch.autograd.grad(loss, data, create_graph=True)
    torch.testing.assert_close(found, expected)


@each_layer
def test_the_input_is_freed_by_the_backward_pass(name) -> None:
    layer, data = LAYERS[name](), x.clone().requires_grad_() * 2
    kept = weakref.ref(data)
    loss = first(layer(data)).sum()
    loss.backward()
    del data
    assert kept() is None


@each_layer
def test_no_gradient_at_all_is_none(name) -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            return None

    layer = LAYERS[name]()
    parameter = next(layer.parameters())
    loss = Stop.apply(first(layer(x))).sum() + 0 * parameter.sum()
    (found,) = torch.autograd.grad(loss, parameter, create_graph=True)
    assert not found.any()


@each_layer
def test_parameters_may_be_buffers(name) -> None:
    layer = LAYERS[name]()
    expected = first(layer(x))
    for module in layer.modules():
        for key, value in list(module._parameters.items()):
            if value is not None:
                delattr(module, key)
                module.register_buffer(key, value.detach())
    torch.testing.assert_close(first(layer(x)), expected.detach())


@each_layer
def test_memory_that_was_given_back_is_refused(name) -> None:
    layer = LAYERS[name]()
    key = "weight" if name == "array" else "weight_hh_l0"
    getattr(layer, key).untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError)):
        layer(x)


@each_layer
def test_statistics_of_fake_tensors_and_subclasses_leave_plain_buffers(name) -> None:
    class Named(Tensor):
        pass

    layer = LAYERS[name]()
    layer(x)
    before = [value.clone() for value in layer.buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(3, 2, 4))
    for value, other in zip(layer.buffers(), before, strict=True):
        assert torch.equal(value, other)
    layer(x.as_subclass(Named))
    assert {type(value) for value in layer.buffers()} <= {Tensor}


@each_layer
@pytest.mark.parametrize("train", [True, False])
def test_traced_by_torch_jit_with_its_own_checks(name, train) -> None:
    layer = LAYERS[name]()
    layer = layer.train() if train else frozen(layer)
    traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(first(traced(x)), first(layer(x)))


@pytest.mark.parametrize("name", ["array", "fused"])
def test_negated_views_in_a_fan_out(name) -> None:
    layer, results = frozen(LAYERS[name]()), []
    for backend in ("cpu", "reference"):
        fan = FanOut(["pppp", "cccc", "ppcc"])
        for module in layer.modules():
            if hasattr(module, "fan"):
                module.fan = fan
        layer.backend = backend
        with torch.no_grad():
            results.append(first(layer(torch._neg_view(x))))
    torch.testing.assert_close(*results)


def test_a_parameter_that_does_not_fit_leaves_every_population_as_it_was() -> None:
    layer = BLNLSTM(4, 5, num_layers=2)
    layer.weight_hh_l1 = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="weight_hh_l1"):
        layer(x)
    assert not any(value.numel() for key, value in layer.named_buffers() if key.endswith("count"))


@pytest.mark.parametrize("name", ["fused", "recorded", "step by step"])
def test_gradients_under_autocast_are_those_of_the_forward_pass(name) -> None:
    layer = LAYERS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        loss = first(layer(x)).float().square().sum()
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        second = torch.autograd.grad(loss, parameters, create_graph=True)
    for value, same, near in zip(expected, again, second, strict=True):
        assert torch.equal(value, same)
        assert (value - near).abs().max() <= 1e-2 * value.abs().max().clamp(min=1)
