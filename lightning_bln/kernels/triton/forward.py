"""Triton kernels of the equation on a whole array, forward and backward.

An array has samples, positions, groups and features, ``(N, P, G, F)``, anywhere in memory. A program takes a tile of
positions, one group and a tile of features, for a chunk of the samples. Where a statistic needs more than one program,
each stores its part, and the parts are merged in order: results are the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_bln.kernels.triton.helpers import inverse, merged, moments, normalized, total


@triton.jit
def place(P, G, F, BP: tl.constexpr, BN: tl.constexpr):
    """Positions, group and features of this program, and the indices of its tiles."""
    index, tiles = tl.program_id(0), tl.cdiv(F, BN)
    feature_tile, group, position_tile = index % tiles, index // tiles % G, index // (tiles * G)
    p = (position_tile * BP + tl.arange(0, BP)).to(tl.int64)
    return p, group, feature_tile * BN + tl.arange(0, BN), position_tile, feature_tile


@triton.jit
def lengths(sizes, p, N, P):
    """Samples that hold data, of each position."""
    if sizes is None:
        return tl.where(p < P, N, 0)
    else:
        return tl.load(sizes + p, mask=p < P, other=0)


@triton.jit
def batch_at(which: tl.constexpr, p, g, f, G, F, SHARED: tl.constexpr):
    """Place of a feature's mean (0) or variance (1): ``(places, 2, G, F)``."""
    q = p * 0 if SHARED else p
    return ((q * 2 + which) * G + g)[:, None] * F + f[None, :]


@triton.jit
def feature_at(which: tl.constexpr, n, p, g, N, P, G, SHARED: tl.constexpr):
    """Place of the mean or variance of a sample's features: ``(places, 2, G, rows)``."""
    if SHARED:
        return (which * G + g) * N * P + n[:, None] * P + p[None, :]
    else:
        return ((p * 2 + which) * G + g)[None, :] * N + n[:, None]


@triton.jit
def batch_statistic(
    which: tl.constexpr, own, given, p, g, f, P, G, F, USES: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr
):
    """Mean or variance of each feature, ``(1, BP, BN)``, given or the batch's own."""
    inside = (p < P)[:, None] & (f < F)[None, :]
    if (USES >> which) & 1:
        places = 1 if SHARED else P
        q = p * 0 if SHARED else p
        at = given + ((which * places + q) * G + g)[:, None] * F + f[None, :]
    else:
        at = own + batch_at(which, p, g, f, G, F, SHARED)
    return tl.load(at, mask=inside, other=which).to(ACC)[None, :, :]


@triton.jit
def feature_statistic(
    which: tl.constexpr, own, given, n, p, rows, g, N, P, G, F,
    USES: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean or variance of each sample's features, ``(BM, BP, 1)``, given or its own."""
    if (USES >> (which + 2)) & 1:
        places = 1 if SHARED else P
        q = p * 0 if SHARED else p
        at = given + 2 * places * G * F + (((which * places + q) * G + g)[None, :] + n[:, None] * 0)
    else:
        at = own + feature_at(which, n, p, g, N, P, G, SHARED)
    return tl.load(at, mask=rows, other=which).to(ACC)[:, :, None]


@triton.jit
def column(values, g, f, F, default, ACC: tl.constexpr, BN: tl.constexpr):
    """Weight or bias of each feature, ``(1, 1, BN)``."""
    if values is None:
        return tl.full((1, 1, BN), default, ACC)
    else:
        return tl.load(values + g * F + f, mask=f < F, other=0.0).to(ACC)[None, None, :]


@triton.jit
def weight_of(mixing, half: tl.constexpr, p, P, SHARED: tl.constexpr, ACC: tl.constexpr):
    """The mixing weight of the features' part (0) or the batch's (1), ``(1, BP, 1)``."""
    places = 1 if SHARED else P
    q = p * 0 if SHARED else p
    return tl.load(mixing + half * places + q, mask=p < P, other=0.0).to(ACC)[None, :, None]


@triton.jit
def norm_stats(
    x, sizes, batch, feature, N, P, G, F, sn, sp, sg, sf, CHUNK,
    NEEDS_B: tl.constexpr, NEEDS_F: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Parts of the batch's means and variances, and of those of the features."""
    p, g, f, position_tile, feature_tile = place(P, G, F, BP, BN)
    also: tl.constexpr = 1 if SHARED else None
    BQ: tl.constexpr = 1 if SHARED else BP
    limit, chunk, here = lengths(sizes, p, N, P), tl.program_id(1), f < F
    offsets = p[None, :, None] * sp + g.to(tl.int64) * sg + f[None, None, :] * sf
    count, mean, squares = tl.zeros((1, BQ, 1), ACC), tl.zeros((1, BQ, BN), ACC), tl.zeros((1, BQ, BN), ACC)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BM):
        n = (start + tl.arange(0, BM)).to(tl.int64)
        rows = n[:, None] < limit[None, :]
        mask = rows[:, :, None] & here[None, None, :]
        v = tl.load(x + n[:, None, None] * sn + offsets, mask=mask, other=0.0).to(ACC)
        if NEEDS_F:
            width = tl.minimum(BN, F - feature_tile * BN).to(ACC)
            own, own_squares = moments(v, mask, width, 2)
            inside = (n < N)[:, None] & (p < P)[None, :]
            at = feature + feature_tile.to(tl.int64) * (2 * G) * N * P
            tl.store(at + feature_at(0, n, p, g, N, P, G, SHARED), tl.reshape(own, (BM, BP)), mask=inside)
            tl.store(
                at + feature_at(1, n, p, g, N, P, G, SHARED), tl.reshape(own_squares / width, (BM, BP)), mask=inside
            )
        if NEEDS_B:
            own_count = total(rows[:, :, None].to(ACC), 0, also)
            own, own_squares = moments(v, mask, tl.where(own_count > 0, own_count, 1.0), 0, also)
            count, mean, squares = merged(count, mean, squares, own_count, own, own_squares)
    if NEEDS_B:
        var = squares / tl.where(count > 0, count, 1.0)
        if SHARED:
            part = batch + (chunk * tl.cdiv(P, BP) + position_tile).to(tl.int64) * 2 * G * F + g * F + f
            tl.store(part, tl.reshape(mean, (BN,)), mask=here)
            tl.store(part + G * F, tl.reshape(var, (BN,)), mask=here)
        else:
            part, inside = batch + chunk.to(tl.int64) * P * 2 * G * F, (p < P)[:, None] & here[None, :]
            tl.store(part + batch_at(0, p, g, f, G, F, SHARED), tl.reshape(mean, (BP, BN)), mask=inside)
            tl.store(part + batch_at(1, p, g, f, G, F, SHARED), tl.reshape(var, (BP, BN)), mask=inside)


@triton.jit
def merge_parts(
    parts, whole, sizes, PARTS, COLUMNS, WIDTH, LENGTH, CHUNK, TILES, P, BP,
    ACC: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Means and variances of whole axes, ``(places, 2, WIDTH)``, from those of parts, ``(PARTS, places, 2, WIDTH)``.

    Part ``k`` stands for up to ``CHUNK`` of ``LENGTH`` entries, times up to ``BP`` of ``P`` positions.
    """
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    inside = c < COLUMNS
    q, at = c // WIDTH, c // WIDTH * 2 * WIDTH + c % WIDTH
    length = tl.where(inside, LENGTH, 0) if sizes is None else tl.load(sizes + q, mask=inside, other=0)
    count, mean, squares = tl.zeros((1, BC), ACC), tl.zeros((1, BC), ACC), tl.zeros((1, BC), ACC)
    for first in range(0, PARTS, BK):
        k = first + tl.arange(0, BK)
        of_length = tl.minimum(tl.maximum(length[None, :] - (k // TILES * CHUNK)[:, None], 0), CHUNK)
        of_positions = tl.minimum(tl.maximum(P - k % TILES * BP, 0), BP)
        own = tl.where((k < PARTS)[:, None], of_length * of_positions[:, None], 0).to(ACC)
        address, mask = (
            parts + k[:, None].to(tl.int64) * 2 * COLUMNS + at[None, :],
            (k < PARTS)[:, None] & inside[None, :],
        )
        means, variances = tl.load(address, mask=mask, other=0.0), tl.load(address + WIDTH, mask=mask, other=0.0)
        number = total(own, 0)
        middle = total(means * own, 0) / tl.where(number > 0, number, 1.0)
        distance = means - middle
        own_squares = total(own * (variances + distance * distance), 0)
        count, mean, squares = merged(count, mean, squares, number, middle, own_squares)
    tl.store(whole + at, tl.reshape(mean, (BC,)), mask=inside)
    tl.store(whole + at + WIDTH, tl.reshape(squares / tl.where(count > 0, count, 1.0), (BC,)), mask=inside)


@triton.jit
def norm_apply(
    x, y, weight, bias, mixing, given, sizes, batch, feature, N, P, G, F, sn, sp, sg, sf, CHUNK,
    HAS_B: tl.constexpr, HAS_F: tl.constexpr, USES: tl.constexpr, SHARED: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The normalised input; zero where rows hold no data."""
    p, g, f, _, _ = place(P, G, F, BP, BN)
    limit, chunk, here = lengths(sizes, p, N, P), tl.program_id(1), f < F
    offsets = p[None, :, None] * sp + g.to(tl.int64) * sg + f[None, None, :] * sf
    gain, shift = column(weight, g, f, F, 1.0, ACC, BN) * SCALE, column(bias, g, f, F, 0.0, ACC, BN)
    if HAS_B:
        batch_mean = batch_statistic(0, batch, given, p, g, f, P, G, F, USES, SHARED, ACC)
        factor = inverse(batch_statistic(1, batch, given, p, g, f, P, G, F, USES, SHARED, ACC), EPS)
        factor = factor * weight_of(mixing, 1, p, P, SHARED, ACC)
    if HAS_F:
        w_feature = weight_of(mixing, 0, p, P, SHARED, ACC)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), BM):
        n = (start + tl.arange(0, BM)).to(tl.int64)
        rows = n[:, None] < limit[None, :]
        mask = rows[:, :, None] & here[None, None, :]
        inside = ((n < N)[:, None] & (p < P)[None, :])[:, :, None] & here[None, None, :]
        at = n[:, None, None] * sn + offsets
        v = tl.load(x + at, mask=mask, other=0.0).to(ACC)
        result = tl.zeros((BM, BP, BN), ACC)
        if HAS_F:
            mean = feature_statistic(0, feature, given, n, p, rows, g, N, P, G, F, USES, SHARED, ACC)
            var = feature_statistic(1, feature, given, n, p, rows, g, N, P, G, F, USES, SHARED, ACC)
            result = normalized(v, mean, inverse(var, EPS) * w_feature)
        if HAS_B:
            result = result + normalized(v, batch_mean, factor)
        result = tl.where(mask, result * gain + shift, 0.0)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)
