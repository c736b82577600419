"""The score of a formula in bits: how long a message with the formula and what it leaves of the data would be.

bits = operators and variables + constants + residuals (minimum description length, Rissanen 1978). M points, C free
constants, FVU = MSE / Var(y).

- Operators cost what Guimera et al. ("A Bayesian machine scientist", Science Advances 6, 2020) counted in named
  equations; variables the logarithm of how many there are; functions within functions cost extra. All this counts
  0.7 times, and residuals as if there were two points more. Both factors were chosen on tables of few rows.
- A constant costs the digits that the data can tell, log2(|c| / its standard error), as in Bartlett et al.
  (arXiv 2211.11461), less what constants share; a plain number only its few digits.
- Residuals are normal with a standard deviation that is the same for all points, or in proportion to y, whichever is
  shorter, and never below the rounding of y.
"""

import math
from collections import namedtuple

import numpy as np

from data_utils.formulas.expressions import LITERALS, OPERATORS, Program, padded, padded_columns
from data_utils.formulas.fit import fit, spread
from data_utils.formulas.simplify import NotReal, simplify

NATS = {"+": 5.8, "-": 3.4, "*": 5.0, "/": 5.9, "pow": 6.5, "pow2": 3.3, "pow3": 6.0, "exp": 4.8, "log": 4.7,
        "pow1_2": 4.8, "sin": 6.0, "cos": 5.5, "tan": 8.1, "sinh": 8.0, "cosh": 8.1, "tanh": 7.8, "abs": 6.3,
        "inv": 5.9, "neg": 3.4, "pow4": 6.5, "pow5": 7.0}  # fmt: skip
RARE = 8.0  # nats of an operator that the paper does not count
NESTED = 8.0  # bits of a function inside another
STRUCTURE = 0.7  # weight of these bits: with all of them, few points with noise were explained by their mean
PRIOR_POINTS = 2  # by which residuals count more: a measured table has small errors rather than large ones
TRIGONOMETRIC = ("sin", "cos", "tan")
FUNCTIONS = {*TRIGONOMETRIC, "exp", "log", "sinh", "cosh", "tanh", "asin", "acos", "atan", "asinh", "acosh", "atanh"}
PRECISION, ROUNDING = 1e-12, 1e-16  # of y where nothing is known: of each value, and of the largest (float64)
LEAST_POWER = 0.02  # exponents nearer to 0 make a power x^c a logarithm, 1 + c log x
STILL = 1e-9  # share of its size by which the base of c^x moves at least, if a column is in it
TOO_FAR = 0.5  # residuals in proportion to y above this are none
SIGN = 1.0  # bits of a constant besides its digits
MOST_DIGITS = 60  # bits of the digits of a constant, at most
DIGIT = math.log2(10)
SNAPS = 6  # plain numbers that are tried at a time

# a formula, its score, and how it was fitted: `free` says which constants are no plain numbers, `relative` which
# residuals were assumed
Ranked = namedtuple("Ranked", "prefix constants bits fvu length relative free")


class Data:
    """Points with what is known of their noise: X (M, D), y (M,), sigma (M,) or None, half (M,) a rounding step of y.

    weights[False] are those of residuals of one size, weights[True] of residuals in proportion to y, where y has one
    sign. Both have the mean square 1; one entry is None where it does not apply.
    """

    def __init__(self, X, y, sigma=None, half=None):
        self.X, self.y = np.asarray(X, float), np.asarray(y, float)
        self.n, self.D = self.X.shape
        size = np.abs(self.y)
        self.floor = PRECISION * size + ROUNDING * size.max()
        if half is not None:
            self.floor = np.maximum(self.floor, np.asarray(half, float) / math.sqrt(3))
        constant = np.ones(self.n) if sigma is None else 1 / np.asarray(sigma, float)
        self.weights = {False: constant / np.sqrt(np.mean(constant**2)), True: None}
        if sigma is None and size.min() > 0 and (np.sign(self.y) == np.sign(self.y[0])).all():
            self.weights[True] = (1 / size) / np.sqrt(np.mean((1 / size) ** 2))

    def subset(self, rows):
        """Return the same data for some of the rows."""
        part = object.__new__(Data)
        part.__dict__ |= self.__dict__
        part.X, part.y, part.floor, part.n = self.X[rows], self.y[rows], self.floor[rows], len(self.X[rows])
        part.weights = {
            relative: None if w is None else w[rows] / np.sqrt(np.mean(w[rows] ** 2))
            for relative, w in self.weights.items()
        }
        return part

    def deviation(self, fvu, free, relative):
        """Return the standard deviation of weighted residuals with this FVU and so many free constants."""
        weights = self.weights[relative]
        variance = fvu * spread(self.y, weights) ** 2 * self.n / max(self.n - free, 0.5)
        return math.sqrt(max(variance, np.median(self.floor * weights) ** 2))  # some values lack their last zeros

    def residual_bits(self, fvu, free, relative):
        """Return the bits of residuals with this weighted FVU; inf where there are as many constants as points."""
        if free >= self.n or not fvu < math.inf:
            return math.inf
        deviation, weights = self.deviation(fvu, free, relative), self.weights[relative]
        if relative and deviation > TOO_FAR * np.mean(weights * np.abs(self.y)):
            return math.inf
        return self._counted(self.n * math.log2(deviation) - np.log2(weights).sum())

    def _counted(self, bits):
        """Return bits of residuals as if there were PRIOR_POINTS more, with a prior of 1 / deviation^3."""
        return bits * (1 + PRIOR_POINTS / self.n)

    def exact_bits(self, values, free, relative):
        """Return the bits of the residuals of values (M,); relative ones are in proportion to the values, not to y."""
        if not relative:
            weights = self.weights[False]
            with np.errstate(over="ignore"):
                share = np.mean(np.square((values - self.y) * weights)) / max(spread(self.y, weights) ** 2, 1e-300)
            return self.residual_bits(float(share), free, False)
        size = np.abs(values)
        if free >= self.n or not (values * self.y > 0).all():
            return math.inf
        with np.errstate(over="ignore"):
            variance = np.square((values - self.y) / size).sum() / max(self.n - free, 0.5)
            variance = max(variance, np.median(self.floor / size) ** 2)
        if variance > TOO_FAR**2:
            return math.inf
        return self._counted(self.n / 2 * math.log2(variance) + np.log2(size).sum())


def structure_bits(prefix, D):
    """Return the bits of the operators and variables of prefix tokens."""
    total, inside, ends = 0.0, [], []  # functions around the token, and where each ends
    need = 1
    for token in prefix:
        while ends and need < ends[-1]:
            ends.pop(), inside.pop()
        if token in OPERATORS:
            total += NATS.get(token, RARE) / math.log(2)
            if token in FUNCTIONS:
                total += NESTED * (1 + (token in TRIGONOMETRIC)) * len(inside)
                ends.append(need)
                inside.append(token)
            need += OPERATORS[token].arity - 1
        else:
            need -= 1
            if token not in LITERALS and token != "<constant>":
                total += 1 + math.log2(D)
    return STRUCTURE * total


def plain_bits(value):
    """Return the bits of a number written with as few digits as it has, or as thirds or a multiple of pi."""
    if value == 0:
        return SIGN
    text = f"{value:.9e}"
    digits = len(text.partition("e")[0].lstrip("-").replace(".", "").rstrip("0"))
    options = [DIGIT * digits] if abs(float(text) - value) <= 1e-12 * abs(value) else []
    for unit, extra in ((3.0, 2.0), (12 / math.pi, 6.0)):
        numerator = abs(value) * unit
        if 0.5 < numerator < 30 and abs(numerator - round(numerator)) < 1e-9:
            options.append(math.log2(1 + numerator) + extra)
    return SIGN + min(options, default=math.inf)


def plain_numbers(value, error):
    """Return plain numbers near a constant, the plainest first: within two standard errors, 0 and 1 within four."""
    value, error = float(value), float(error)
    near = {*(round(value * k) / k for k in (1, 2, 3, 4))}
    for k in (1, 2, 3, 4):
        if abs(value) * k < 5 * math.pi:
            near.add(round(value * k / math.pi) * math.pi / k)
    for digits in (1, 2, 3):
        near.add(float(f"{value:.{digits - 1}e}"))
    close = {v for v in near if abs(v - value) <= 2 * error} | {
        v for v in (0.0, 1.0, -1.0) if abs(v - value) <= 4 * error
    }
    return sorted(close, key=lambda v: (plain_bits(v), abs(v - value)))


def admissible(prefix, constants, X):
    """Whether a formula is one that data at X (M, D) can support.

    Refused: a phase of sin, cos or tan that moves by more than pi between neighbouring points; tan beyond a pole; a
    power with a variable exponent and a base that may be negative, or that has variables and hardly moves; one with an
    exponent so near 0 that it is a logarithm.
    """
    if not any(token in TRIGONOMETRIC or token == "pow" for token in prefix):
        return True
    order = [X[:, j].argsort() for j in range(X.shape[1])]
    numbers, tokens = iter(constants), iter(prefix)
    good = True

    def read():
        """Return the values (M,) of the next subtree and the set of its variables."""
        nonlocal good
        token = next(tokens)
        if token == "<constant>":
            return np.full(len(X), next(numbers)), set()
        if token in LITERALS:
            return np.full(len(X), LITERALS[token]), set()
        if token not in OPERATORS:
            return X[:, int(token[1:]) - 1], {int(token[1:]) - 1}
        operands = [read() for _ in range(OPERATORS[token].arity)]
        variables = set().union(*(names for _, names in operands))
        phase, names = operands[0]
        if token in TRIGONOMETRIC and variables:
            if len(variables) == 1:
                (j,) = variables
                jump = np.abs(np.diff(phase[order[j]])).max(initial=0)
            else:
                jump = np.abs(np.diff(np.sort(phase))).max(initial=0)
            good &= bool(jump <= math.pi)
            if token == "tan":
                good &= bool(np.ptp(np.floor(phase / math.pi - 0.5)) == 0)
        if token == "pow" and operands[1][1]:
            still = names and np.ptp(phase) < STILL * np.abs(phase).max()
            good &= bool((phase > 0).all() and not still)
        elif token == "pow" and names:
            good &= bool(abs(operands[1][0][0]) >= LEAST_POWER)
        out = np.empty(len(X))
        OPERATORS[token].function(*(values for values, _ in operands), out)
        return out, variables

    with np.errstate(all="ignore"):
        read()
    return good


def constant_bits(constants, J, weights, deviation):
    """Return the bits of free constants (C,) with the Jacobian J (C, M), and their standard errors (C,).

    Each costs its digits, log2(|c| / its error with the others fixed), less what they share: together the bits are
    half the logarithm of the determinant of the Fisher information. Far from x = 1 an exponent has many digits, but
    a factor before the power makes up for nearly all of them, so only with this correction do units not matter. On
    average no constant costs less than half the logarithm of the number of points.
    """
    J = J * weights
    largest = np.abs(J).max(1, keepdims=True)
    largest = np.where(largest > 0, largest, 1e-300)  # squares of derivatives may leave the range of floats
    size = (largest * np.sqrt(np.square(J / largest).sum(1, keepdims=True)))[:, 0]
    size = np.maximum(size, 1e-300)
    unit = J / size[:, None]
    correlation = unit @ unit.T
    inverse = np.linalg.pinv(correlation, rcond=1e-12, hermitian=True)
    shared = -np.linalg.slogdet(correlation + 1e-12 * np.eye(len(unit)))[1] / math.log(4)
    with np.errstate(all="ignore"):
        alone = deviation / size
        together = alone * np.sqrt(np.maximum(inverse.diagonal(), 1.0))
        digits = np.nan_to_num(np.log2(np.abs(constants) / alone), nan=0.0)
    least = 0.5 * math.log2(J.shape[1])
    bits = np.clip(digits, least, MOST_DIGITS).sum() - max(shared, 0.0)
    return float(max(bits, least * len(unit))) + SIGN * len(unit), together


class _Fitted:
    """A formula in the user's units with fitted constants, some of them fixed to plain numbers, and its bits."""

    def __init__(self, prefix, constants, free, values, J, relative, data):
        """values: (M,) of the formula; J: (C, M), its derivatives by the constants."""
        self.prefix, self.constants, self.free, self.values = prefix, constants, free, values
        self.relative = relative
        count = int(free.sum())
        self.bits = math.inf
        self.errors = np.zeros(len(free))
        if not np.isfinite(values).all() or count >= max(data.n - 1, 1) and count:
            return
        weights = data.weights[relative]
        with np.errstate(over="ignore"):
            left = np.mean(np.square((values - data.y) * weights))
        fvu = float(left) / max(spread(data.y, weights) ** 2, 1e-300)
        bits = data.exact_bits(values, count, relative) + structure_bits(prefix, data.D)
        if count:
            deviation = data.deviation(fvu, count, relative)
            cost, self.errors[free] = constant_bits(self.constants[free], J[free], weights, deviation)
            bits += cost
        bits += sum(plain_bits(v) for v in self.constants[~free])
        self.bits = float(bits) if math.isfinite(bits) else math.inf


def rank_formulas(alphabet, formulas, data):
    """Fit formulas, (prefix, constants) each, and fix constants to plain numbers where that saves bits -> list.

    Each is a Ranked, or None for what has no finite values, too many constants, or is not admissible.
    """
    best = [None] * len(formulas)
    for relative in (False, True):
        if data.weights[relative] is not None:
            trials = [(prefix, constants, np.ones(len(constants), bool)) for prefix, constants in formulas]
            for i, fitted in enumerate(_fitted(alphabet, trials, relative, data)):
                if best[i] is None or fitted.bits < best[i].bits:
                    best[i] = fitted
    going = range(len(formulas))
    while going := [i for i in going if best[i].bits < math.inf and best[i].free.any()]:
        shorter = _snapped(alphabet, {i: best[i] for i in going}, data)
        going = [i for i in going if shorter[i]]
        for i in going:
            best[i] = shorter[i]
    return [_ranked(alphabet, formula, data) for formula in best]


def rank_mean(data):
    """Return the mean of y as a Ranked formula, the one that all others must beat."""
    weights = data.weights[False]
    mean = float(np.average(data.y, weights=weights**2))
    error = spread(data.y, weights) or 1e-300
    digits = max(0.5 * math.log2(data.n), math.log2(max(abs(mean), 1e-300) / error * math.sqrt(data.n)))
    bits = data.residual_bits(1.0, 1, False) + digits + SIGN if data.n > 1 else 0.0
    return Ranked(["<constant>"], [mean], bits, 1.0, 1, False, [True])


def refit(alphabet, formula, data):
    """Fit the free constants of a Ranked formula to other data, of more rows -> Ranked or None."""
    trial = formula.prefix, formula.constants, np.array(formula.free, bool)
    return _ranked(alphabet, _fitted(alphabet, [trial], formula.relative, data)[0], data)


def _ranked(alphabet, fitted, data):
    """Return a _Fitted as Ranked, None where it may not be listed. Its FVU is unweighted."""
    if fitted.bits == math.inf or not admissible(fitted.prefix, fitted.constants, data.X):
        return None
    weights = data.weights[False]
    left = np.mean(np.square((fitted.values - data.y) * weights))
    if left > spread(data.y, weights) ** 2:  # worse than the mean, as a formula of relative errors may be
        return None
    variance = np.var(data.y)
    fvu = float(np.mean((fitted.values - data.y) ** 2) / variance) if variance else 0.0
    return Ranked(list(fitted.prefix), fitted.constants.tolist(), fitted.bits, fvu, len(fitted.prefix),
                  fitted.relative, fitted.free.tolist())  # fmt: skip


def _batch(alphabet, trials):
    """Return trials (prefix, constants, which are free) as arrays: tokens (N, L), constants and free (N, C)."""
    tokens = padded([alphabet.encode(prefix) for prefix, *_ in trials])
    constants = np.zeros((len(trials), max(len(values) for _, values, _ in trials)))
    free = np.zeros(constants.shape, bool)
    for i, (_, values, masks) in enumerate(trials):
        constants[i, : len(values)], free[i, : len(values)] = values, masks
    return tokens, constants, free


def _fitted(alphabet, trials, relative, data):
    """Fit trials (prefix, constants, which of them are free) -> list of _Fitted."""
    tokens, constants, free = _batch(alphabet, trials)
    if free.any():
        constants, _ = fit(
            alphabet, tokens, padded_columns(alphabet, data.X), data.y, 1, np.random.default_rng(0), steps=30,
            start=constants, free=free, weights=data.weights[relative],
        )  # fmt: skip
    fitted = [(prefix, row[: len(values)], masks)
              for row, (prefix, values, masks) in zip(constants, trials, strict=True)]  # fmt: skip
    return _measured(alphabet, fitted, relative, data)


def _measured(alphabet, trials, relative, data):
    """Return trials (prefix, constants, which of them are free) as a list of _Fitted, without a fit."""
    tokens, constants, _ = _batch(alphabet, trials)
    program = Program(alphabet, tokens, padded_columns(alphabet, data.X))
    with np.errstate(all="ignore"):
        values, J = program.gradient(constants)
    J = np.where(np.isfinite(J), J, 0.0)
    return [_Fitted(prefix, np.asarray(numbers, float), free, v, j[: len(numbers)], relative, data)
            for (prefix, numbers, free), v, j in zip(trials, values, J, strict=True)]  # fmt: skip


def _snapped(alphabet, formulas, data):
    """Fix one constant more of each _Fitted in a dict to a plain number -> dict of the shortest, None if none is.

    How much each number costs is foretold from the standard errors; only the most promising are fitted.
    """
    best = dict.fromkeys(formulas)
    for relative in (False, True):
        trials, owners = [], []
        for key, formula in formulas.items():
            if formula.relative == relative:
                new = _plainer(formula, data)
                trials += new
                owners += [key] * len(new)
        if not trials:
            continue
        candidates = _shortened(alphabet, _fitted(alphabet, trials, relative, data), relative, data)
        for key, candidate in zip(owners, candidates, strict=True):
            if candidate.bits < (best[key] or formulas[key]).bits:
                best[key] = candidate
    return best


def _plainer(formula, data):
    """Return the most promising trials with one free constant of a _Fitted fixed to a plain number."""
    count = int(formula.free.sum())
    trials = []
    for i in np.flatnonzero(formula.free):
        value, error = formula.constants[i], formula.errors[i]
        for plain in plain_numbers(value, error):
            loss = data.n / 2 * math.log2(1 + ((plain - value) / max(error, 1e-300)) ** 2 / max(data.n - count, 1))
            gain = 10.0 if plain in (0.0, 1.0, -1.0) else 0.0  # an operator may go
            trials.append((loss + plain_bits(plain) - gain, int(i), plain))
    chosen = []
    for _, i, plain in sorted(trials)[:SNAPS]:
        constants, free = formula.constants.copy(), formula.free.copy()
        constants[i], free[i] = plain, False
        chosen.append((formula.prefix, constants, free))
    return chosen


def _shortened(alphabet, candidates, relative, data):
    """Simplify those of a list of _Fitted in which a constant became 0 or 1, keeping which constants are free."""
    shorter = {}
    for place, candidate in enumerate(candidates):
        fixed = candidate.constants[~candidate.free].tolist()
        if not any(v in (0.0, 1.0, -1.0) for v in fixed):
            continue
        try:
            prefix, values = simplify(candidate.prefix, candidate.constants.tolist(), alphabet.operators)
        except NotReal:
            continue
        if len(prefix) < len(candidate.prefix) and all(token in alphabet.ids for token in prefix):
            shorter[place] = prefix, values, np.array([v not in fixed for v in values], bool)
    if shorter:
        for place, candidate in zip(shorter, _measured(alphabet, [*shorter.values()], relative, data), strict=True):
            if candidate.bits < math.inf:
                candidates[place] = candidate
    return candidates
