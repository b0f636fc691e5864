"""Pickles of dicts, lists and byte arrays, read without running anything that they ask for."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from lightning_bln._files import one_line
from lightning_bln.data.files import damaged

RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}


def read_arrays(raw: bytes, path: Path) -> Any:
    """Unpickle dicts, lists, numbers, texts and numpy arrays of unsigned bytes.

    Numpy itself sees no more than the bytes of an array, whose size is checked first: what a pickle asks it to make
    may be of any size.

    Raises:
        DataError: The pickle is damaged, or holds anything else; nothing that it names is imported.
    """
    try:
        check_memo(raw)
        return plain(ArraysOnly(io.BytesIO(raw), encoding="bytes").load())
    except Exception as error:  # a damaged pickle raises all there is
        raise damaged(path, one_line(error)) from error


def check_memo(raw: bytes) -> None:
    """Raise where a pickle numbers an object higher than it has any: room would be made for all numbers below."""
    for place, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= (argument or 0) <= place:
            raise pickle.UnpicklingError(f"numbers an object {argument} after {place} steps")


class Dtype:
    """The arguments by which numpy would make a dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.name = arguments[0] if arguments else None

    def __setstate__(self, state: Any) -> None:
        pass

    @property
    def is_bytes(self) -> bool:
        """Whether it is that of unsigned bytes."""
        return self.name in ("u1", b"u1", "|u1", b"|u1")


class Pickled:
    """The state of an array."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray[Any, Any]:
        """The array, if its state is that of one of unsigned bytes."""
        _, shape, dtype, is_fortran, content = self.state
        if not isinstance(dtype, Dtype) or not dtype.is_bytes:
            raise pickle.UnpicklingError("holds an array that is not of unsigned bytes")
        if not isinstance(content, bytes) or math.prod(shape) != len(content):
            raise pickle.UnpicklingError(f"holds an array whose content does not have its shape {shape}")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def reconstruct(*_: Any) -> Pickled:
    """Stand-in of numpy's function of that purpose."""
    return Pickled()


def encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand-in of ``_codecs.encode``, by which protocol 2 writes bytes."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"asks for the codec {encoding!r}")
    return text.encode("latin1")


def never(*_: Any) -> None:
    """Stand-in of a class that is named and never called."""
    raise pickle.UnpicklingError("makes an array by its class")


class ArraysOnly(pickle.Unpickler):
    """Unpickler that imports nothing: every name stands for a function or class of this file, or is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECONSTRUCT:
            return reconstruct
        stand_ins: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): never,
            ("numpy", "dtype"): Dtype,
            ("_codecs", "encode"): encode,
        }
        if (module, name) not in stand_ins:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return stand_ins[module, name]


def plain(value: Any) -> Any:
    """``value``, a dict's arrays as numpy's."""
    if not isinstance(value, dict):
        return value
    return {key: one.array() if isinstance(one, Pickled) else one for key, one in value.items()}
