"""Constants of many formulas fitted at once, in float64: all rows go through the same few array calls.

N formulas, R rows (formulas x restarts), M points, D variables, C constants. FVU = MSE / Var(y), 0 is perfect.
Levenberg (1944), Marquardt (1963); a + b g by variable projection (Golub and Pereyra 1973, Kaufman 1975).
"""

import numpy as np

from data_utils.errors import UsageError
from data_utils.formulas.expressions import Program

SOLVED = 1e-28  # FVU at which only rounding is left
STALLED = 1e-4  # share of the FVU below which a gain counts as none: two of those end a row
PROMISE = 1e-9  # the same of a gain that the linear model expects: one of those ends a row
STUCK = 1e7  # damping at which a step no longer moves anything
REDRAWN = 2  # times that a start without finite values is drawn again


def fit(
    alphabet, tokens, X, y, restarts, rng, *, steps=50, method="lm", affine=False, start=None, free=None, weights=None
):
    """Fit the constants of tokens (N, L) to X (M, D), y (M,) -> constants (N, C), fvu (N,), best of the restarts.

    restarts: starts per formula: ones (or `start` (N, C or more)), then numbers of any size from the Generator `rng`.
    affine: fit a + b g instead of g; the constants are then (N, 2 + C), a and b first, as `wrap` writes the formula.
    free (N, C) bool: the constants that may move. weights (M,): of the residuals; None = all alike. fvu is weighted
    like the residuals, and inf where no start gave finite values everywhere.
    Raises UsageError for an unknown method: "lm" or "bfgs".
    """
    if method not in METHODS:
        raise UsageError(f"refiner {method!r}: expected {' or '.join(METHODS)}")
    tokens, X, y = np.asarray(tokens), np.asarray(X, np.float64), np.asarray(y, np.float64)
    counts = (tokens == alphabet.constant).sum(1)
    used = np.arange(counts.max(initial=0)) < counts[:, None]
    C = used.shape[1]
    weights = np.ones(len(y)) if weights is None else weights / np.sqrt(np.mean(np.square(weights)))
    scale = spread(y, weights) or 1.0
    start = np.ones(used.shape) if start is None else np.asarray(start, np.float64)[:, :C]
    free = used if free is None else used & free[:, :C]
    owner = np.repeat(np.arange(len(tokens)), np.where(free.any(1), restarts, 1))
    first = np.diff(owner, prepend=-1) > 0
    fixed = first[:, None] | ~free[owner]
    problem = _Problem(alphabet, tokens[owner], free[owner], X, y / scale, weights, scale, affine)
    constants = np.where(fixed, start[owner], _starts(rng, fixed.shape)) * used[owner]
    for _ in range(REDRAWN):
        lost = np.flatnonzero(~first & ~np.isfinite(problem.values(constants)).all(1))
        constants[lost] = np.where(fixed[lost], constants[lost], _starts(rng, (len(lost), C)) * used[owner][lost])
    constants, fvu = METHODS[method](problem, constants, steps)
    order = np.lexsort((fvu, owner))
    best = order[first]  # rows of a formula stand together, in the old order and in the new
    constants, fvu = constants[best], fvu[best]
    if affine:
        g = _Problem(alphabet, tokens, free, X, y / scale, weights, scale, affine).values(constants)
        a, b, _, _ = _projected(g, y / scale, weights)
        constants = np.column_stack([a * scale, b * scale, constants])
    return constants, fvu


def spread(y, weights):
    """Return the weighted standard deviation of y (M,); weights (M,) have the mean square 1."""
    share = weights * weights / len(weights)
    return float(np.sqrt(share @ np.square(y - share @ y)))


def refine(
    alphabet, tokens, X, y, rng, *, method="lm", affine=False, points=64, restarts=4, more=16, most=256, weights=None
):
    """`fit` in two rounds: all formulas for 10 steps on `points` points, then the best quarter with more of everything.

    The second round starts from the constants of the first, has `more` restarts, and up to `most` points.
    """
    weights = np.ones(len(y)) if weights is None else weights
    few, many = (rng.permutation(len(y))[:n] if len(y) > n else slice(None) for n in (points, most))
    how = dict(method=method, affine=affine)
    constants, fvu = fit(alphabet, tokens, X[few], y[few], restarts, rng, steps=10, weights=weights[few], **how)
    best = np.argsort(fvu, kind="stable")[: -(-len(fvu) // 4)]
    width = 2 * affine + (tokens[best] == alphabet.constant).sum(1).max(initial=0)
    start = constants[best, 2 * affine : width]
    again = fit(alphabet, tokens[best], X[many], y[many], more, rng, start=start, weights=weights[many], **how)
    constants[best, :width], fvu[best] = again
    return constants, fvu


def wrap(prefix):
    """Prefix tokens of g -> those of a + b g, whose constants come first."""
    return ["+", "<constant>", "*", "<constant>", *prefix]


def _starts(rng, shape):
    """Half N(0, 5), half of random sign and magnitude 10^U(-0.5, 3)."""
    wide = 10 ** rng.uniform(-0.5, 3, shape) * rng.choice([-1.0, 1.0], shape)
    return np.where(rng.random(shape) < 0.5, rng.normal(0, 5, shape), wide)


def _projected(g, y, weights):
    """Return the best a + b g for y (M,) in each row of g (R, M): a (R,), b (R,), the weighted g - mean, its power."""
    share = weights * weights / len(weights)
    with np.errstate(all="ignore"):  # rows that are not finite stay so
        mean, target = g @ share, (y - share @ y) * weights
        centred = (g - mean[:, None]) * weights
        power = (centred * centred).sum(1)
        flat = ~(power > 1e-24 * np.square(g * weights).sum(1))
        power = np.where(flat, 1.0, power)
        b = np.where(flat, 0.0, centred @ target / power)
        return share @ y - b * mean, b, centred, power


class _Problem:
    """Residuals of rows, in units of the standard deviation of y, and their derivatives."""

    def __init__(self, alphabet, tokens, free, X, y, weights, scale, affine):
        self.alphabet, self.tokens, self.free = alphabet, tokens, free
        self.X, self.y, self.weights, self.scale, self.affine = X, y, weights, scale, affine
        self.program = Program(alphabet, tokens, X)

    def keep(self, rows):
        """Return the same problem for some of the rows."""
        common = self.X, self.y, self.weights, self.scale, self.affine
        return _Problem(self.alphabet, self.tokens[rows], self.free[rows], *common)

    def values(self, constants):
        g = self.program(constants)
        return g if self.affine else g / self.scale

    def residuals(self, constants):
        """constants (R, C) -> residuals (R, M), derivatives (R, C, M), FVU (R,), inf where anything isn't finite."""
        with np.errstate(all="ignore"):
            g, J = self.program.gradient(constants)
            J = np.where(np.isfinite(J) & self.free[:, :, None], J, 0.0)
            if self.affine:
                a, b, centred, power = _projected(g, self.y, self.weights)
                share = self.weights * self.weights / len(self.weights)
                full = J * self.weights
                J = (J - (J @ share)[:, :, None]) * self.weights
                J = J - (J @ centred[:, :, None]) / power[:, None, None] * centred[:, None, :]
                redundant = (J * J).sum(2) < 1e-20 * (full * full).sum(2)  # a and b do what this constant does
                J = np.where(redundant[:, :, None], 0.0, b[:, None, None] * J)
                g = a[:, None] + b[:, None] * g
            else:
                g, J = g / self.scale, J * (self.weights / self.scale)
            r = (g - self.y) * self.weights
            fvu = (r * r).mean(1)
        return r, J, np.where(np.isfinite(fvu), fvu, np.inf)


def _levenberg(problem, constants, steps):
    """(J'J + mu diag J'J) d = -J'r; mu / 3 after a success, 4 mu after a failure -> constants, fvu. First mu = 0."""
    fitted, best = constants.copy(), np.full(len(constants), np.inf)
    rows, c, eye = np.arange(len(constants)), constants, np.eye(constants.shape[1])
    r, J, fvu = problem.residuals(c)
    mu, slow = np.zeros(len(c)), np.zeros(len(c), int)
    for _ in range(steps + 1):
        done = ~(fvu > SOLVED) | (slow > 1) | (mu > STUCK) | ~np.isfinite(fvu) | ~problem.free.any(1)
        fitted[rows], best[rows] = c, fvu
        if done.all():
            break
        if 4 * done.sum() > len(done):
            left = ~done
            rows, c, r, J, fvu, mu, slow = (x[left] for x in (rows, c, r, J, fvu, mu, slow))
            problem = problem.keep(left)
        with np.errstate(all="ignore"):
            size = np.sqrt((J * J).sum(2))
            size = np.where(size > 0, size, 1.0)  # where it is inf the constant rests
            unit = J / size[:, :, None]
            square = unit @ unit.transpose(0, 2, 1) + (mu[:, None, None] + 1e-14) * eye
            empty = ~(np.einsum("rkk->rk", square) > 0.5)
            square += empty[:, :, None] * eye
            slope = (unit @ r[:, :, None])[:, :, 0]
            step = _solved(square, slope)
            step = np.where(np.isfinite(step), step, 0.0)
            trial = c - step / size
            slow = np.where((step * slope).sum(1) > PROMISE * fvu * r.shape[1], slow, 2)
        r2, J2, fvu2 = problem.residuals(trial)
        good = fvu2 < fvu
        slow = np.where(good & (fvu2 < (1 - STALLED) * fvu), np.where(slow > 1, slow, 0), slow + good)
        mu = np.where(good, mu / 3, np.maximum(4 * mu, 1e-2))
        c, fvu = np.where(good[:, None], trial, c), np.where(good, fvu2, fvu)
        r, J = np.where(good[:, None], r2, r), np.where(good[:, None, None], J2, J)
    return fitted, best


def _solved(A, b):
    """Return A^-1 b for matrices A (R, C, C), vectors b (R, C); nearly so where rounding made an A singular."""
    try:
        return np.linalg.solve(A, b[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:
        return np.linalg.solve(A + 1e-6 * np.eye(A.shape[1]), b[:, :, None])[:, :, 0]


def _slope(J, r):
    """Derivative of the FVU by the constants: (R, C)."""
    with np.errstate(all="ignore"):
        return 2 * (J @ r[:, :, None])[:, :, 0] / r.shape[1]


def _bfgs(problem, constants, steps):
    """Dense inverse Hessians of the FVU, steps halved until they gain what Armijo asks for -> constants, fvu."""
    fitted, best = constants.copy(), np.full(len(constants), np.inf)
    rows, c, eye = np.arange(len(constants)), constants, np.eye(constants.shape[1])
    r, J, fvu = problem.residuals(c)
    slope = _slope(J, r)
    H, length, slow = np.tile(eye, (len(c), 1, 1)), np.ones(len(c)), np.zeros(len(c), int)
    for _ in range(steps + 1):
        done = ~(fvu > SOLVED) | (slow > 1) | (length < 1 / STUCK) | ~np.isfinite(fvu) | ~problem.free.any(1)
        fitted[rows], best[rows] = c, fvu
        if done.all():
            break
        if 4 * done.sum() > len(done):
            left = ~done
            rows, c, slope, H, length, fvu, slow = (x[left] for x in (rows, c, slope, H, length, fvu, slow))
            problem = problem.keep(left)
        with np.errstate(all="ignore"):
            way = -(H @ slope[:, :, None])[:, :, 0]
            trial = c + length[:, None] * way
            r2, J2, fvu2 = problem.residuals(trial)
            slope2 = _slope(J2, r2)
            good = fvu2 <= fvu + 1e-4 * length * (way * slope).sum(1)
            s, t = trial - c, slope2 - slope
            curved = (s * t).sum(1)
            update = good & (curved > 1e-12 * np.sqrt((s * s).sum(1) * (t * t).sum(1)))
            V = eye - s[:, :, None] * t[:, None, :] / curved[:, None, None]
            H2 = V @ H @ V.transpose(0, 2, 1) + s[:, :, None] * s[:, None, :] / curved[:, None, None]
        H = np.where((update & np.isfinite(H2).all((1, 2)))[:, None, None], H2, H)
        slow = np.where(good & (fvu2 < (1 - STALLED) * fvu), 0, slow + good)
        length = np.where(good, 1.0, length / 4)
        c, fvu = np.where(good[:, None], trial, c), np.where(good, fvu2, fvu)
        slope = np.where(good[:, None], slope2, slope)
    return fitted, best


METHODS = {"lm": _levenberg, "bfgs": _bfgs}
