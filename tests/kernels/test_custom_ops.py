"""The registered operators under torch.compile and torch.export."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_bln import BLNGRU, BLNLSTM, Normalization, set_mode
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels import recurrent
from tests.kernels.helpers import built

pytestmark = built
operators_exist = pytest.mark.skipif(
    not HAS_CUSTOM_OPS, reason="torch 2.3 has no torch.library.custom_op, so there are no operators to compile to"
)


@operators_exist
@pytest.mark.parametrize("norm", ["bln", None])
def test_compiles_to_one_operator_a_direction(norm) -> None:
    layer = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(sum("lightning_bln.recurrence" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compile(layer, fullgraph=True, backend=count)(torch.randn(4, 6, 3))
    assert counted == [2]


@pytest.mark.parametrize("norm", ["bln", None])
def test_compiled_layers_have_the_same_gradients(norm) -> None:
    layer = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    twin = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, 3)
    torch.compiler.reset()
    # without operators the graph breaks at the kernels
    for one in (torch.compile(layer, fullgraph=HAS_CUSTOM_OPS, backend="aot_eager"), twin):
        one(x)[0].square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@operators_exist
def test_exports_with_one_operator_a_direction() -> None:
    layer = BLNGRU(3, 5, norm="layer", bidirectional=True, backend="cpu").eval()
    set_mode(layer, "cccc")
    x = torch.randn(4, 6, 3)
    exported = torch.export.export(layer, (x,))
    assert sum("lightning_bln.recurrence" in str(node.target) for node in exported.graph.nodes) == 2
    torch.testing.assert_close(exported.module()(x)[0], layer(x)[0])


@operators_exist
def test_the_layer_compiles_to_one_operator() -> None:
    layer, x = Normalization(5), torch.randn(4, 3, 5, requires_grad=True)
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(sum("lightning_bln.dense" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compile(layer, fullgraph=True, backend=count)(x)
    assert counted == [1]


@operators_exist
def test_operators_keep_torchs_rules() -> None:
    from lightning_bln.kernels import custom_ops as operators

    layer = BLNLSTM(3, 5, norm="bln", backend="cpu", dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(4, 5, dtype=torch.float64)
    tensors = (x, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0, h, h.clone())
    weights = (layer.norm_ih_l0.weight, layer.norm_hh_l0.weight, layer.norm_cell_l0.weight, layer.norm_cell_l0.bias)
    mixing = torch.tensor([0.2, 0.8], dtype=torch.float64).view(1, 2, 1).repeat(3, 1, 2)
    constants = (None, None, None, mixing, None, None, None)
    settings = recurrent.Settings(0, 2, 1, 0, 0, 0, 0, 0.0, 1.0, 1.0, 1.0, 1e-3)
    integers, numbers = list(settings[: recurrent.INTEGERS]), list(settings[recurrent.INTEGERS :])
    torch.library.opcheck(operators.recurrence, (*tensors, *weights, *constants, integers, numbers))


@operators_exist
@pytest.mark.parametrize("affine", [True, False])
def test_the_layers_operator_keeps_torchs_rules(affine) -> None:
    from lightning_bln.kernels import custom_ops as operators

    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2))
    mixing = torch.tensor([[0.2, 0.2], [0.8, 0.8]], dtype=torch.float64)
    torch.library.opcheck(operators.dense, (x, weight, bias, mixing, None, [1, 0], [1.0, 1e-3]))
