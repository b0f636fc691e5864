"""Matrix products on the C++ kernels, and a linear map made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_bln._torch import is_autocast_enabled
from lightning_bln.kernels.gate import admit, checked, reason_against
from lightning_bln.kernels.library import ProductArgs, call, pointer

WORK_OF_A_THREAD = 2**21
"""Multiplications that make it worth starting one more thread."""


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` without gradients, for matrices of one dtype with any strides.

    Example:
        >>> multiply(torch.ones(2, 3), torch.ones(4, 3).t())
        tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]])
    """
    (rows, depth), columns, dtype = a.shape, b.shape[-1], a.dtype
    is_one_kind = b.dtype == dtype and b.shape[0] == depth and (bias is None or bias.dtype == dtype)
    if not is_one_kind or reason_against(dtype, (a, b, bias)) is not None:
        return a @ b if bias is None else torch.addmm(bias, a, b)
    a, b = checked("a", a, a.shape, dtype), checked("b", b, b.shape, dtype)
    bias = admit("bias", bias, (columns,), dtype)
    result = a.new_empty(rows, columns)
    args = ProductArgs()
    args.rows, args.columns, args.depth = rows, columns, depth
    args.threads = max(1, min(torch.get_num_threads(), rows * columns * depth // WORK_OF_A_THREAD))
    args.a, args.a_row, args.a_column = pointer(a), *a.stride()
    args.b, args.b_row, args.b_column = pointer(b), *b.stride()
    args.c, args.c_row = pointer(result), columns
    args.bias = pointer(bias)
    call("product", args, a.dtype)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`torch.nn.functional.linear`, fused where the kernels take ``x`` and ``weight``."""
    if (
        not torch.compiler.is_compiling()
        and weight.dtype == x.dtype
        and not is_autocast_enabled("cpu")
        and reason_against(x.dtype, (x, weight, bias)) is None
    ):
        return Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(torch.autograd.Function):
    """``x weight^T + bias``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply all rows of ``x``."""
        ctx.save_for_backward(x, weight)
        return multiply(x.reshape(-1, x.shape[-1]), weight.t(), bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what needs one; with ``create_graph`` by torch's product, which has a gradient itself."""
        x, weight = (value.to(gradient.dtype) for value in ctx.saved_tensors)  # hooks may have changed theirs
        rows = gradient.reshape(-1, gradient.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        product = torch.mm if torch.is_grad_enabled() else multiply
        return (
            product(rows, weight).view(x.shape) if needs_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
