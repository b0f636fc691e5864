"""Conversion of plain torch modules to normalised ones, and back."""

from lightning_bln.convert.layers import TORCH_LAYERS, from_torch
from lightning_bln.convert.model import to_bln
from lightning_bln.convert.plain import to_torch
from lightning_bln.convert.report import Conversion, ConversionReport

__all__ = ["TORCH_LAYERS", "Conversion", "ConversionReport", "from_torch", "to_bln", "to_torch"]
