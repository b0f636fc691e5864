"""Steps that mean something else than they seem to: recorded with torch's meaning, or run on torch operations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, exp, maximum, sigmoid, tanh, where
from torch.nn import functional as F

from lightning_bln import Recurrent
from lightning_bln.cells import Cell, Extra
from lightning_bln.kernels import library

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the C++ kernels are not built")


class Cube(torch.autograd.Function):
    """A function whose gradient is no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def without_gradients(s: Any, x: Any, h: Any, p: Any) -> Any:
    with torch.no_grad():
        k = sigmoid(x.a)
    return k * tanh(x.a + p(h).a)


def under_autocast(s: Any, x: Any, h: Any, p: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        k = tanh(x.a + p(h).a)
    return tanh(k + x.b)


def aliased(s: Any, x: Any, h: Any, p: Any) -> Any:
    v = x.a + p(h).a
    u = v
    u *= 2
    return tanh(v + x.b)


STEPS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "a norm of the normalised input": lambda s, x, h, p: tanh(s.norm_cell(x.a) + x.b + p(h).a),
    "a norm of the input's second gate": lambda s, x, h, p: tanh(s.norm_cell(x.b) + x.a + p(h).a),
    "a norm of a normalised product": lambda s, x, h, p: tanh(s.norm_cell(p(h).b) + x.a),
    "a norm of a sum": lambda s, x, h, p: tanh(s.norm_cell(x.a + p(h).b) + x.b),
    "a norm that nothing uses": lambda s, x, h, p: (s.norm_cell(x.a), tanh(x.a + p(h).b))[1],
    "no gate of the input": lambda s, x, h, p: tanh(p(h).b + 0.5),
    "no product": lambda s, x, h, p: tanh(x.a - x.b),
    "the state as it was": lambda s, x, h, p: h,
    "a gate as it is": lambda s, x, h, p: x.b,
    "without gradients": without_gradients,
    "under autocast": under_autocast,
    "a gradient of its own": lambda s, x, h, p: Cube.apply(x.a + p(h).a),
    "where as a method": lambda s, x, h, p: tanh(x.a.where(F.relu(x.b) == 0, p(h).a)),
    "greater": lambda s, x, h, p: tanh(where(x.a > 0.1, x.a, 0.1 * x.a) + p(h).a),
    "at least": lambda s, x, h, p: tanh(where(x.a >= 0, x.a, x.b) + p(h).a),
    "less": lambda s, x, h, p: tanh(where(torch.lt(x.a, 0), x.a, x.b) + p(h).a),
    "at most": lambda s, x, h, p: tanh(where(x.a.le(-0.2), x.a, x.b) + p(h).a),
    "differs": lambda s, x, h, p: tanh(where(F.relu(x.b) != 0, x.a, p(h).a)),
    "a mask times a gate": lambda s, x, h, p: tanh((x.a > 0) * x.b + p(h).a),
    "a branch on a size": lambda s, x, h, p: tanh(p(h).a + x.a if h.shape[-1] == 4 else x.b),
    "a branch on an order of sizes": lambda s, x, h, p: tanh(p(h).a + x.a if h.shape[-1] > 3 else x.b),
    "a branch on two sizes": lambda s, x, h, p: tanh(p(h).a + x.a if h.shape[0] != h.shape[1] else x.b),
    "a branch on two shapes": lambda s, x, h, p: tanh(p(h).a + x.a if h.shape == x.a.shape else x.b),
    "a branch on a dtype": lambda s, x, h, p: tanh(p(h).a + x.a if h.dtype == torch.float64 else x.b),
    "a branch on known dtypes": lambda s, x, h, p: tanh(p(h).a + x.a if h.dtype in (torch.float64,) else x.b),
    "where as a function": lambda s, x, h, p: tanh(where(F.relu(x.b) == 0, x.a, p(h).a)),
    "equal tensors": lambda s, x, h, p: tanh((x.a == x.a) * p(h).a + x.b),
    "unequal tensors": lambda s, x, h, p: tanh((x.a != x.b) * p(h).a),
    "unequal to a number": lambda s, x, h, p: tanh((F.relu(x.a) != 0) * p(h).a),
    "integers": lambda s, x, h, p: tanh((3 * x.a).to(torch.int64).to(x.b.dtype) + p(h).a),
    "a narrow dtype and back": lambda s, x, h, p: tanh((x.a + p(h).a).to(torch.bfloat16).to(x.b.dtype)),
    "relu in place": lambda s, x, h, p: (lambda v: F.relu(v, inplace=True) + tanh(v))(x.a + p(h).a),
    "a product in place": aliased,
    "softplus with a low threshold": lambda s, x, h, p: tanh(F.softplus(x.a, threshold=0.0) + p(h).a),
    "a product of a constant": lambda s, x, h, p: tanh(F.linear(s.vector, s.matrix) + x.a + p(h).a),
    "an exponential of large numbers": lambda s, x, h, p: tanh(1e-300 * exp(354 * (tanh(3 * x.a) + 1)) + p(h).a),
    "a maximum of equal numbers": lambda s, x, h, p: tanh(maximum(F.relu(x.a), F.relu(x.b)) + p(h).a),
    "a kind of number": lambda s, x, h, p: tanh(x.a * (5.0 if isinstance(s.k, int) else 1.0) + p(h).a),
    "the sign of zero": lambda s, x, h, p: tanh(x.a * math.copysign(1.0, s.k) + p(h).a),
}


class Given(Cell):
    """A cell whose step is given."""

    gates = ("a", "b")
    has_norm_cell = True
    parameters: ClassVar[dict[str, Extra]] = {"vector": Extra(), "matrix": Extra(("hidden_size", "hidden_size"))}
    options: ClassVar[dict[str, Any]] = {"k": 0.0}
    equation: ClassVar[Any]
    vector: Tensor
    matrix: Tensor
    k: Any

    def step(self, x: Any, state: Any, project: Any) -> Any:
        return self.State(h=type(self).equation(self, x, state.h, project))


def cell_of(name: str) -> type[Cell]:
    return type(name.title().replace(" ", ""), (Given,), {"equation": staticmethod(STEPS[name])})


def results_of(layer: Recurrent, x: Tensor) -> list[Tensor]:
    """Output, gradients and what the norms have gathered."""
    x = x.clone().requires_grad_()
    output, _ = layer(x)
    loss = (output * torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output)).sum()
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
    gathered = [one for name, one in layer.named_buffers() if name.endswith((".mean", ".count"))]
    return [output, *gradients, *gathered]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    "options",
    [{"norm": None}, {}, {"norm_input": False}, {"norm_hidden": False, "norm": "layer"}, {"bias": False}],
    ids=str,
)
def test_a_step_means_what_it_means_to_torch(name, options) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for k in (0.0, -0.0, 1.0, 1):
        fast = Recurrent(cell_of(name), 3, 4, dtype=torch.float64, **options)
        fast.cell.k = k  # type: ignore[attr-defined]
        plain = copy.deepcopy(fast)
        plain.backend = "reference"
        for ours, theirs in zip(results_of(fast, x), results_of(plain, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


COMPARED = ("greater", "at least", "less", "at most", "differs", "a mask times a gate", "where as a function")
ASKED = {"a branch on a size": "number of units", "a branch on an order of sizes": "number of units"}
ASKED |= dict.fromkeys(("a branch on two sizes", "a branch on two shapes"), "number of samples")
ASKED |= dict.fromkeys(("a branch on a dtype", "a branch on known dtypes"), "a dtype")


@pytest.mark.parametrize("name", [*COMPARED, *ASKED])
def test_comparisons_with_numbers_are_recorded_and_questions_are_not(name) -> None:
    reason = Recurrent(cell_of(name), 3, 4, dtype=torch.float64).backend_reason
    if name in COMPARED:
        assert reason is None
    else:
        assert f"what a step does depends on the {ASKED[name]}".replace("the a ", "a ") in reason


class TwoOutputs(Cell):
    """A first state of twice as many numbers as there are units."""

    gates = ("a", "b")
    products = ()

    def state_size(self, state: str, hidden_size: int) -> int:
        return 2 * hidden_size

    def step(self, x: Any, state: Any, project: Any) -> Any:
        n = x.a.shape[-1]
        return self.State(h=torch.cat([tanh(x.a + state.h[..., n:]), tanh(x.b + state.h[..., :n])], -1))


class Delayed(Cell):
    """A delay line on which zoneout acts, too."""

    gates = ("a",)
    states = ("h", "line")

    def state_size(self, state: str, hidden_size: int) -> int:
        return 2 * hidden_size if state == "line" else hidden_size

    def step(self, x: Any, state: Any, project: Any) -> Any:
        n = x.a.shape[-1]
        h = tanh(x.a + project(state.line[..., :n]).a)
        return self.State(h=h, line=torch.cat([state.line[..., n:], h], -1))


class NoPlainOption(Cell):
    """A cell that holds a list in a tuple."""

    gates = ("a",)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = ([1.0, 2.0],)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        return self.State(h=tanh(x.a * self.table[0][1] + project(state.h).a))


@pytest.mark.parametrize("kind", [TwoOutputs, Delayed, NoPlainOption])
@pytest.mark.parametrize("norm", [None, "bln"])
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
def test_states_and_options_of_any_kind(kind, norm, zoneout) -> None:
    fast = Recurrent(kind, 3, 4, dtype=torch.float64, norm=norm, zoneout=zoneout).eval()
    plain = copy.deepcopy(fast)
    plain.backend = "reference"
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for ours, theirs in zip(results_of(fast, x), results_of(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_error_is_named_with_its_reason() -> None:
    x = torch.randn(4, 5, 3)
    with pytest.raises(ValueError, match="zoneout of a state of several parts"):
        Recurrent(Delayed, 3, 4, zoneout=0.3, backend="cpu")(x)
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(Recurrent("mgu", 3, 4, backend="cpu").eval(), in_dims=0)(torch.randn(2, 4, 5, 3))


def test_nothing_is_kept_for_a_gradient_that_nobody_asks_for() -> None:
    kept = []
    layer, x = Recurrent("slstm", 3, 4), torch.randn(4, 5, 3)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda one: one), torch.no_grad():
        layer(x)
    assert not kept
