"""Copies of trained models in plain torch modules, for use without this package."""

from lightning_bln.folding.affine import Affine
from lightning_bln.folding.fold import fold

__all__ = ["Affine", "fold"]
