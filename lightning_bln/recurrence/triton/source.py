"""Triton source of a recorded step and its gradient: one persistent kernel for each.

A program of the grid owns some units for all samples. It computes in phases; what others need of a phase lies in memory
before the grid's barrier, and what they leave is read after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_bln.recurrence.program.autodiff import Adjoint, differentiate
from lightning_bln.recurrence.program.graph import Step, Value, merge_sums, ordered
from lightning_bln.recurrence.triton.phases import NormForm


class Layout(NamedTuple):
    """Places of what a step reads."""

    gates: dict[str, tuple[int, int, int]]
    """Of each gate: the input tensor, its number there, and how many there are."""
    widths: dict[Any, int]
    """Gates of each hidden product."""

    def rows_before(self, product: int) -> int:
        """Gates of the products before one, in the rows of the hidden weights."""
        return sum(self.widths[k] for k in range(product))


class Recorded:
    """A step, its gradient, and what of both needs more than a line.

    Args:
        step: The recorded step; its graph is simplified in place.
        layout: Where its input lies.
        forms: Of its norms, by their keys.
    """

    def __init__(self, step: Step, layout: Layout, forms: Mapping[Any, NormForm]) -> None:
        roots = [*step.after.values(), *step.norms]
        merge_sums(roots)
        self.step, self.layout, self.forms = step, layout, forms
        self.adjoint: Adjoint = differentiate(step)
        self.values = ordered(roots)
        self.known = frozenset(self.values)
        merge_sums(self.adjoint.roots(), self.known)
        self.products = [value for value in self.values if value.op == "product"]
        self.norms = [value for value in self.values if value.op == "norm"]
        self.numbers = {value: number for wide in (self.products, self.norms) for number, value in enumerate(wide)}
        """Of each product and each norm, since ``==`` of values is an operation."""

    def width(self, value: Value) -> int:
        """Gates that a product or norm computes side by side."""
        return value.key[1] if value.op == "norm" else self.layout.widths.get(value.key, 1)


class Kernel:
    """Lines of a kernel and the tensors that it reads and writes."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.before: list[str] = []
        self.body: list[str] = []
        self.after: list[str] = []
        self.pointers: dict[str, None] = {}
        self.names: dict[Value, str] = {}
        self.columns = 0
        """Columns of partial sums."""
        self.barriers = 0
        self.widths: set[int] = set()

    def pointer(self, name: str) -> str:
        """A tensor's argument."""
        name = argument(name)
        self.pointers[name] = None
        return name

    def let(self, value: Value, text: str) -> None:
        """Give a value a name."""
        self.names[value] = f"v{len(self.names)}"
        self.body.append(f"{self.names[value]} = {text}")

    def wait(self) -> None:
        """A barrier of the grid."""
        self.body += ["done += PROGRAMS", "barrier(flag, done)"]
        self.barriers += 1

    def wide(self, width: int) -> str:
        """The suffix of what belongs to tiles of so many gates."""
        if width not in self.widths:
            self.widths.add(width)
            gates = room(width)
            self.before += [
                f"g{width} = tl.arange(0, {gates})[None, :]",
                f"real{width} = units[:, None] & (g{width} < {width})",
                f"columns{width} = g{width} * H + u[:, None]",
                f"flat{width} = tl.arange(0, U * {gates})",
                f"row{width} = (flat{width} % {gates}) * H + pid * U + flat{width} // {gates}",
                f"whole{width} = (flat{width} % {gates} < {width}) & (pid * U + flat{width} // {gates} < H)",
            ]
        return str(width)

    def leaf(self, value: Value) -> None:
        """Load a value that is given."""
        if value.op == "gate":
            tensor, number, count = self.recorded.layout.gates[value.key]
            at = f"(t * B + n[:, None]) * {count} * H + {number} * H + u[None, :]"
            self.let(value, self.load(f"x{tensor}", at))
        elif value.op == "kept":
            self.let(value, self.load(f"kept_{value.key}", "(t * B + n[:, None]) * H + u[None, :]"))
        elif value.op == "mask":
            self.let(value, self.load("mask", "own"))
        elif value.op in ("constant", "bias"):
            if value.op == "constant":
                name, first = f"constant_{value.key}", "0"
            else:
                name, first = "bias_hh", f"{self.recorded.layout.rows_before(value.key[0]) + value.key[1]} * H"
            self.names[value] = f"v{len(self.names)}"
            text = f"tl.load({self.pointer(name)} + {first} + u, mask=units, other=0.0)[None, :].to(ACC)"
            self.before.append(f"{self.names[value]} = {text}")

    def load(self, pointer: str, at: str, mask: str = "both") -> str:
        """Numbers of own units."""
        return f"tl.load({self.pointer(pointer)} + {at}, mask={mask}, other=0.0).to(ACC)"

    def place(self, columns: int) -> str:
        """Room for two sums of so many columns, other room at even and at odd steps."""
        self.columns += columns
        return f"part + ((step % 2) * PARTS + {self.columns - columns}) * PROGRAMS * B * 2"

    def affine(self, number: int, norm: Value) -> None:
        """Load a norm's weight and bias before the first step."""
        w = self.wide(norm.key[1])
        for kind, other in (("weight", "0.0"), ("bias", "0.0")):
            at = f"{self.pointer(f'norm_{kind}{number}')} + columns{w}"
            self.before.append(f"{kind}{number} = tl.load({at}, mask=real{w}, other={other}).to(ACC)")

    def mixing(self, number: int) -> None:
        """Load a norm's mixing weights of a step."""
        place = self.pointer(f"mixing{number}")
        self.body += [f"wf{number} = tl.load({place} + t)", f"wb{number} = tl.load({place} + T + t)"]


def argument(name: str) -> str:
    """A tensor's name as an argument; the parts of a state have names with spaces."""
    return name.replace(" ", "_")


def room(width: int) -> int:
    """The power of two that so many gates fill up to."""
    return 1 << (width - 1).bit_length()
