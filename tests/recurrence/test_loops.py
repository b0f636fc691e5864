"""Cells against loops written from their papers' equations, one sample and one step at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_bln import Recurrent

INPUTS, HIDDEN, STEPS, SAMPLES = 3, 4, 6, 2


class Rows:
    """A layer's weights by the names of the gates they serve: ``W`` and ``b`` of the input, ``U`` and ``d`` hidden."""

    def __init__(self, layer: Recurrent) -> None:
        self.layer = layer
        gates = layer.cell.gates
        hidden = [name for product in layer.cell.products for name in product]
        self.W = dict(zip(gates, layer.weight_ih_l0.chunk(len(gates)), strict=True))
        biased = gates[: len(gates) - len(layer.cell.unbiased)]
        self.b = dict(zip(biased, layer.bias_ih_l0.chunk(len(biased)), strict=True)) if layer.cell.biased else {}
        if hidden:
            self.U = dict(zip(hidden, layer.weight_hh_l0.chunk(len(hidden)), strict=True))
            if layer.cell.biased:
                self.d = dict(zip(hidden, layer.bias_hh_l0.chunk(len(hidden)), strict=True))

    def x(self, gate: str, x: Tensor) -> Tensor:
        """``W x + b``."""
        return self.W[gate] @ x + self.b.get(gate, 0)

    def h(self, gate: str, h: Tensor) -> Tensor:
        """``U h + d``."""
        return self.U[gate] @ h + self.d[gate]

    def a(self, gate: str, x: Tensor, h: Tensor) -> Tensor:
        """``W x + U h + b + d``."""
        return self.x(gate, x) + self.h(gate, h)

    def extra(self, name: str) -> Tensor:
        return getattr(self.layer, f"{name}_l0")


def zeros() -> Tensor:
    return torch.zeros(HIDDEN, dtype=torch.float64)


def lem(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Rusch et al. 2022, eq. (3): the output's update reads the new memory z_n; torchrecurrent's reads z_{n-1}.

    Ours is right: the authors' public code, too, transforms z after it was updated.
    """
    y, z = zeros(), zeros()
    for x in xs:
        dt, bar = w.a("memory_time", x, y).sigmoid(), w.a("output_time", x, y).sigmoid()
        z = (1 - dt) * z + dt * w.a("memory", x, y).tanh()
        y = (1 - bar) * y + bar * w.a("output", x, z).tanh()
        yield y


def nas(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """The fourth pair of the tree is joined by a product before its ReLU, where torchrecurrent has a sum.

    Ours is right: it is what the authors' NASCell in TensorFlow computes.
    """
    h, c = zeros(), zeros()
    for x in xs:
        a = [w.a(f"a{k}", x, h) for k in range(8)]
        product = w.x("a3", x) * w.h("a3", h)
        l1 = (a[0].sigmoid() * a[1].relu()).tanh()
        l2 = (a[2].sigmoid() + product.relu()).tanh()
        l3 = (a[4].tanh() * a[5].sigmoid()).tanh()
        l4 = (a[6].tanh() + a[7].sigmoid()).sigmoid()
        c = (l1 + c).tanh() * l2
        h = (c * (l3 + l4).tanh()).tanh()
        yield h


def fastgrnn(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Kusupati et al. 2018, eq. (5): the gate is a sigmoid. torchrecurrent's default is a tanh, which makes weights of
    two states that may be negative; with ``nonlinearity="sigmoid"`` it is the paper's."""
    h = zeros()
    zeta, nu = w.extra("zeta").sigmoid(), w.extra("nu").sigmoid()
    for x in xs:
        a = w.W["hidden"] @ x + w.U["hidden"] @ h
        z, n = (a + w.extra("bias_update")).sigmoid(), (a + w.extra("bias_hidden")).tanh()
        h = (zeta * (1 - z) + nu) * n + z * h
        yield h


def scrn(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Mikolov et al. 2015, eqs. (3) to (5): what recurs is h, and y is read from it and the context.

    torchrecurrent feeds y back in place of h, so its R acts on another state; ours is the paper's.
    """
    h, s = zeros(), zeros()
    for x in xs:
        s = 0.05 * w.x("context", x) + 0.95 * s
        h = (w.h("context_hidden", s) + w.x("hidden", x) + w.h("hidden", h)).sigmoid()
        yield (w.h("output", h) + w.h("context_output", s)).tanh()


def rhn(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Zilly et al. 2017, eqs. (6) to (9), with c = 1 - t."""
    s = zeros()
    for x in xs:
        for layer in range(3):
            n, z = (f"{name}{layer or ''}" for name in ("hidden", "transform"))
            h = (w.h(n, s) + (w.x("hidden", x) if layer == 0 else 0)).tanh()
            t = (w.h(z, s) + (w.x("transform", x) if layer == 0 else 0)).sigmoid()
            s = h * t + s * (1 - t)
        yield s


def coupledlstm(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Greff et al. 2017, CIFG; the same as an LSTM whose input gate is one minus its forget gate."""
    h, c = zeros(), zeros()
    for x in xs:
        f = w.a("forget", x, h).sigmoid()
        c = f * c + (1 - f) * w.a("cell", x, h).tanh()
        h = w.a("output", x, h).sigmoid() * c.tanh()
        yield h


def mingru(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Feng et al. 2024, section 3.1."""
    h = zeros()
    for x in xs:
        z = w.x("update", x).sigmoid()
        h = (1 - z) * h + z * w.x("hidden", x)
        yield h


def minlstm(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Feng et al. 2024, section 3.2."""
    h = zeros()
    for x in xs:
        f, i = w.x("forget", x).sigmoid(), w.x("input", x).sigmoid()
        h = f / (f + i) * h + i / (f + i) * w.x("hidden", x)
        yield h


def sru(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Lei et al. 2018, eqs. (1) to (4)."""
    c = zeros()
    for x in xs:
        f = (w.x("forget", x) + w.extra("recurrent_forget") * c).sigmoid()
        r = (w.x("reset", x) + w.extra("recurrent_reset") * c).sigmoid()
        c = f * c + (1 - f) * w.x("cell", x)
        yield r * c + (1 - r) * w.x("skip", x)


def qrnn(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Bradbury et al. 2017, eqs. (1) to (4), filters of width two, fo-pooling."""
    c, last = zeros(), torch.zeros(INPUTS, dtype=torch.float64)
    for x in xs:
        a = {gate: w.x(gate, x) + w.W[f"{gate}_before"] @ last for gate in ("hidden", "forget", "output")}
        f = a["forget"].sigmoid()
        c = f * c + (1 - f) * a["hidden"].tanh()
        last = x
        yield a["output"].sigmoid() * c


def slstm(w: Rows, xs: Tensor) -> Iterator[Tensor]:
    """Beck et al. 2024, eqs. (8) to (14), without the stabiliser, which cancels: in float64 there is no overflow."""
    h, c, n = zeros(), zeros(), zeros()
    for x in xs:
        i, f = w.a("input", x, h).exp(), w.a("forget", x, h).sigmoid()
        c = f * c + i * w.a("cell", x, h).tanh()
        n = f * n + i
        h = w.a("output", x, h).sigmoid() * c / n
        yield h


LOOPS = [lem, nas, fastgrnn, scrn, rhn, coupledlstm, mingru, minlstm, sru, qrnn, slstm]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cell_is_the_loop_of_its_papers_equations(loop, backend) -> None:
    layer = Recurrent(loop.__name__, INPUTS, HIDDEN, norm=None, dtype=torch.float64, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    xs = torch.randn(STEPS, SAMPLES, INPUTS, dtype=torch.float64, requires_grad=True)
    weights = Rows(layer)
    expected = torch.stack([torch.stack(list(loop(weights, xs[:, n]))) for n in range(SAMPLES)], 1)
    output, _ = layer(xs)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)
    leaves = [xs, *layer.parameters()]
    weight = torch.randn_like(output)
    ours = torch.autograd.grad((output * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_slstm_survives_gates_that_overflow_without_a_stabiliser() -> None:
    layer = Recurrent("slstm", INPUTS, HIDDEN, norm=None)
    output, _ = layer(1e4 * torch.randn(STEPS, SAMPLES, INPUTS))
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
