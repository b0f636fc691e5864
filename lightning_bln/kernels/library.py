"""The compiled kernels: which of them this processor runs, and the structures they take."""

from __future__ import annotations

import ctypes
import glob
import os
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
#: Suffix of the library for each of torch's names of a processor's abilities, best first.
VARIANTS = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "baseline"}

DTYPES = {torch.float32: "float", torch.float64: "double"}

_POINTER = ctypes.c_void_p
_INTEGER = ctypes.c_int64
_NUMBER = ctypes.c_double


class NormArgs(ctypes.Structure):
    """``NormArgs`` of ``csrc/norm.h``."""

    _fields_ = (
        *((name, _INTEGER) for name in ("enabled", "joint", "fixed")),
        *((name, _NUMBER) for name in ("scale", "eps")),
        *(
            (name, _POINTER)
            for name in (
                "w_feature", "w_batch", "weight", "bias", "batch_mean", "batch_var", "feature_mean", "feature_var",
                "batch_moments", "feature_moments", "grad_weight", "grad_bias",
            )
        ),
    )  # fmt: skip


class RecurrenceArgs(ctypes.Structure):
    """``RecurrenceArgs`` of ``csrc/recurrence.h``."""

    _fields_ = (
        *(
            (name, _INTEGER)
            for name in (
                "cell", "steps", "batch", "inputs", "units", "threads", "row_teams", "column_teams",
                "chunk_rows", "keep",
            )
        ),
        *((name, _NUMBER) for name in ("zoneout_h", "zoneout_c")),
        *(
            (name, _POINTER)
            for name in (
                "batch_sizes", "input", "weight_ih", "weight_hh", "h0", "c0", "hidden_mask", "zoneout_mask_h",
                "zoneout_mask_c", "output", "hn", "cn", "input_part", "hidden_part", "cells", "grad_output", "grad_hn",
                "grad_cn", "grad_input", "grad_weight_ih", "grad_weight_hh", "grad_h0", "grad_c0",
            )
        ),
        *((name, NormArgs) for name in ("norm_ih", "norm_hh", "norm_cell")),
    )  # fmt: skip


class DenseArgs(ctypes.Structure):
    """``DenseArgs`` of ``csrc/dense.h``."""

    _fields_ = (
        *(
            (name, _INTEGER)
            for name in (
                "rows", "positions", "features", "threads", "row_stride", "position_stride", "grad_row_stride",
                "grad_position_stride",
            )
        ),
        *((name, _POINTER) for name in ("x", "output", "grad", "grad_x")),
        ("norm", NormArgs),
    )  # fmt: skip


class GatherArgs(ctypes.Structure):
    """``GatherArgs`` of ``csrc/gather.h``."""

    _fields_ = (
        *((name, _INTEGER) for name in ("steps", "groups", "width", "samples", "has_batch", "has_feature")),
        *(
            (name, _POINTER)
            for name in (
                "batch_sizes", "batch_moments", "feature_moments", "old_count", "old_mean", "old_m2", "count", "mean",
                "m2",
            )
        ),
    )  # fmt: skip


class Instruction(ctypes.Structure):
    """``Instruction`` of ``csrc/program.h``."""

    _fields_ = (
        *((name, _INTEGER) for name in ("operation", "to", "a", "b", "c")),
        *((name, _NUMBER) for name in ("s", "u")),
    )


class ProgramArgs(ctypes.Structure):
    """``ProgramArgs`` of ``csrc/program.h``."""

    _fields_ = (
        *((name, _INTEGER) for name in ("steps", "batch", "units", "threads", "reversed", "instructions", "matrices")),
        *((name, _POINTER) for name in ("batch_sizes", "code", "places", "matrix")),
    )


class ProductArgs(ctypes.Structure):
    """``ProductArgs`` of ``csrc/product.h``."""

    _fields_ = (
        *((name, _INTEGER) for name in ("rows", "columns", "depth", "threads")),
        ("a", _POINTER), ("a_row", _INTEGER), ("a_column", _INTEGER),
        ("b", _POINTER), ("b_row", _INTEGER), ("b_column", _INTEGER),
        ("c", _POINTER), ("c_row", _INTEGER), ("bias", _POINTER),
    )  # fmt: skip


STRUCTURES = (RecurrenceArgs, DenseArgs, GatherArgs, ProgramArgs, Instruction, ProductArgs)
"""What tells a library that was built from other sources."""


def available() -> dict[str, str | None]:
    """The backends of the recurrent layers and what each runs on here; ``None`` where one is missing.

    Example:
        >>> available()["reference"]
        'torch operations'
    """
    return {"reference": "torch operations", "cpu": variant()}


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None for none."""
    return None if tensor is None else tensor.data_ptr() or None


def bits_of(uses: Sequence[bool | Tensor]) -> int:
    """Which statistics are given, in all groups alike: batch mean in the lowest bit."""
    return sum(int(use is True) << bit for bit, use in enumerate(uses))


def set_given(norm: NormArgs, given: Tensor | None, uses: int, steps: int, width: int, groups: int) -> None:
    """Point a norm at those of the population's statistics that it uses, ``uses`` having a bit for each."""
    if given is None:
        return
    at = given.data_ptr()
    for bit, (name, size) in enumerate(
        (("batch_mean", width), ("batch_var", width), ("feature_mean", groups), ("feature_var", groups))
    ):
        setattr(norm, name, at if uses >> bit & 1 else None)
        at += steps * size * given.element_size()


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether the library is there and loads."""
    return load() is not None


@cache
def load() -> ctypes.CDLL | None:
    """The best library that was built and that this processor runs, or None."""
    ability = torch.backends.cpu.get_cpu_capability()
    names = list(VARIANTS)
    best = names.index(ability) if ability in names else len(names) - 1
    for name in names[best:]:
        library = open_library(VARIANTS[name])
        if library is not None:
            return library
    return None


def call(name: str, args: Any, dtype: torch.dtype, *numbers: int) -> None:
    """Call an entry point of the library for one dtype; without a gradient, and with nothing checked.

    Raises:
        MemoryError: There is none for its buffers.
    """
    library = load()
    assert library is not None, "the compiled kernels are not there; check lightning_bln.kernels.available()"
    if getattr(library, f"bln_{name}_{DTYPES[dtype]}")(ctypes.byref(args), *map(_INTEGER, numbers)):
        raise MemoryError(f"no memory for the buffers of {name}; shorten the sequences, or pass fewer rows at a time")


def open_library(variant: str) -> ctypes.CDLL | None:
    """One variant, ready to be called; None, and a warning, if it was built but does not serve."""
    path = find(variant)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"{path.name} does not load ({error}); slower kernels are tried", stacklevel=2)
        return None
    library.bln_args_size.restype = _INTEGER
    if library.bln_args_size() != sum(map(ctypes.sizeof, STRUCTURES)):
        warnings.warn(f"{path.name} was built from other sources than this package's; install it again", stacklevel=2)
        return None
    share_threads(library)
    return library


def variant() -> str | None:
    """Name of the instruction set that the loaded library was compiled for."""
    library = load()
    if library is None:
        return None
    return Path(library._name).name.split(".")[0].removeprefix("_recurrence_")


def find(variant: str) -> Path | None:
    """The file of one variant, beside this module or in the folder that ``BLN_KERNELS`` names."""
    folder = Path(os.environ.get("BLN_KERNELS", Path(__file__).parent))
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_recurrence_{variant}{suffix}"
        if path.exists():
            return path
    return None


def share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on the threads of the OpenMP runtime that torch has loaded; without it they run on one."""
    for path in loaded_openmp():
        try:
            runtime = ctypes.CDLL(path)
            entries = [runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.omp_get_num_threads]
        except (OSError, AttributeError):
            continue
        library.bln_set_runtime(*(ctypes.cast(entry, _POINTER) for entry in entries))
        return


def loaded_openmp() -> list[str]:
    """OpenMP runtimes mapped into this process, torch's own first."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return glob.glob(str(Path(torch.__file__).parent / "lib" / "*omp*"))
    names = {line.split()[-1] for line in mapped if "/" in line}
    found = [name for name in names if any(part in Path(name).name for part in ("libgomp", "libiomp", "libomp"))]
    own = str(Path(torch.__file__).parent)
    return sorted(found, key=lambda name: (not name.startswith(own), name))
