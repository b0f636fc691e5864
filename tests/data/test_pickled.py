"""Pickles of arrays: those that numpy's versions write, and those that want more."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_bln.data.files import DataError
from lightning_bln.data.pickled import read_arrays

ARRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol(protocol: int, order: Any) -> None:
    raw = pickle.dumps({b"data": np.array(ARRAY, order=order), b"labels": [1, 2]}, protocol)
    for written in (raw, raw.replace(b"numpy._core", b"numpy.core")):
        if protocol > 2 and written != raw:
            continue  # names have a length there
        found = read_arrays(written, Path("batch"))
        np.testing.assert_array_equal(found[b"data"], ARRAY)
        assert found[b"labels"] == [1, 2]


class Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def array_state(shape: tuple[int, ...]) -> bytes:
    """A pickle of an array whose shape is another than its content has."""
    call, arguments, state = ARRAY.__reduce__()

    class Wrong:
        def __reduce__(self) -> Any:
            return call, arguments, (state[0], shape, *state[2:])

    return pickle.dumps({b"data": Wrong()}, 2)


HOSTILE = {
    "calls": pickle.dumps(Calls(print, "code ran"), 2),
    "calls by name": b"cos\nsystem\n(S'echo code ran'\ntR.",
    "calls a submodule of numpy": b"cnumpy.testing._private.utils\nruncode\n(tR.",
    "makes a huge array": pickle.dumps(Calls(np.ndarray, (2**40,)), 2),
    "asks for another codec": b"c_codecs\nencode\n(Vx\nVzip\ntR.",
    "numbers an object by 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "numbers an object by 2^40": b"]p1099511627776\n.",
    "announces 2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a shape of 2^64": array_state((2**16,) * 4),
    "a shape of -1": array_state((-1,)),
    "a shape that is no number": array_state(("a",)),  # type: ignore[arg-type]
    "an array of objects": pickle.dumps({b"data": np.array([None])}, 2),
    "an array of floats": pickle.dumps({b"data": np.ones(3)}, 2),
    "a persistent object": b"Pid\n.",
    "an extension": b"\x82\x01.",
    "nothing": b"",
    "text": b"<html>not found</html>",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_what_is_more_than_arrays_is_refused(raw: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"^batch: truncated or corrupt \(.+\); fetch it again$"):
        read_arrays(raw, Path("batch"))
    assert "code ran" not in capfd.readouterr().out
