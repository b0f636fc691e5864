"""The gate in front of the C++ library: which calls it takes, and tensors as it reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import mul

import torch
from torch import Tensor

from lightning_bln._torch import is_exporting, is_observed, is_plain, written_out
from lightning_bln.kernels.library import DTYPES, is_built
from lightning_bln.kernels.triton.available import is_wanted, reason_against_triton

HOW_TO_BUILD = (
    "install a C++ compiler (g++ or clang) and, in a clone of lightning-bln, install it again: "
    "pip install --force-reinstall --no-deps --no-binary lightning-bln ."
)


def reason_against(dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> str | None:
    """Obstacle to a call of the library, here and with these tensors; ``None`` if it serves.

    Args:
        dtype: Of the parameters, or of the input where there is none.
        tensors: All that the call reads.
    """
    if is_observed():
        return "a transform (torch.func, forward-mode derivatives, tracing) has to see every operation"
    if torch.compiler.is_compiling():
        others = [value.device for value in tensors if value is not None and value.device.type != "cpu"]
    else:
        odd = [value for value in tensors if not is_plain(value)]
        others = [value.device for value in odd if value is not None and value.device.type != "cpu"]
        if odd and not others:
            return f"a tensor is a {type(odd[0]).__name__}, and the compiled kernels take plain ones"
    if others:
        return f"a tensor is on {others[0]}, and the compiled kernels run on the CPU"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, and the compiled kernels take float32 and float64"
    if not is_built():
        return f"the compiled kernels are not installed; {HOW_TO_BUILD}"
    return None


def serves(backend: str, reason: str | None) -> bool:
    """Whether a layer of this backend runs on the library, or on Triton, given the obstacle, if any.

    Raises:
        ValueError: ``backend="cpu"`` or ``"triton"`` asks for it where it cannot run.
    """
    is_asked = backend in ("cpu", "triton")
    if is_asked and reason is not None:
        raise ValueError(f"backend={backend!r}, but {reason}; pass backend='auto' to run on torch operations instead")
    # exported on torch operations a program loads without this package, and converts to other formats
    return reason is None and (is_asked or not is_exporting())


def serves_triton(backend: str, dtype: torch.dtype, tensors: Iterable[Tensor | None]) -> bool:
    """Whether a norm of this backend runs on Triton kernels.

    Raises:
        ValueError: ``backend="triton"`` asks for them where they cannot run.
    """
    if backend not in ("auto", "triton"):
        return False
    there = [value for value in tensors if value is not None]
    if backend == "auto" and not (there[0].device.type == "cuda" and is_wanted()):
        return False
    return serves(backend, reason_against_triton(dtype, there))


def admit(name: str, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor as most of the library reads it: :func:`checked`, and contiguous."""
    return None if value is None else checked(name, value, shape, dtype).contiguous()


def checked(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and dtype whose numbers lie in this process's memory, with any strides.

    Raises:
        ValueError: It has another shape, lies elsewhere, or its memory was given back.
        TypeError: Its dtype cannot be converted without loss of a part.
    """
    if (
        value.shape == shape
        and value.dtype is dtype
        and value.is_cpu
        and value.layout is torch.strided
        and not value.is_neg()
        and is_in_memory(value)
    ):
        return value
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but {tuple(shape)} is needed; reshape it")
    if value.device.type != "cpu" or value.layout is not torch.strided:
        raise ValueError(f"{name} is a {value.layout} tensor on {value.device}, but a dense one on the CPU is needed")
    if value.dtype.is_complex or value.dtype.is_floating_point is not dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {value.dtype}, but {dtype} is needed; convert it with .to()")
    value = written_out(value)
    if not is_in_memory(value):
        raise ValueError(f"the memory of {name} was given back, as by resize_() of its storage; make the tensor anew")
    return value.to(dtype)


def is_in_memory(value: Tensor) -> bool:
    """Whether a tensor has memory, which zeros may have none of, as far as its strides reach."""
    size = value.numel()
    if not size:
        return True
    if not value.is_contiguous():
        size = 1 + sum(map(mul, value.stride(), (size - 1 for size in value.shape)))
    bytes_needed = (value.storage_offset() + size) * value.element_size()
    return value.data_ptr() != 0 and value.untyped_storage().nbytes() >= bytes_needed


def dense_features(x: Tensor) -> Tensor:
    """``x`` with stride 1 along its last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor as programs read it: of this shape and dtype, its features contiguous."""
    return dense_features(checked(name, value, shape, dtype))
