"""Phases of a step: what one program of the grid computes of its own units before it has to wait for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning_bln.recurrence.program.graph import Value


class NormForm(NamedTuple):
    """All of a norm, besides its tensors, that its code depends on."""

    width: int
    """Gates."""
    joint: bool
    """Whether features are those of all gates at once."""
    has_batch: bool
    has_feature: bool
    given: tuple[bool, bool, bool, bool]
    """Whether each statistic is the population's, in the order of :class:`~lightning_bln.equation.Statistics`."""
    eps: float
    keeps: bool
    """Whether the moments are kept, for the population or the gradient."""

    @property
    def groups(self) -> int:
        """Groups of features that are normalised by themselves."""
        return 1 if self.joint else self.width

    @property
    def measures_batch(self) -> bool:
        """Whether a moment over samples is the current one."""
        return self.has_batch and not (self.given[0] and self.given[1])

    @property
    def exchanges(self) -> bool:
        """Whether a moment over features is the current one, of which each program knows its part."""
        return self.has_feature and not (self.given[2] and self.given[3])


def is_masked_state(value: Value) -> bool:
    """Whether a value is a state before the step under the mask of recurrent dropout.

    Products alone read it, of all units: they load the state and the mask.
    """
    return value.op == "multiply" and value.inputs[1].op == "mask" and value.inputs[0].op == "state"


def source_of(product: Value) -> Value:
    """The operand of a product, a state without its mask."""
    operand = product.inputs[0]
    return operand.inputs[0] if is_masked_state(operand) else operand


def forward_phases(values: Iterable[Value], forms: Mapping[Any, NormForm]) -> dict[Value, int]:
    """Phase of each value of a step, which come in order.

    A product waits for all units of what it multiplies, unless that is the state before; a norm for the others' sums.
    """
    phases: dict[Value, int] = {}
    for value in values:
        at = max((phases[operand] for operand in value.inputs), default=0)
        waits = value.op == "product" and source_of(value).op != "state"
        phases[value] = at + int(waits or (value.op == "norm" and forms[value.key].exchanges))
    return phases


def backward_phases(
    values: Iterable[Value], known: frozenset[Value], forms: Mapping[Any, NormForm]
) -> dict[Value, int]:
    """Phase of each value of the gradient, ``known`` ones of the step among them, which are at hand at once."""
    phases: dict[Value, int] = {}
    for value in values:
        at = max((phases[operand] for operand in value.inputs), default=0)
        if value in known:
            phases[value] = 0
        else:
            waits = value.op == "product" or (value.op == "norm_gradient" and forms[value.key.key].exchanges)
            phases[value] = at + int(waits)
    return phases
