"""Copies of trained models in plain torch modules, for use without this package."""

from lightning_bln.folding.affine import Affine
from lightning_bln.folding.fold import fold
from lightning_bln.folding.frozen import FrozenCell, FrozenRecurrent

__all__ = ["Affine", "FrozenCell", "FrozenRecurrent", "fold"]
