"""Normalised products with the hidden state, as a cell asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from lightning_bln.cells.cell import Cell, Gates

Norm = Callable[[Tensor], Tensor]


class Projection:
    """``project(h)`` and ``project.gate(h)``: rows of the hidden weights times a state, normalised, plus their bias.

    Args:
        cell: Declares the products.
        weight: Hidden weights, the rows in the order of ``cell.products``.
        bias: Hidden bias, or ``None``.
        norms: One for each product, or none.
        mask: Recurrent dropout: multiplies what enters the products, or ``None``.
    """

    def __init__(
        self, cell: Cell, weight: Tensor, bias: Tensor | None, norms: Sequence[Norm] = (), mask: Tensor | None = None
    ) -> None:
        self._products, self._weight, self._bias, self._norms, self._mask = cell.products, weight, bias, norms, mask

    def __call__(self, h: Tensor) -> Gates:
        """The product that serves all gates."""
        if len(self._products) > 1:
            raise TypeError(f"the cell has {len(self._products)} products; ask for one by name: project.gate(h)")
        return Gates(self._multiply(0, h), self._products[0])

    def __getattr__(self, gate: str) -> Callable[[Tensor], Tensor | Gates]:
        for index, product in enumerate(self._products):
            if gate in product:
                return partial(self._of_gate, index)
        raise AttributeError(f"no product serves a gate {gate!r}")

    def _of_gate(self, index: int, h: Tensor) -> Tensor | Gates:
        value = self._multiply(index, h)
        product = self._products[index]
        return value.squeeze(-2) if len(product) == 1 else Gates(value, product)

    def _multiply(self, index: int, h: Tensor) -> Tensor:
        gates = sum(map(len, self._products))
        first, number = sum(map(len, self._products[:index])), len(self._products[index])
        if self._mask is not None:
            h = h * self._mask
        rows = self._weight.unflatten(0, (gates, -1))[first : first + number]
        value = F.linear(h, rows.flatten(0, 1)).unflatten(-1, (number, -1))
        if self._norms:
            value = self._norms[index](value)
        if self._bias is not None:
            value = value + self._bias.view(gates, -1)[first : first + number]
        return value
