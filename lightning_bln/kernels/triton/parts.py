"""Parts of generated recurrent kernels: a program of the grid owns some units, all their gates, of all samples.

Wide tiles are ``(samples, units, gates)``, the gates filled up to a power of two. Statistics of features have one
column for each gate, or one for all where they are joint.
"""

import triton
import triton.language as tl


@triton.jit
def barrier(flag, target):
    """Wait until all programs have come here: what they wrote before can be read."""
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def tanh(x):
    """The hyperbolic tangent, by a function that the interpreter has."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def softplus(x):
    """``log(1 + exp(x))``."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def hardsigmoid(x):
    """A line from zero at -3 to one at 3."""
    return tl.minimum(tl.maximum(x * (1.0 / 6.0) + 0.5, 0.0), 1.0)


@triton.jit
def multiplied(rows, weights, total, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """``total + rows weights``; with ``WIDE`` the operands in the dtype of the sum, as the interpreter needs them."""
    if WIDE:
        rows, weights = rows.to(total.dtype), weights.to(total.dtype)
    else:
        rows = rows.to(weights.dtype)
    return tl.dot(rows, weights, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def pick(x, k: tl.constexpr, GATES: tl.constexpr):
    """One gate of a wide tile."""
    if GATES == 1:
        return tl.reshape(x, (x.shape[0], x.shape[1]))
    else:
        return tl.sum(tl.where((tl.arange(0, GATES) == k)[None, None, :], x, 0.0), 2)


@triton.jit
def put(x, k: tl.constexpr, GATES: tl.constexpr):
    """A wide tile of zeros but for one gate."""
    if GATES == 1:
        return tl.reshape(x, (x.shape[0], x.shape[1], 1))
    else:
        return tl.where((tl.arange(0, GATES) == k)[None, None, :], x[:, :, None], 0.0)


@triton.jit
def over_samples(x, rows, count):
    """Mean and variance over the rows of a wide tile, ``(units, gates)``."""
    mean = tl.sum(tl.where(rows[:, None, None], x, 0.0), 0) / count
    distance = tl.where(rows[:, None, None], x - mean[None, :, :], 0.0)
    return mean, tl.sum(distance * distance, 0) / count


@triton.jit
def over_features(x, JOINT: tl.constexpr):
    """The sum over a wide tile's units, and over its gates where they are joint, ``(samples, columns)``."""
    if JOINT:
        return tl.sum(tl.sum(x, 2), 1)[:, None]
    else:
        return tl.sum(x, 1)


@triton.jit
def leave(place, first, second, n, rows, pid, B, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store this program's part of two sums over features where the others find it."""
    at = place + (pid * B + n[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(at, first, mask=rows[:, None])
    tl.store(at + PROGRAMS * B * COLUMNS, second, mask=rows[:, None])


@triton.jit
def leave_moments(
    place, x, real, size, n, rows, pid, B, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr, JOINT: tl.constexpr
):
    """Leave the mean over this program's features, of which there are ``size``, and the sum of squared distances."""
    mean = over_features(tl.where(real[None, :, :], x, 0.0), JOINT) / size
    distance = tl.where(real[None, :, :], x - mean[:, None, :], 0.0)
    leave(place, mean, over_features(distance * distance, JOINT), n, rows, pid, B, PROGRAMS, COLUMNS)


@triton.jit
def all_parts(place, n, rows, B, PROGRAMS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr):
    """Both sums of all programs, ``(programs, samples, columns)``, zero beyond."""
    q = tl.arange(0, ROOM)
    at = place + (q[:, None, None] * B + n[None, :, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    mask = (q < PROGRAMS)[:, None, None] & rows[None, :, None]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + PROGRAMS * B * COLUMNS, mask=mask, other=0.0)


@triton.jit
def merged_moments(
    place, n, rows, B, H: tl.constexpr, U: tl.constexpr, PROGRAMS: tl.constexpr, ROOM: tl.constexpr,
    COLUMNS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """Mean and variance over all features, ``(samples, columns)``; a column takes in ``TIMES`` gates."""
    mean, spread = all_parts(place, n, rows, B, PROGRAMS, ROOM, COLUMNS)
    q = tl.arange(0, ROOM)
    count = (tl.where(q < PROGRAMS, tl.minimum(U, H - q * U), 0) * TIMES).to(mean.dtype)[:, None, None]
    whole = tl.sum(mean * count, 0) / (H * TIMES)
    distance = mean - whole[None, :, :]
    return whole, tl.sum(spread + count * distance * distance, 0) / (H * TIMES)


@triton.jit
def summed(place, n, rows, B, features, PROGRAMS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr):
    """Means over all features of two sums, ``(samples, columns)``."""
    first, second = all_parts(place, n, rows, B, PROGRAMS, ROOM, COLUMNS)
    return tl.sum(first, 0) / features, tl.sum(second, 0) / features


@triton.jit
def of_batch(x, mean, var, eps):
    """A wide tile standardised by moments over samples, and the inverse deviations."""
    inverse = tl.rsqrt(var + eps)[None, :, :]
    return (x - mean[None, :, :]) * inverse, inverse


@triton.jit
def of_features(x, mean, var, eps):
    """A wide tile standardised by moments over features, and the inverse deviations."""
    inverse = tl.rsqrt(var + eps)[:, None, :]
    return (x - mean[:, None, :]) * inverse, inverse


@triton.jit
def batch_gradient(q, standardised, inverse, rows, count):
    """The gradient of a wide tile from that of its values standardised over samples."""
    q = tl.where(rows[:, None, None], q, 0.0)
    mean, along = tl.sum(q, 0) / count, tl.sum(q * standardised, 0) / count
    return inverse * (q - mean[None, :, :] - standardised * along[None, :, :])


@triton.jit
def feature_gradient(q, standardised, inverse, mean, along):
    """The same over features, by the means that :func:`summed` gives."""
    return inverse * (q - mean[:, None, :] - standardised * along[:, None, :])


@triton.jit
def store_batch(place, mean, var, t, columns, real, D: tl.constexpr):
    """Keep moments over samples, ``(T, 2, D)``."""
    tl.store(place + t * 2 * D + columns, mean, mask=real)
    tl.store(place + t * 2 * D + D + columns, var, mask=real)


@triton.jit
def load_batch(place, t, columns, real, D: tl.constexpr):
    """Moments over samples of a step."""
    mean = tl.load(place + t * 2 * D + columns, mask=real, other=0.0)
    return mean, tl.load(place + t * 2 * D + D + columns, mask=real, other=1.0)


@triton.jit
def store_features(place, mean, var, t, n, rows, B, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep moments over features, ``(T, 2, groups, B)``."""
    g = tl.arange(0, COLUMNS)[None, :]
    at, mask = place + t * 2 * GROUPS * B + g * B + n[:, None], rows[:, None] & (g < GROUPS)
    tl.store(at, mean, mask=mask)
    tl.store(at + GROUPS * B, var, mask=mask)


@triton.jit
def load_features(place, t, n, rows, B, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments over features of a step."""
    g = tl.arange(0, COLUMNS)[None, :]
    at, mask = place + t * 2 * GROUPS * B + g * B + n[:, None], rows[:, None] & (g < GROUPS)
    return tl.load(at, mask=mask, other=0.0), tl.load(at + GROUPS * B, mask=mask, other=1.0)


@triton.jit
def given_features(place, t, n, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """A statistic of the population that is one number for each group, for all samples."""
    g = tl.arange(0, COLUMNS)[None, :]
    return tl.load(place + t * GROUPS + g + 0 * n[:, None], mask=(g < GROUPS) & (n[:, None] >= 0), other=1.0)
