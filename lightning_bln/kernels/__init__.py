"""Numerical kernels in C++: tensors in, tensors out."""

from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels.library import available

if HAS_CUSTOM_OPS:
    from lightning_bln.kernels import custom_ops as custom_ops

__all__ = ["available"]
