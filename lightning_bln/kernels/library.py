"""The library of C++ kernels: which variant this processor runs, how it is called, and the structures it takes."""

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

from lightning_bln.kernels.triton.available import described

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""In the order of ``Cell`` in ``csrc/recurrence.h``."""

VARIANTS = {"AVX512": "avx512", "AVX2": "avx2", "DEFAULT": "baseline"}
"""Suffix of the library for each CPU capability that torch reports, best first."""

DTYPES = {torch.float32: "float", torch.float64: "double"}

_POINTER = ctypes.c_void_p
_INTEGER = ctypes.c_int64
_NUMBER = ctypes.c_double


def fields(kind: type[Any], names: str) -> tuple[tuple[str, type[Any]], ...]:
    """Fields of one type in a row."""
    return tuple((name, kind) for name in names.split())


class NormArgs(ctypes.Structure):
    """``NormArgs`` of ``csrc/norm.h``."""

    _fields_ = (
        *fields(_INTEGER, "enabled joint fixed"),
        *fields(_NUMBER, "scale eps"),
        *fields(_POINTER, "w_feature w_batch weight bias batch_mean batch_var feature_mean feature_var"),
        *fields(_POINTER, "batch_moments feature_moments grad_weight grad_bias"),
    )


class RecurrenceArgs(ctypes.Structure):
    """``RecurrenceArgs`` of ``csrc/recurrence.h``."""

    _fields_ = (
        *fields(_INTEGER, "cell steps batch rows inputs units threads row_teams column_teams chunk_rows keep"),
        *fields(_NUMBER, "zoneout_h zoneout_c"),
        *fields(_POINTER, "batch_sizes input weight_ih weight_hh h0 c0 hidden_mask zoneout_mask_h zoneout_mask_c"),
        *fields(_POINTER, "output hn cn input_part hidden_part cells"),
        *fields(_POINTER, "grad_output grad_hn grad_cn grad_input grad_weight_ih grad_weight_hh grad_h0 grad_c0"),
        *fields(NormArgs, "norm_ih norm_hh norm_cell"),
    )


class DenseArgs(ctypes.Structure):
    """``DenseArgs`` of ``csrc/dense.h``."""

    _fields_ = (
        *fields(_INTEGER, "rows positions features groups threads shared row_stride position_stride feature_stride"),
        *fields(_INTEGER, "grad_row_stride grad_position_stride grad_feature_stride"),
        *fields(_POINTER, "x output grad grad_x batch_sizes"),
        ("norm", NormArgs),
    )


class GatherArgs(ctypes.Structure):
    """``GatherArgs`` of ``csrc/gather.h``."""

    _fields_ = (
        *fields(_INTEGER, "steps groups width samples batch has_batch has_feature"),
        *fields(_POINTER, "batch_sizes batch_moments feature_moments old_count old_mean old_m2 count mean m2"),
    )


class ProgramArgs(ctypes.Structure):
    """``ProgramArgs`` of ``csrc/program.h``."""

    _fields_ = (
        *fields(_INTEGER, "steps batch units outputs threads reversed instructions matrices norms"),
        *fields(_POINTER, "batch_sizes code places matrix norm_gates norm"),
    )


class Instruction(ctypes.Structure):
    """``Instruction`` of ``csrc/program.h``."""

    _fields_ = (*fields(_INTEGER, "operation narrow to a b c"), *fields(_NUMBER, "s u"))


class ProductArgs(ctypes.Structure):
    """``ProductArgs`` of ``csrc/product.h``."""

    _fields_ = (
        *fields(_INTEGER, "rows columns depth threads"),
        ("a", _POINTER), *fields(_INTEGER, "a_row a_column"),
        ("b", _POINTER), *fields(_INTEGER, "b_row b_column"),
        ("c", _POINTER), ("c_row", _INTEGER), ("bias", _POINTER),
    )  # fmt: skip


STRUCTURES = (NormArgs, RecurrenceArgs, DenseArgs, GatherArgs, ProgramArgs, Instruction, ProductArgs)
"""In the order of ``csrc/layout.h``."""


def available() -> dict[str, str | None]:
    """The backends and what each runs on here; ``None`` where one is missing.

    Example:
        >>> available()["reference"]
        'torch operations'
    """
    return {"reference": "torch operations", "cpu": variant(), "triton": described()}


def variant() -> str | None:
    """Name of the instruction set that the loaded library was built for."""
    library = load()
    return None if library is None else vars(library)["variant"]


@torch.compiler.assume_constant_result
def is_built() -> bool:
    """Whether a library was built that loads here."""
    return load() is not None


@cache
def load() -> ctypes.CDLL | None:
    """The best library that was built and that this processor runs; None without one."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = list(VARIANTS)
    best = names.index(capability) if capability in names else len(names) - 1
    for name in names[best:]:
        library = open_library(VARIANTS[name])
        if library is not None:
            return library
    return None


def call(name: str, args: ctypes.Structure | ctypes.Array[Any], dtype: torch.dtype, *numbers: int) -> None:
    """Call an entry point of the library; it records no gradient, and checks of all arrays ``batch_sizes`` alone.

    Args:
        name: Of the entry point, without prefix and dtype.
        args: The structure, or an array of structures, that it takes.
        dtype: Of the tensors behind the pointers.
        numbers: Its further arguments.

    Raises:
        MemoryError: The kernel's buffers could not be allocated.
        ValueError: ``batch_sizes`` does not fit the other arrays.
    """
    library = load()
    assert library is not None, "the compiled kernels are not there; check lightning_bln.kernels.available()"
    status = getattr(library, f"bln_{name}_{DTYPES[dtype]}")(ctypes.byref(args), *map(_INTEGER, numbers))
    if status == 1:
        raise MemoryError(f"no memory for the buffers of {name}; shorten the sequences, or pass fewer rows at a time")
    if status:
        raise ValueError(
            "batch_sizes does not fit the data: the running sequences start with all, never become more, and are as "
            "many as the rows together; keep those of pack_sequence or pack_padded_sequence"
        )


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; None without elements."""
    return None if tensor is None else tensor.data_ptr() or None


def bits_of(uses: Sequence[bool | Tensor]) -> int:
    """A bit for each statistic that the population gives in all groups, batch mean lowest."""
    return sum(int(use is True) << bit for bit, use in enumerate(uses))


def set_norm(
    norm: NormArgs,
    weight: Tensor | None,
    mixing: int,
    given: Tensor | None,
    uses: int,
    steps: int,
    width: int,
    groups: int,
) -> None:
    """Enable a norm and point it at its arrays, the bias aside.

    Args:
        norm: Filled in.
        weight: Of each feature.
        mixing: Address of the weights of the feature part and of the batch part, ``(2, steps)`` in float64.
        given: The population's statistics one after the other, flat: batch mean and variance, ``(steps, width)``, then
            feature mean and variance, ``(steps, groups)``.
        uses: A bit for each of them that is used, as from :func:`bits_of`.
        steps: Number of steps.
        width: Number of features.
        groups: Number of groups of features that are normalised by themselves.
    """
    norm.enabled, norm.weight = 1, pointer(weight)
    norm.w_feature, norm.w_batch = mixing, mixing + steps * 8
    if given is None:
        return
    address = given.data_ptr()
    for bit, (name, size) in enumerate(
        (("batch_mean", width), ("batch_var", width), ("feature_mean", groups), ("feature_var", groups))
    ):
        setattr(norm, name, address if uses >> bit & 1 else None)
        address += steps * size * given.element_size()


def set_moments(norm: NormArgs, moments: Tensor, size: int) -> None:
    """Let a norm keep its moments: the batch's means and variances, ``size`` of each, then those of the features.

    Without elements it keeps none.
    """
    norm.batch_moments = address = pointer(moments)
    norm.feature_moments = address + 2 * size * moments.element_size() if address else None


def open_library(variant: str) -> ctypes.CDLL | None:
    """One variant, ready to be called; None if it was not built, and with a warning if it cannot be used."""
    path = find(variant)
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"{path.name} does not load ({error}); slower kernels are tried", stacklevel=2)
        return None
    built_from = getattr(library, "bln_layout_hash", None)
    if built_from is not None:
        built_from.restype = ctypes.c_uint64
    if built_from is None or built_from() != layout_hash():
        warnings.warn(f"{path.name} was built from other sources than this package's; install it again", stacklevel=2)
        return None
    vars(library)["variant"] = variant
    share_threads(library)
    return library


def layout_hash() -> int:
    """64-bit FNV-1a of name, type and offset of every field of :data:`STRUCTURES`, as ``csrc/layout.h`` computes it."""
    types = {_INTEGER: "integer", _NUMBER: "number", _POINTER: "pointer"}
    fields = (
        f"{structure.__name__}.{name}:{types.get(kind, kind.__name__)}@{getattr(structure, name).offset};"
        for structure in STRUCTURES
        for name, kind, *_ in structure._fields_
    )
    value = 0xCBF29CE484222325
    for byte in "".join(fields).encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def find(variant: str) -> Path | None:
    """The file of one variant, beside this module or in the folder that ``BLN_KERNELS`` names."""
    folder = Path(os.environ.get("BLN_KERNELS", Path(__file__).parent))
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_recurrence_{variant}{suffix}"
        if path.exists():
            return path
    return None


def share_threads(library: ctypes.CDLL) -> None:
    """Run the kernels on the threads of the OpenMP runtime that torch has loaded; without it they run on one."""
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
