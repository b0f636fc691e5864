"""Parts that Triton kernels of norms share: moments of a tile, their merge, normalised values and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def total(v, AXIS: tl.constexpr, ALSO: tl.constexpr = None):
    """The sum along an axis, and along a second one where it is given; both stay as axes of size one."""
    s = tl.sum(v, AXIS, keep_dims=True)
    if ALSO is not None:
        s = tl.sum(s, ALSO, keep_dims=True)
    return s


@triton.jit
def moments(v, mask, count, AXIS: tl.constexpr, ALSO: tl.constexpr = None):
    """Mean, and sum of the squared distances to it, of the ``count`` values where ``mask`` is true.

    Distances are squared, not values, and what rounding left in the first mean is taken away from both.
    """
    first = total(tl.where(mask, v, 0.0), AXIS, ALSO) / count
    distance = tl.where(mask, v - first, 0.0)
    rest = total(distance, AXIS, ALSO) / count
    squares, excess = total(distance * distance, AXIS, ALSO), rest * rest * count
    # not tl.maximum, which drops NaN on some devices
    return first + rest, tl.where(squares > excess, squares - excess, squares * 0.0)


@triton.jit
def merged(count, mean, squares, count_2, mean_2, squares_2):
    """Chan's merge of counts, means and sums of squared distances; a count may be zero."""
    both = count + count_2
    share = count_2 / tl.where(both > 0, both, 1)
    distance = mean_2 - mean
    return both, mean + distance * share, squares + squares_2 + distance * distance * (count * share)


@triton.jit
def normalized(v, mean, deviation):
    """``(v - mean) / sqrt(var + eps)``, with ``deviation`` the inverse root as from :func:`inverse`."""
    return (v - mean) * deviation


@triton.jit
def inverse(var, EPS: tl.constexpr):
    """``1 / sqrt(var + eps)``."""
    return tl.rsqrt(var + EPS)


@triton.jit
def norm_gradient(q, mean_q, mean_qx, own, deviation):
    """Gradient of one part of a norm with respect to its input.

    Args:
        q: Gradient of the normalised value.
        mean_q: Its mean over the entries that share statistics; zero where the mean is given.
        mean_qx: That of its product with the normalised value; zero where the variance is given.
        own: The value normalised by the current mean.
        deviation: The inverse root of the variance.
    """
    return (q - mean_q - own * mean_qx) * deviation
