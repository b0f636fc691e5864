"""Matrix products of the C++ library against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_bln.kernels import library
from lightning_bln.kernels.matmul import linear, multiply

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the C++ kernels are not built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 31, 300), (50, 65, 17), (400, 70, 513)])
@pytest.mark.parametrize("threads", [1, 5])
def test_a_product_is_torchs_whatever_the_strides(shape, dtype, threads, monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.kernels.matmul.WORK_OF_A_THREAD", 1)
    rows, columns, depth = shape
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for a in (torch.randn(rows, 2 * depth, dtype=dtype)[:, depth:], torch.randn(depth, rows, dtype=dtype).t()):
            for b in (torch.randn(depth, columns, dtype=dtype), torch.randn(columns, depth, dtype=dtype).t()):
                bias = torch.randn(columns, dtype=dtype)
                torch.testing.assert_close(multiply(a, b), a @ b, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(multiply(a, b, bias), a @ b + bias, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_map_has_gradients_of_any_order(biased) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3), (4, 3), (4,)))
    inputs = (x, weight, bias) if biased else (x, weight)
    torch.testing.assert_close(
        linear(x, weight, bias if biased else None), F.linear(x, weight, bias if biased else None)
    )
    assert torch.autograd.gradcheck(lambda *t: linear(*t, *(() if biased else (None,))), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: linear(*t, *(() if biased else (None,))), inputs)
