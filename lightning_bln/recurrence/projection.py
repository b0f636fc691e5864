"""Normalised products with the hidden state, as a cell asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates, Step, Steps

Norm = Callable[[Tensor], Tensor]


class Projection:
    """Normalised products of a state with the hidden weights, plus their bias: ``project(h)`` and ``project.gate(h)``.

    Args:
        cell: Declares the products.
        weight: Hidden weights, the rows in the order of ``cell.products``; ``None`` if there are none.
        bias: Hidden bias, or ``None``.
        norms: One for each product, or none. They add the bias themselves.
        mask: Factors of recurrent dropout on the state, or ``None``.
        deferred: Shape ``(T, B)`` of the sequences to take the weights' gradient by one product over all steps, once
            the backward pass ends; ``None`` to take it at each step.
    """

    def __init__(
        self,
        cell: Cell,
        weight: Tensor | None,
        bias: Tensor | None,
        norms: Sequence[Norm] = (),
        mask: Tensor | None = None,
        deferred: tuple[int, int] | None = None,
    ) -> None:
        self._cell, self._norms, self._mask, self._running, self._t = cell, norms, mask, mask, 0
        self._products: list[Product] = []
        self._by_gate: dict[str, Callable[[Tensor], Any]] = {}
        if weight is None:
            return
        weight = cell.act(weight)
        size = weight.shape[0] // sum(map(len, cell.products))
        rows = [len(names) * size for names in cell.products]
        biases = [None] * len(rows) if bias is None or norms else bias.split(rows)
        for index, (names, w, b) in enumerate(zip(cell.products, weight.split(rows), biases, strict=True)):
            self._products.append(Product(w, b, len(names), deferred))
            of_gate = self._of_gate if len(names) == 1 else self._of_gates
            self._by_gate |= dict.fromkeys(names, partial(of_gate, index))

    def at(self, t: int, running: int | None = None) -> Projection:
        """Move to step ``t``, where the first ``running`` sequences are running."""
        self._t = t
        if self._mask is not None:
            self._running = self._mask[..., :running, :]
        return self

    def __call__(self, h: Tensor) -> Gates:
        """The first product."""
        return self._of_gates(0, h)

    def __getattr__(self, gate: str) -> Callable[[Tensor], Any]:
        if gate.startswith("__") or gate not in self._by_gate:
            raise AttributeError(f"no product serves a gate {gate!r}")
        return self._by_gate[gate]

    def _of_gate(self, index: int, h: Tensor) -> Tensor:
        return self._of_gates(index, h).joint()

    def _of_gates(self, index: int, h: Tensor) -> Gates:
        names = self._cell.products[index]
        if self._running is not None:
            h = h * self._running
        product = self._products[index]
        if not self._norms:
            return Pending(product, h, self._t, names)
        value = product(h, self._t)
        return Gates(self._norms[index](value.unflatten(-1, (len(names), -1))).flatten(-2), names)


class Pending(Gates):
    """A product computed on first use, so that its sum with other gates is one operation."""

    def __init__(self, product: Product, h: Tensor, t: int, names: tuple[str, ...]) -> None:
        super().__init__(None, names)
        self._product, self._h, self._t = product, h, t

    def joint(self) -> Tensor:
        """All gates."""
        if self._value is None:
            self._value = self._product(self._h, self._t)
        return self._value

    def plus(self, other: Gates) -> Tensor:
        """The sum of these gates and the first gates of the other."""
        if self._value is None and isinstance(other, Step):
            return self._product(self._h, self._t, other)
        return super().plus(other)


class Product:
    """A linear map of the state at each step; its weights' gradient is taken at each step or deferred."""

    def __init__(self, weight: Tensor, bias: Tensor | None, number: int, deferred: tuple[int, int] | None) -> None:
        self.weight, self.bias, self.number, self.deferred = weight, bias, number, deferred
        self.columns = weight.detach().t()
        self.seen: dict[int, Tensor] = {}
        self.terms: tuple[Tensor, ...] | None = None
        self.adds: Steps | None = None

    def __call__(self, h: Tensor, t: int, to: Step | None = None) -> Tensor:
        """The product with ``h`` at step ``t``, added to all gates ``to`` if they are given."""
        adds = None if to is None else to.steps
        if self.deferred is not None and self.terms is None:
            self.adds = adds
            base = None if adds is None else adds.gates.first(self.number)
            self.terms = DeferredGradient.apply(self.weight, self.bias, base, *self.deferred, self.seen).unbind(0)
        if self.terms is None or t in self.seen or adds is not self.adds:
            value = F.linear(h, self.weight, self.bias).to(h.dtype)
            return value if to is None else to.first(self.number) + value
        # The caller may write into a first state of its own before the backward pass.
        self.seen[t] = h.detach().clone() if t == 0 else h.detach()
        term, running = self.terms[t], h.shape[0]
        value = torch.addmm(term if term.shape[0] == running else term[:running], h, self.columns)
        return value if value.dtype == h.dtype else value.to(h.dtype)


class DeferredGradient(torch.autograd.Function):
    """Terms to add to the product at each step, ``(T, B, rows)``; from their gradient follows the weights'."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        base: Tensor | None,
        steps: int,
        samples: int,
        seen: dict[int, Tensor],
    ) -> Tensor:
        """``base``, if any, plus the bias; ``seen`` is filled with the state at each step."""
        ctx.seen, ctx.columns, ctx.has_bias, ctx.has_base = seen, weight.shape[1], bias is not None, base is not None
        if base is not None:
            return base.view_as(base) if bias is None else base + bias
        value = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return value.expand(steps, samples, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One product over all steps and samples."""
        steps, samples, rows = gradient.shape
        nothing = gradient.new_zeros(samples, ctx.columns)
        inputs = [F.pad(h, (0, 0, 0, samples - len(h))) for h in (ctx.seen.get(t, nothing) for t in range(steps))]
        weight = gradient.reshape(-1, rows).t() @ torch.cat(inputs).to(gradient.dtype)
        bias = gradient.sum((0, 1)) if ctx.has_bias else None
        return weight, bias, gradient if ctx.has_base else None, None, None, None
