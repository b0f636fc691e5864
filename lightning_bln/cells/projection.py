"""Normalised products with the hidden state, as a cell asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell
from lightning_bln.cells.gates import Gates

Norm = Callable[[Tensor], Tensor]


class Projection:
    """``project(h)`` and ``project.gate(h)``: rows of the hidden weights times a state, normalised, plus their bias.

    Args:
        cell: Declares the products.
        weight: Hidden weights, the rows in the order of ``cell.products``; ``None`` if there are none.
        bias: Hidden bias, or ``None``.
        norms: One for each product, or none. They add the bias themselves.
        mask: Recurrent dropout: multiplies what enters the products, or ``None``.
        deferred: The shape ``(steps, samples)`` of the sequences to leave the weights' gradient to the end of the
            backward pass, where it is one product over all steps; ``None`` to take it at each.
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
        self._cell, self._norms, self._mask, self._t = cell, norms, mask, 0
        self._products: list[Product] = []
        self._by_gate: dict[str, Callable[[Tensor], Any]] = {}
        if weight is None:
            return
        weight = cell.act(weight)
        size = weight.shape[0] // sum(map(len, cell.products))
        rows = [len(names) * size for names in cell.products]
        biases = [None] * len(rows) if bias is None or norms else bias.split(rows)
        for index, (names, w, b) in enumerate(zip(cell.products, weight.split(rows), biases, strict=True)):
            self._products.append(Product(w, b, deferred))
            self._by_gate |= dict.fromkeys(names, partial(self._of_gate, index))

    def at(self, t: int, running: int | None = None) -> Projection:
        """Go on to step ``t``, where only the first ``running`` samples take part."""
        self._t = t
        self._running = None if self._mask is None else self._mask[..., :running, :]
        return self

    def __call__(self, h: Tensor) -> Gates:
        """The first product."""
        return Gates(self._multiply(0, h), self._cell.products[0])

    def __getattr__(self, gate: str) -> Callable[[Tensor], Any]:
        if gate.startswith("__") or gate not in self._by_gate:
            raise AttributeError(f"no product serves a gate {gate!r}")
        return self._by_gate[gate]

    def _of_gate(self, index: int, h: Tensor) -> Tensor | Gates:
        names = self._cell.products[index]
        value = self._multiply(index, h)
        return value.squeeze(-2) if len(names) == 1 else Gates(value, names)

    def _multiply(self, index: int, h: Tensor) -> Tensor:
        if self._mask is not None:
            h = h * self._running
        value = self._products[index](h, self._t).unflatten(-1, (len(self._cell.products[index]), -1))
        return self._norms[index](value) if self._norms else value


class Product:
    """A linear map of the states of each step, its weights' gradient taken at each step or deferred."""

    def __init__(self, weight: Tensor, bias: Tensor | None, deferred: tuple[int, int] | None) -> None:
        self.weight, self.bias = weight, bias
        self.biases: list[Tensor] | None = None
        if deferred is not None:
            self.seen: dict[int, Tensor] = {}
            self.biases = list(DeferredGradient.apply(weight, bias, *deferred, self.seen).unbind(0))
            self.columns = weight.detach().t()

    def __call__(self, h: Tensor, t: int) -> Tensor:
        if self.biases is None or t in self.seen:
            return F.linear(h, self.weight, self.bias)
        # A state given from outside may be changed by its owner before the backward pass.
        self.seen[t] = h.detach().clone() if t == 0 else h.detach()
        bias = self.biases[t]
        return torch.addmm(bias if len(h) == len(bias) else bias[: len(h)], h, self.columns)


class DeferredGradient(torch.autograd.Function):
    """The bias of a product at each step, ``(steps, samples, rows)``, its gradient being all that the weights' need."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, bias: Tensor | None, steps: int, samples: int, seen: dict[int, Tensor]
    ) -> Tensor:
        """The bias of each step; ``seen`` will hold what is multiplied there."""
        ctx.seen, ctx.has_bias, ctx.columns = seen, bias is not None, weight.shape[1]
        value = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return value.expand(steps, samples, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """One product over all steps and samples."""
        steps, samples, _ = gradient.shape
        nothing = gradient.new_zeros(samples, ctx.columns)
        inputs = [F.pad(h, (0, 0, 0, samples - len(h))) if (h := ctx.seen.get(t)) is not None and len(h) < samples
                  else nothing if h is None else h for t in range(steps)]
        weight = gradient.flatten(0, 1).t() @ torch.stack(inputs).flatten(0, 1).to(gradient.dtype)
        return weight, gradient.sum((0, 1)) if ctx.has_bias else None, None, None, None
