"""The choice of a backend."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_bln import BLNLSTM
from lightning_bln.kernels import gate
from lightning_bln.recurrence import backends
from tests.kernels.helpers import built

pytestmark = built


def test_without_the_library_auto_runs_the_reference_and_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(gate, "is_built", lambda: False)
    backends.warn_missing.cache_clear()
    layer = BLNLSTM(2, 3)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        layer(torch.randn(2, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 2, 2))
    with pytest.raises(ValueError, match=r"backend='cpu'.*not installed"):
        BLNLSTM(2, 3, backend="cpu")(torch.randn(2, 2, 2))
    backends.warn_missing.cache_clear()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: BLNLSTM(2, 4, proj_size=2, backend="cpu", dtype=torch.float16), "float16"),
        (lambda: BLNLSTM(2, 4, backend="cpu", dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_what_cannot_run_compiled_is_refused_by_name(layer, words) -> None:
    layer = layer()
    with pytest.raises(ValueError, match=f"backend='cpu', but .*{words}"):
        layer(torch.randn(2, 2, 2, dtype=next(layer.parameters()).dtype))
