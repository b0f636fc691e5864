"""Tensors with a part for each statistics mode, on which code written for one mode computes all."""

from lightning_bln.per_mode import layers, rules, shapes
from lightning_bln.per_mode.errors import AddsGradients, NotTogether, reason_of
from lightning_bln.per_mode.tensor import PerMode
from lightning_bln.per_mode.trees import holds, join_trees, part_of
from lightning_bln.per_mode.writes import undoable

__all__ = [
    "AddsGradients",
    "NotTogether",
    "PerMode",
    "holds",
    "join_trees",
    "layers",
    "part_of",
    "reason_of",
    "rules",
    "shapes",
    "undoable",
]
