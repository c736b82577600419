"""Samples of formulas: constants, intervals, points x and values y that a network can learn from.

N skeletons (rows of prefix ids, L tokens, see skeletons.py), n usable ones, D variables, C constants, M points. `pool`
is a PoolConfig.
"""

import numpy as np

from data_utils.formulas.distributions import parse_distribution
from data_utils.formulas.expressions import Program, structure

SCREEN = 16  # points that sort out most unusable samples


def propose(rng, rows, alphabet, pool):
    """Give skeletons (N, L) constants and intervals for which y is usable on SCREEN points.

    Each skeleton has max_tries tries. Returns rows (n, L), constants (n, L) float32, supports (n, D, 3) and the two
    arrays of `structure`, in the order of the rows.
    """
    draw_constants = parse_distribution(pool.literal_prior)
    draw_supports = parse_distribution(pool.support_prior, support=True)
    N = len(rows)
    constants = np.zeros(rows.shape, np.float32)
    supports = np.zeros((N, len(alphabet.variables), 3))
    width = int((rows == alphabet.constant).sum(1).max(initial=0))
    size, height = structure(alphabet.arity[rows])
    pending = np.arange(N)
    for _ in range(pool.max_tries):
        program = Program(alphabet, rows[pending], shape=(size[pending], height[pending]))
        row, variable = program.uses
        if pool.independent_dimensions:
            drawn = draw_supports(rng, len(row))
        else:
            drawn = draw_supports(rng, len(pending))[row]
        constants[pending, :width] = draw_constants(rng, (len(pending), width))
        supports[pending[row], variable] = drawn
        good = usable(program(constants[pending], points(rng, drawn, SCREEN)), pool)
        pending = pending[~good]
        if not len(pending):
            break
    good = np.delete(np.arange(N), pending)
    return rows[good], constants[good], supports[good], size[good], height[good]


def make_samples(rng, proposed, M, alphabet, pool, padding="zero", select=lambda rows: slice(None)) -> dict:
    """Draw M points for each of the proposals and keep the samples whose y are usable.

    proposed: the result of `propose`. select(rows): indices of those to keep among the usable ones. padding: x of
    variables that a formula lacks, "zero" or "random". Returns a dict of skeletons (n, L), constants (n, L),
    x_tensors (n, M, D) and y_tensors (n, M, 1).
    """
    rows, constants, supports, *shape = proposed
    program = Program(alphabet, rows, shape=shape)
    values = points(rng, supports[program.uses], M)
    y = program(constants, values)
    x = np.zeros((len(rows), len(alphabet.variables), M), np.float32)
    if padding == "random":
        drawn = parse_distribution(pool.support_prior, support=True)(rng, x.shape[0] * x.shape[1])
        x[:] = points(rng, drawn, M).reshape(x.shape)
    x[program.uses] = values
    good = np.flatnonzero(usable(y, pool))
    good = good[select(rows[good])]
    transposed = np.empty((len(good), M, x.shape[1]), np.float32)
    for i in range(x.shape[1]):  # three times as fast as one copy of the transposed array
        transposed[:, :, i] = x[good, i]
    return dict(skeletons=rows[good], constants=constants[good], x_tensors=transposed, y_tensors=y[good][:, :, None])


def points(rng, supports, M):
    """Draw M numbers in each of the supports (P, 3): (P, M) float32."""
    low, high, kind = supports.T[:, :, None]
    x = uniform(rng, (len(supports), M))
    logs = np.flatnonzero(kind)  # these are log-uniform
    with np.errstate(divide="ignore"):
        width = high - low
        start = low.copy()
        width[logs] = np.log(high[logs] / low[logs])
        start[logs] = np.log(low[logs])
    x *= width.astype(np.float32)
    x += start.astype(np.float32)
    if len(logs):
        sizes = np.exp(x[logs])
        either_sign = rng.choice(np.array([-1, 1], np.float32), sizes.shape)
        x[logs] = sizes * np.where(kind[logs] == 2, either_sign, kind[logs].astype(np.float32))
    return x


def uniform(rng, shape):
    """Draw float32 numbers in [0, 1) from 23 random bits each: twice as fast as rng.random."""
    size = int(np.prod(shape))
    bits = rng.bit_generator.random_raw((size + 1) // 2).view(np.uint32)[:size].reshape(shape)
    bits >>= 9
    bits |= 0x3F800000  # the exponent of [1, 2)
    numbers = bits.view(np.float32)
    numbers -= 1
    return numbers


def usable(y, pool):
    """Return (N,) bool: which rows of y (N, M) are finite, below y_limit, and not (nearly) constant."""
    with np.errstate(invalid="ignore"):
        if pool.allow_nan:
            finite = np.isfinite(y)
            low = np.where(finite, y, np.inf).min(1)
            high = np.where(finite, y, -np.inf).max(1)
        else:
            low, high = y.min(1), y.max(1)
        inside = (low < high) & (high <= pool.y_limit) & (low >= -pool.y_limit)
        return inside & (high - low >= 1e-4 * np.maximum(high, -low))


def add_noise(rng, y, data):
    """Return y (B, M, 1) with normal noise on a share of the samples.

    data: DataConfig. noise_level is the standard deviation of the noise over that of the sample's y.
    """
    level = parse_distribution(data.noise_level)(rng, len(y)) * (rng.random(len(y)) < data.noise_probability)
    noise = rng.standard_normal(y.shape, np.float32)
    noisy = np.flatnonzero(level)
    clean = y[noisy, :, 0].astype(np.float64)
    finite = np.isfinite(clean)
    if finite.all():
        spread = np.std(clean, 1)
    else:
        spread = np.nanstd(np.where(finite, clean, np.nan), 1)
    y = y.copy()
    y[noisy] += noise[noisy] * (spread * level[noisy]).astype(np.float32)[:, None, None]
    return y
