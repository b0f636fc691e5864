"""Triton kernels of the equation's gradient: sums over rows and over features, then the gradient of the input."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_bln.kernels.triton.forward import (
    batch_statistic,
    column,
    feature_at,
    feature_statistic,
    lengths,
    place,
    weight_of,
)
from lightning_bln.kernels.triton.helpers import inverse, norm_gradient, normalized, total

CURRENT = tl.constexpr(0)
"""Uses of no given statistic: a variance is about the current mean, whichever mean was used."""


@triton.jit
def sum_at(which: tl.constexpr, p, g, f, P, G, F, SHARED: tl.constexpr):
    """Place of one of the sums of a feature: ``(3, places, G, F)``."""
    places = 1 if SHARED else P
    q = p * 0 if SHARED else p
    return ((which * places + q) * G + g)[:, None] * F + f[None, :]


@triton.jit
def norm_sums(
    x, grad, weight, mixing, given, sizes, batch, feature, columns, sums, N, P, G, F, sn, sp, sg, sf, CHUNK,
    HAS_B: tl.constexpr, HAS_F: tl.constexpr, USES: tl.constexpr, SHARED: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, NEEDS_COLUMNS: tl.constexpr, NEEDS_F: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Parts of the sums that gradients are made of.

    Of each feature over its rows: the output's gradient, its products with the batch's part and with both parts as
    they are mixed. Of each sample's features: the gradient times the weight, and the product with the features' part.
    """
    p, g, f, position_tile, feature_tile = place(P, G, F, BP, BN)
    also: tl.constexpr = 1 if SHARED else None
    BQ: tl.constexpr = 1 if SHARED else BP
    limit, chunk, here = lengths(sizes, p, N, P), tl.program_id(1), f < F
    offsets = p[None, :, None] * sp + g.to(tl.int64) * sg + f[None, None, :] * sf
    gain = column(weight, g, f, F, 1.0, ACC, BN) * SCALE
    if HAS_B:
        mean_b = batch_statistic(0, batch, given, p, g, f, P, G, F, USES, SHARED, ACC)
        factor = inverse(batch_statistic(1, batch, given, p, g, f, P, G, F, USES, SHARED, ACC), EPS)
        w_batch = weight_of(mixing, 1, p, P, SHARED, ACC)
    if HAS_F:
        w_feature = weight_of(mixing, 0, p, P, SHARED, ACC)
    plain, batched, mixed = tl.zeros((1, BQ, BN), ACC), tl.zeros((1, BQ, BN), ACC), tl.zeros((1, BQ, BN), ACC)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BM):
        n = (start + tl.arange(0, BM)).to(tl.int64)
        rows = n[:, None] < limit[None, :]
        mask = rows[:, :, None] & here[None, None, :]
        at = n[:, None, None] * sn + offsets
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        d = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        both = tl.zeros((BM, BP, BN), ACC)
        if HAS_B:
            part = tl.where(mask, normalized(v, mean_b, factor), 0.0)
            batched += total(d * part, 0, also)
            both = part * w_batch
        if HAS_F:
            mean = feature_statistic(0, feature, given, n, p, rows, g, N, P, G, F, USES, SHARED, ACC)
            var = feature_statistic(1, feature, given, n, p, rows, g, N, P, G, F, USES, SHARED, ACC)
            part = tl.where(mask, normalized(v, mean, inverse(var, EPS)), 0.0)
            both = both + part * w_feature
            if NEEDS_F:
                address, q = sums + feature_tile.to(tl.int64) * (2 * G) * N * P, d * gain
                one, two = tl.reshape(total(q, 2), (BM, BP)), tl.reshape(total(q * part, 2), (BM, BP))
                tl.store(address + feature_at(0, n, p, g, N, P, G, SHARED), one, mask=rows)
                tl.store(address + feature_at(1, n, p, g, N, P, G, SHARED), two, mask=rows)
        if NEEDS_COLUMNS:
            plain += total(d, 0, also)
            mixed += total(d * both, 0, also)
    if NEEDS_COLUMNS:
        places = 1 if SHARED else P
        part = chunk * tl.cdiv(P, BP) + position_tile if SHARED else chunk
        q = tl.zeros((1,), tl.int64) if SHARED else p
        address, inside = columns + part.to(tl.int64) * 3 * places * G * F, (q < places)[:, None] & here[None, :]
        tl.store(address + sum_at(0, q, g, f, P, G, F, SHARED), tl.reshape(plain, (BQ, BN)), mask=inside)
        tl.store(address + sum_at(1, q, g, f, P, G, F, SHARED), tl.reshape(batched, (BQ, BN)), mask=inside)
        tl.store(address + sum_at(2, q, g, f, P, G, F, SHARED), tl.reshape(mixed, (BQ, BN)), mask=inside)


@triton.jit
def norm_backward(
    x, grad, grad_x, weight, mixing, given, sizes, batch, feature, columns, sums, N, P, G, F, sn, sp, sg, sf, CHUNK,
    HAS_B: tl.constexpr, HAS_F: tl.constexpr, USES: tl.constexpr, SHARED: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the input; zero where rows hold no data."""
    p, g, f, _, _ = place(P, G, F, BP, BN)
    limit, chunk, here = lengths(sizes, p, N, P), tl.program_id(1), f < F
    offsets = p[None, :, None] * sp + g.to(tl.int64) * sg + f[None, None, :] * sf
    gain = column(weight, g, f, F, 1.0, ACC, BN) * SCALE
    if HAS_B:
        w_batch = weight_of(mixing, 1, p, P, SHARED, ACC)
        factor = inverse(batch_statistic(1, batch, given, p, g, f, P, G, F, USES, SHARED, ACC), EPS)
        entries = N * P if SHARED else tl.where(limit > 0, limit, 1)[None, :, None]
        known, share = (p < P)[:, None] & here[None, :], gain / entries
        first, second = columns + sum_at(0, p, g, f, P, G, F, SHARED), columns + sum_at(1, p, g, f, P, G, F, SHARED)
        mean_q, mean_qx, mean_b = 0.0, 0.0, 0.0
        if (USES & 1) == 0:
            mean_q = tl.load(first, mask=known, other=0.0)[None, :, :] * share
        if (USES & 2) == 0:
            mean_qx = tl.load(second, mask=known, other=0.0)[None, :, :] * share
            mean_b = batch_statistic(0, batch, given, p, g, f, P, G, F, CURRENT, SHARED, ACC)
    if HAS_F:
        w_feature = weight_of(mixing, 0, p, P, SHARED, ACC)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BM):
        n = (start + tl.arange(0, BM)).to(tl.int64)
        rows = n[:, None] < limit[None, :]
        mask = rows[:, :, None] & here[None, None, :]
        at = n[:, None, None] * sn + offsets
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        q = tl.load(grad + at, mask=mask, other=0.0).to(ACC) * gain
        result = tl.zeros((BM, BP, BN), ACC)
        if HAS_F:
            var = feature_statistic(1, feature, given, n, p, rows, g, N, P, G, F, USES, SHARED, ACC)
            deviation, own, of_q, of_qx = inverse(var, EPS), 0.0, 0.0, 0.0
            if (USES & 4) == 0:
                of_q = tl.load(sums + feature_at(0, n, p, g, N, P, G, SHARED), mask=rows, other=0.0)[:, :, None] / F
            if (USES & 8) == 0:
                of_qx = tl.load(sums + feature_at(1, n, p, g, N, P, G, SHARED), mask=rows, other=0.0)[:, :, None] / F
                mean = feature_statistic(0, feature, given, n, p, rows, g, N, P, G, F, CURRENT, SHARED, ACC)
                own = normalized(v, mean, deviation)
            result = w_feature * norm_gradient(q, of_q, of_qx, own, deviation)
        if HAS_B:
            own_b = 0.0
            if (USES & 2) == 0:
                own_b = normalized(v, mean_b, factor)
            result = result + w_batch * norm_gradient(q, mean_q, mean_qx, own_b, factor)
        inside = ((n < N)[:, None] & (p < P)[None, :])[:, :, None] & here[None, None, :]
        tl.store(grad_x + at, tl.where(mask, result, 0.0).to(grad_x.dtype.element_ty), mask=inside)
