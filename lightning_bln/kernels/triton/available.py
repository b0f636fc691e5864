"""Whether Triton kernels run here, and the obstacle where they do not; nothing of Triton is imported to find out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_bln._torch import HAS_CUSTOM_OPS, is_autocast_enabled, is_observed, is_ordinary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (7, 5)
"""Compute capability of the oldest devices that Triton compiles for."""

HOW_TO_INSTALL = "pip install triton==3.7.1, or torch for CUDA, which brings its own"


@cache
def installed() -> str | None:
    """Triton's version; ``None`` where it is not installed."""
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        return "of unknown version"


@cache
def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, as ``TRITON_INTERPRET`` says at the first call."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def described() -> str | None:
    """The version and what it runs on here; ``None`` where no Triton kernel runs."""
    number = installed()
    if number is None:
        return None
    if is_interpreted():
        return f"{number}, interpreter"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    own = capability(torch.cuda.current_device())
    return f"{number}, sm_{own[0]}{own[1]}" if own >= OLDEST else None


def reason_against_triton(dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> str | None:
    """Obstacle to a Triton kernel, here and with these tensors; ``None`` if it serves.

    Args:
        dtype: Of the input.
        tensors: All that the call reads, the input first.
    """
    there = [value for value in tensors if value is not None]
    if is_autocast_enabled(there[0].device.type):
        return "under autocast norms run on torch operations"
    if is_observed():
        return "a transform (torch.func, forward-mode derivatives, tracing) has to see every operation"
    if torch.compiler.is_compiling():
        if not HAS_CUSTOM_OPS:
            return "torch.compile takes the Triton kernels from torch 2.4 on"
    else:
        odd = [value for value in there if not is_ordinary(value)]
        if odd:
            return f"a tensor is a {type(odd[0]).__name__}, and the Triton kernels take plain ones"
    return reason_of_device(dtype, str(there[0].device))


@torch.compiler.assume_constant_result
def reason_of_device(dtype: torch.dtype, name: str) -> str | None:
    """Obstacle to numbers of this dtype on this device."""
    device = torch.device(name)
    if installed() is None:
        return f"triton is not installed; {HOW_TO_INSTALL}"
    if is_interpreted():
        known = dtype in (*DTYPES, torch.float64) and device.type in ("cpu", "cuda")
        return None if known else f"the dtype is {dtype} on {device}, and the Triton kernels take floats on cpu or cuda"
    if device.type != "cuda" or torch.version.hip is not None:
        return (
            f"a tensor is on {device}, and the Triton kernels run on CUDA devices; move it there, or set "
            "TRITON_INTERPRET=1 before Python starts to try them on the CPU, slowly"
        )
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, and the Triton kernels take float32, bfloat16 and float16 on a GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    if capability(index) < OLDEST:
        return f"{device} has compute capability {capability(index)}, and Triton compiles for {OLDEST} and later"
    return None


@torch.compiler.assume_constant_result
def is_wanted() -> bool:
    """Whether ``backend="auto"`` is to choose Triton kernels on GPUs: ``LIGHTNING_BLN_TRITON=1``."""
    return os.environ.get("LIGHTNING_BLN_TRITON", "0") == "1"
