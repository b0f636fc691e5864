"""Tensors of every kind on their way to the compiled kernels: read as torch reads them, or refused before they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    Recurrent,
    batch_layer_norm,
    freeze_population,
)
from lightning_bln.kernels.library import CELLS
from lightning_bln.kernels.recurrent import RECURRENCE, Constants, Inputs, Settings
from tests.kernels.helpers import built, flat

pytestmark = built

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "bln": lambda **options: BatchLayerNorm(4, **options),
    "lstm": lambda **options: BLNLSTM(4, 5, **options),
    "gru": lambda **options: BLNGRU(4, 5, **options),
    "rnn": lambda **options: BLNRNN(4, 5, **options),
    "lstm without norm": lambda **options: BLNLSTM(4, 5, norm=None, **options),
    "recorded": lambda **options: Recurrent("mgu", 4, 5, norm=None, **options),
    "step by step": lambda **options: Recurrent("mgu", 4, 5, **options),
    "scan": lambda **options: Recurrent("mingru", 4, 5, norm=None, **options),
    "projected": lambda **options: BLNLSTM(4, 5, proj_size=2, **options),
}
x = torch.arange(24.0).reshape(3, 2, 4).sin()
each_layer = pytest.mark.parametrize("name", LAYERS)


def output_of(layer: nn.Module, x: Tensor, *states: Any) -> Tensor:
    return flat(layer(x, *states))[0]


def gradients(y: Tensor, layer: nn.Module, grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, list(layer.parameters()), grad, retain_graph=True))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False)


@each_layer
def test_parameters_and_input_on_two_devices_are_refused(name) -> None:
    with pytest.raises(RuntimeError, match=r"x is on cpu, but .* meta"):
        LAYERS[name](device="meta")(x)
    with pytest.raises(RuntimeError, match=r"x is on meta, but .* cpu"):
        LAYERS[name]()(x.to("meta"))


@each_layer
def test_without_memory_a_layer_gives_shapes(name) -> None:
    assert output_of(LAYERS[name](device="meta"), x.to("meta")).shape == output_of(LAYERS[name](), x).shape


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "bln"])
@pytest.mark.parametrize(("value", "error"), [(torch.zeros(1, 2, 5, device="meta"), RuntimeError)], ids=["meta"])
def test_first_states_elsewhere_are_refused(name, value, error) -> None:
    layer = LAYERS[name]()
    states = tuple(value for _ in layer.cell.states)  # type: ignore[union-attr]
    if name == "projected":
        states = (torch.zeros(1, 2, 2, device="meta"), value)
    with pytest.raises(error, match="hx: h is on meta"):
        layer(x, states[0] if len(states) == 1 else states)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int64, torch.bool], ids=str)
def test_first_states_of_another_dtype_are_refused(dtype) -> None:
    with pytest.raises(TypeError, match="hx: h has dtype"):
        BLNGRU(4, 5)(x, torch.zeros(1, 2, 5, dtype=dtype))


@pytest.mark.parametrize("parameter", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "recorded", "step by step", "projected"])
def test_a_parameter_of_another_dtype_shape_or_device_is_refused_by_name(name, parameter) -> None:
    for change, error in (
        (lambda p: p.double(), TypeError),
        (lambda p: p[:-1], ValueError),
        (lambda p: p[None], ValueError),
        (lambda p: p.to("meta"), RuntimeError),
    ):
        layer = LAYERS[name]()
        setattr(layer, parameter, nn.Parameter(change(getattr(layer, parameter).detach())))
        before = {key: value.clone() for key, value in layer.named_buffers()}
        with pytest.raises(error, match=f"weight_ih|{parameter}|the layer's parameters"):
            layer(x)
        assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_affine_parameter_of_another_size_is_refused(name) -> None:
    layer = BatchLayerNorm(64)
    setattr(layer, name, nn.Parameter(torch.ones(8)))
    with pytest.raises(ValueError, match=rf"{name} has shape \(8,\), but num_features=64"):
        layer(torch.randn(3, 64))
    recurrent = BLNLSTM(4, 5)
    setattr(recurrent.norm_cell_l0, name, nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        recurrent(x)


def test_a_bias_of_another_dtype_is_converted() -> None:
    layer = BatchLayerNorm(4)
    layer.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    assert torch.equal(layer(torch.zeros(2, 4)), torch.ones(2, 4))


def test_parameters_with_strides_are_read_by_them() -> None:
    layer = BatchLayerNorm(4)
    layer.weight = nn.Parameter(torch.arange(8.0)[::2])
    expected = batch_layer_norm(x, layer.weight, layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    assert_same(gradients(found, layer, x), gradients(expected, layer, x))
    recurrent, plain = BLNLSTM(4, 5), BLNLSTM(4, 5)
    plain.load_state_dict(recurrent.state_dict())
    for name, parameter in list(recurrent.named_parameters(recurse=False)):
        wide = torch.stack([parameter.detach()] * 2, -1)
        setattr(recurrent, name, nn.Parameter(wide[..., 0]))
    torch.testing.assert_close(recurrent(x)[0], plain(x)[0])


@pytest.mark.parametrize("buffer", ["count", "mean", "m2", "batch_mean", "batch_var", "feature_mean", "batch_size"])
@pytest.mark.parametrize("name", ["bln", "lstm", "step by step"])
def test_a_state_dict_whose_buffers_disagree_is_refused_on_loading(name, buffer) -> None:
    layer = LAYERS[name]()
    layer(x)
    freeze_population(layer)
    state = layer.state_dict()
    key = next(key for key in state if key.endswith(buffer))
    state[key] = state[key][:1]
    with pytest.raises(ValueError, match="different positions"):
        LAYERS[name]().load_state_dict(state)


@pytest.mark.parametrize("buffer", ["batch_mean", "batch_var"])
def test_a_buffer_that_was_cut_is_refused_where_it_is_read(buffer) -> None:
    layer = BLNLSTM(4, 5)
    layer(x)
    freeze_population(layer.eval())
    setattr(layer.norm_ih_l0.population, buffer, torch.zeros(1, 4, 5))
    layer.mode = "pppp"
    with pytest.raises(ValueError, match="shape"):
        layer(x)


UNPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda value: value.double() if value.is_floating_point() else value,
    "transposed": lambda value: value.mT.contiguous().mT if value.ndim > 1 else value,
    "strided": lambda value: torch.stack([value, value], -1)[..., 0],
    "negated": lambda value: torch._neg_view(-value) if value.is_floating_point() else value,
}


@each_layer
@pytest.mark.parametrize("kind", UNPACKED)
def test_saved_tensors_that_come_back_in_another_layout_or_dtype(name, kind) -> None:
    layer = LAYERS[name](dtype=torch.float32)
    with saved_tensors_hooks(lambda value: value, UNPACKED[kind]):
        y = output_of(layer, x)
    if kind == "wide" and name in ("step by step", "scan", "projected"):
        return  # torch's own operations refuse those
    grad = torch.ones_like(y)
    assert_same(gradients(y, layer, grad), gradients(output_of(layer, x), layer, grad))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda y: torch._efficientzerotensor(y.shape),
    "negated": lambda y: torch._neg_view(torch.arange(y.numel()).sin().view(y.shape)),
    "expanded": lambda y: torch.tensor(0.7).expand(y.shape),
    "transposed": lambda y: torch.arange(y.numel()).cos().view(y.shape[::-1]).permute(2, 1, 0),
}


@each_layer
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_layout_come_in(name, kind) -> None:
    layer = LAYERS[name]()
    y = output_of(layer, x)
    grad = GRADIENTS[kind](y)
    plain = torch.zeros(y.shape) if kind == "zero" else grad.clone().contiguous()
    assert_same(gradients(y, layer, grad), gradients(y, layer, plain))


@each_layer
def test_new_tensors_lie_where_the_layer_does(name) -> None:
    layer = LAYERS[name]()
    expected = output_of(layer, x)
    with torch.device("meta"):
        found = output_of(layer, x)
    torch.testing.assert_close(found, expected)


def test_gradients_of_both_biases_are_two() -> None:
    layer = BLNLSTM(4, 5)
    one, other = torch.autograd.grad(layer(x)[0].sum(), [layer.bias_ih_l0, layer.bias_hh_l0])
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    "sizes", [[2, 3, 1], [3, 4, -1], [3, 3, 2], [0, 3, 3], [3, 2, 0], [2, 2, 2]], ids=lambda sizes: str(sizes)
)
def test_running_sequences_that_contradict_the_rows_never_reach_memory(sizes) -> None:
    layer = BLNGRU(4, 5)
    state, rows = torch.zeros(3, 5), torch.zeros(7, 4)
    inputs = Inputs(rows, layer.weight_ih_l0, layer.weight_hh_l0, None, None, state, None, None, None, None, None)
    constants = Constants(torch.tensor(sizes), *[None] * 6)
    settings = Settings(CELLS.index("gru"), 3, 0, 0, 0, 0, 0, 0.0, 1.0, 1.0, 1.0, 1e-3)
    with pytest.raises(ValueError, match="batch_sizes does not fit"):
        RECURRENCE.forward(inputs, constants, settings)
    assert RECURRENCE.forward(inputs, constants._replace(batch_sizes=torch.tensor([3, 3, 1])), settings)


@each_layer
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_pass_repeated_for_the_gradient_gathers_nothing(name, use_reentrant) -> None:
    layer, twin = LAYERS[name](), LAYERS[name]()
    twin.load_state_dict(layer.state_dict())
    data = x.clone().requires_grad_()
    checkpoint(lambda data: output_of(layer, data), data, use_reentrant=use_reentrant).square().sum().backward()
    output_of(twin, x).square().sum().backward()
    for (key, value), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(value, other), key
    assert_same([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])
