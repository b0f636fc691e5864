"""Numerical kernels of the C++ library: tensors in, tensors out."""

from importlib import import_module
from typing import Any

from lightning_bln import _moved
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels.library import available

if HAS_CUSTOM_OPS:
    from lightning_bln.kernels import custom_ops as custom_ops

__all__ = ["available"]

EARLIER = {
    **dict.fromkeys(("HiddenWeights", "Noise", "Result", "Sequences", "recurrence"), "recurrence.reference"),
    **dict.fromkeys(("BACKENDS", "run"), "recurrence.backends"),
}
"""Names that this package had in version 0.1.0, and where each stands now."""


def __getattr__(name: str) -> Any:
    """Names and modules by their earlier paths."""
    if name in EARLIER:
        return getattr(import_module(f"lightning_bln.{EARLIER[name]}"), name)
    return _moved.attribute(__name__, name)
