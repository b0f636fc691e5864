"""The library of kernels: its variants, and the layout of structures that it shares with Python."""

from __future__ import annotations

import ctypes
import warnings

import pytest
import torch

from lightning_bln.kernels import available, library
from lightning_bln.kernels.library import VARIANTS, DenseArgs, NormArgs, find, layout_hash, open_library
from tests.kernels.helpers import LAYERS, built, compare

pytestmark = built
ENDS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 64, 65)
"""Widths on both sides of those of vectors and of panels."""
FIELDS = list(DenseArgs._fields_)


def test_available_names_what_runs() -> None:
    there = available()
    assert there["reference"]
    assert there["cpu"] in ("avx512", "avx2", "baseline")


@pytest.mark.parametrize("other", list(VARIANTS.values()))
def test_every_variant_that_this_processor_runs(other, monkeypatch) -> None:
    """The widest is what all other tests run on."""
    order = list(VARIANTS.values())
    if order.index(other) < order.index(available()["cpu"]) or find(other) is None:
        pytest.skip(f"no {other} here")
    opened = open_library(other)
    monkeypatch.setattr(library, "load", lambda: opened)
    for dtype in (torch.float64, torch.float32):
        for kind in LAYERS:
            compare(kind, torch.randn(4, 14, 21, dtype=dtype), 14, (21, 35))
        for units in ENDS:
            compare("lstm", torch.randn(3, 6, units, dtype=dtype), 6, (units, units + 1))


def with_fields(fields: list[tuple[str, type]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a copy of ``DenseArgs`` that has these fields in its place."""
    copy = type("DenseArgs", (ctypes.Structure,), {"_fields_": fields})
    structures = tuple(copy if one is DenseArgs else one for one in library.STRUCTURES)
    monkeypatch.setattr(library, "STRUCTURES", structures)


@pytest.mark.parametrize(
    "fields",
    [
        [FIELDS[1], FIELDS[0], *FIELDS[2:]],
        [("lines", FIELDS[0][1]), *FIELDS[1:]],
        [(FIELDS[0][0], ctypes.c_double), *FIELDS[1:]],
        [*FIELDS[:-1], ("norm", type("OtherArgs", (ctypes.Structure,), {"_fields_": NormArgs._fields_}))],
        FIELDS[1:],
    ],
    ids=["order", "name", "type", "structure", "fewer"],
)
def test_a_library_of_another_layout_is_refused(fields, monkeypatch) -> None:
    before = layout_hash()
    with_fields(fields, monkeypatch)
    assert layout_hash() != before
    with pytest.warns(UserWarning, match="was built from other sources than this package's; install it again"):
        assert open_library(available()["cpu"]) is None


def test_a_library_of_the_same_layout_is_taken(monkeypatch) -> None:
    before = layout_hash()
    with_fields(FIELDS, monkeypatch)
    assert layout_hash() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_library(available()["cpu"]) is not None


def test_a_library_that_tells_no_layout_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    with pytest.warns(UserWarning, match="was built from other sources than this package's; install it again"):
        assert open_library(available()["cpu"]) is None
