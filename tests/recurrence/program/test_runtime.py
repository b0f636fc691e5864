"""Steps of any cell, recorded and run by the C++ library, against the same steps on torch operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, add, addcmul, lerp, relu, sigmoid, tanh
from torch.nn import functional as F

from lightning_bln import Recurrent
from lightning_bln.cells import Cell, Extra, LinearCell, registry
from lightning_bln.kernels import library
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.program.recording import record
from lightning_bln.recurrence.program.runtime import recorded_recurrence

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the C++ kernels are not built")

STEPWISE = [
    name for name in registry if not issubclass(registry[name], LinearCell) and name_of(registry[name]()) is None
]
RECORDED = STEPWISE


class Everything(Cell):
    """Each instruction, products taken twice, in part and not at all, and states that change places."""

    gates = ("a", "b", "unused", "c")
    states = ("h", "c", "d", "e")
    products = (("a", "b"), ("idle",), ("c", "once"))
    parameters = {"vector": Extra(), "number": Extra((1,)), "matrix": Extra(("hidden_size", "hidden_size"))}
    vector: Tensor
    number: Tensor
    matrix: Tensor

    def step(self, x: Any, state: Any, project: Any) -> Any:
        p, q = project(state.h), project(tanh(state.c))
        u = sigmoid(x.a + p.a) / (2.0 + relu(x.b + q.b) + self.number)
        v = F.softplus(-q.a) - F.hardsigmoid(p.b * self.vector) / 2 + 0.5
        w = addcmul(u, v, state.d, value=-0.3) + F.linear(u * v, self.matrix).to(u.dtype)
        z = lerp(w, state.e[..., : w.shape[-1]], 0.25) - add(v, u, alpha=0.5)
        s = tanh(project.c(z).c + x.c + z + 1)
        return self.State(h=lerp(s, state.h, sigmoid(w)), c=s * (1 - u), d=state.e, e=state.d)


class Stateless(Cell):
    """An output that does not recur, and gates that share one gradient."""

    gates = ("a", "b")
    states = ("h", "c")

    def step(self, x: Any, state: Any, project: Any) -> Any:
        a = x + project(state.c)
        return self.State(h=a.a + a.b, c=tanh(a.a + a.b))


class Unrecordable(Cell):
    """A step with an operation that has no instruction."""

    gates = ("hidden",)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        h = torch.sin((x + project(state.h)).hidden)
        return self.State(h=h * 2 if h.sum() > 0 else h)


def pair(cell: Any, size: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Recurrent, Recurrent]:
    """A layer and its reference, with parameters away from where they start."""
    fast = Recurrent(cell, 3, size, norm=None, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain = Recurrent(cell, 3, size, norm=None, dtype=dtype, backend="reference", **options)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def everything_of(layer: Recurrent, x: Tensor) -> list[Tensor]:
    """Outputs, states and all gradients; zero where there is none."""
    x = x.detach().requires_grad_()
    output, states = layer(x)
    tensors = [output, *([states] if isinstance(states, Tensor) else states)]
    loss = sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return tensors + [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]


def is_recorded(layer: Recurrent) -> bool:
    """Whether a layer's recurrence is one call of the C++ library."""
    found = []

    def spy(*args: Any) -> Any:
        found.append(recorded_recurrence(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_bln.recurrence.backends.recorded_recurrence", spy)
        layer(torch.randn(3, 2, 3, dtype=next(layer.parameters()).dtype))
    return all(result is not None for result in found) and bool(found)


@pytest.mark.parametrize("kind", STEPWISE)
def test_cells_of_the_zoo_are_recorded(kind) -> None:
    assert is_recorded(Recurrent(kind, 3, 4, norm=None)) == (kind in RECORDED)


@pytest.mark.parametrize("cell", [Everything, Stateless])
@pytest.mark.parametrize("samples", [1, 5])
def test_every_instruction_is_torchs_operation(cell, samples) -> None:
    fast, plain = pair(cell, num_layers=2)
    assert is_recorded(fast)
    assert fast.backend_reason is None
    x = torch.randn(6, samples, 3, dtype=torch.float64)
    for ours, theirs in zip(everything_of(fast, x), everything_of(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)  # torch's hardsigmoid has 1/6 as a float


def test_a_step_beyond_the_instructions_runs_on_torch_operations_and_says_why() -> None:
    fast, plain = pair(Unrecordable)
    assert not is_recorded(fast)
    assert fast.backend_reason == "NotRecordable: sin has no instruction"
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    for ours, theirs in zip(everything_of(fast, x), everything_of(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize(("size", "samples"), [(37, 19), (128, 8), (1, 1)])
def test_any_size_in_single_precision(kind, size, samples) -> None:
    fast, plain = pair(kind, size, torch.float32)
    x = torch.randn(7, samples, 3)
    for ours, theirs in zip(everything_of(fast, x), everything_of(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("kind", ["nas", "peepholelstm"])
def test_threads_share_the_sequences_and_change_nothing(kind) -> None:
    layer, x = Recurrent(kind, 3, 32, norm=None), torch.randn(5, 33, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(everything_of(layer, x))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(one, many)


@pytest.mark.parametrize("kind", ["minimalrnn", "taugru", "multiplicativelstm", "br"])
def test_gradients_have_gradients(kind) -> None:
    results = []
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    for layer in pair(kind):
        parameters = list(layer.parameters())
        first = torch.autograd.grad(layer(x)[0].square().sum(), parameters, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), parameters)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_kept_gives_the_same_gradient_twice() -> None:
    layer = Recurrent("lem", 3, 4, norm=None)
    loss = layer(torch.randn(5, 2, 3))[0].sum()
    twice = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for _ in range(2)]
    for one, other in zip(*twice, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_output_may_be_overwritten() -> None:
    results = []
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for layer in pair("mgu"):
        results.append(torch.autograd.grad(layer(x)[0].relu_().square().sum(), list(layer.parameters())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("train", [True, False])
def test_the_last_state_alone_has_a_gradient(train) -> None:
    results = []
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for layer in pair("originallstm"):
        _, (_, c) = layer.train(train)(x)
        results.append(torch.autograd.grad(c.sum(), [layer.weight_ih_l0, layer.weight_hh_l0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inference_is_training_without_its_tape() -> None:
    layer, x = Recurrent("wmclstm", 3, 4, norm=None), torch.randn(5, 2, 3)
    with torch.inference_mode():
        output, _ = layer(x)
    torch.testing.assert_close(output, layer(x)[0], rtol=0, atol=0)


def test_an_option_that_changes_is_recorded_anew() -> None:
    layer, x = Recurrent("lem", 3, 4, norm=None), torch.randn(5, 2, 3)
    before = layer(x)[0]
    layer.cell.dt = 0.25  # type: ignore[attr-defined]
    after = layer(x)[0]
    layer.backend = "reference"
    torch.testing.assert_close(after, layer(x)[0])
    assert not torch.allclose(before, after)
    assert record.cache_info().maxsize is not None
