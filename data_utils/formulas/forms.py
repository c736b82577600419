"""Starts for the search of a formula: general forms of one quantity times powers of the others, fitted to the data.

A form is a shape that measurements often have (power, exponential, saturation, oscillation), never a named law. The
quantity z is a column, or the product, quotient, sum or difference of two. M points, D variables, N forms.
"""

import itertools
import time

import numpy as np

from data_utils.formulas.factors import products, sums
from data_utils.formulas.sums import choose

C = "<constant>"
DEGREE = 4  # of the polynomial in z that stands for an unknown function
EXPONENTS = (-3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4)
WHOLE = (0, 1, 2, 3, -1, -2)  # exponents of a column with both signs
QUANTITIES, SINGLES = 5, 3  # the most promising z; single columns that are tried besides
POWERS = {"z", "pow", "pow2", "inv", "pow1_2", C}  # tokens of forms that are powers of z
OFFSETS = 3  # z for which forms with an offset of their own are tried
WEIGHTS = (1.0, -1.0, 10.0, -10.0, 0.1, -0.1)  # of the second column of a sum: units near 1 differ by powers of ten
PEAKS = 3  # frequencies per z
GROWING = 3  # pairs of columns that are tried as (1 + c u)^(k v)
FEW = 64  # points that choose factors and parts
CLEAR = 30.0  # bits by which a column must help to be searched beside the best ones


def starts(alphabet, data, weights, rng, powers, power, deadline, points=128):
    """Yield (prefix tokens of g, starts of its constants, whether a plain term may be lacking) for y = a + b g.

    data: score.Data in units near 1, columns over 10^powers and y over 10^power; weights (M,) of the residuals. Forms
    that need operators which the alphabet lacks are left out. Products and sums of factors.py are sought for at most
    half of the time until the deadline: the rest is for the fits.
    """
    rows = rng.permutation(data.n)[:points]
    X, y, w = data.X[rows], data.y[rows], weights[rows]
    known = set(alphabet.tokens)
    positive = (X > 0).all(0)
    exponents, _ = _exponents(X, y, w, np.ones((len(y), 1)), list(range(data.D)), positive)
    product = _product(exponents, X)
    if product[0] and known.issuperset(product[0]):
        yield *product, True
    few, half = (X[:FEW], y[:FEW], w[:FEW]), (time.monotonic() + deadline) / 2
    composed = itertools.chain(products(*few, powers, power, half), sums(*few, powers, half))
    for some, general in ((growth(X, y, w), True), (composed, False)):
        yield from ((*start, general) for start in some if known.issuperset(start[0]))
    for place, (tokens, z, exponents, inner) in enumerate(quantities(X, y, w)):
        factor, scales = _product(exponents, X)
        same = tokens[0] in "*/" and positive.all()  # its powers are products of powers of columns
        for form, constants in forms(z, y, w, bool(factor) and place < OFFSETS, _flattened(X, y, exponents)):
            if same and POWERS.issuperset(form):
                continue
            prefix, values = _expanded(form, constants, tokens, inner)
            prefix = ["*", *factor, *prefix] if factor else prefix
            if known.issuperset(prefix):
                yield prefix, [*scales, *values], True


def growth(X, y, w):
    """Yield (prefix, constants) of (1 + c u)^(k v) times powers of the other columns, as of interest or of PCR."""
    if not ((y > 0).all() or (y < 0).all()):
        return
    target, v, trials = np.log(np.abs(y)), w * np.abs(y), []
    for j, k in itertools.permutations(range(X.shape[1]), 2):
        others, largest = [i for i in range(X.shape[1]) if i not in (j, k)], np.abs(X[:, j]).max()
        if not largest:
            continue
        fits = {}  # c -> (what is left, exponents of the others and k)
        low, high = -3.0, 2.0  # powers of ten of c u
        for _ in range(8):  # c and k make up for each other, so their start must be near
            for c in 10.0 ** np.linspace(low, high, 7) / largest:
                with np.errstate(all="ignore"):
                    A = np.column_stack([np.log(X[:, others]), X[:, k] * np.log1p(c * X[:, j]), np.ones(len(y))])
                if np.isfinite(A).all():
                    solution, left = _least_squares(A, target, v)
                    fits[float(c)] = left, solution[:-1].tolist()
            if not fits:
                break
            best = min(fits, key=lambda c: fits[c][0])
            step, place = (high - low) / 6, np.log10(best * largest)
            low, high = place - step, place + step
        if fits:
            trials.append((fits[best][0], j, k, best, dict(zip([*others, k], fits[best][1], strict=True))))
    for _, j, k, c, exponents in sorted(trials, key=lambda trial: trial[:4])[:GROWING]:
        rate = exponents.pop(k)
        factor, powers = _product(exponents, X)
        prefix = ["pow", "-", "*", C, f"x{j + 1}", "(-1)", "*", C, f"x{k + 1}"]
        yield ["*", *factor, *prefix] if factor else prefix, [*powers, c, rate]


def _product(exponents, X):
    """Return the tokens of a product of powers of columns, {column: exponent}, and its constants."""
    factor, powers = [], []
    for j, p in exponents.items():
        part, constants = _power(j, p, X)
        if part:
            factor = ["*", *part, *factor] if factor else part
            powers = [*constants, *powers]
    return factor, powers


def _expanded(form, constants, tokens, inner):
    """Put the tokens of a quantity, with its constants `inner`, where a form has "z"."""
    numbers, prefix, values = iter(constants), [], []
    for token in form:
        prefix += tokens if token == "z" else [token]
        if token == C:
            values.append(next(numbers))
        elif token == "z":
            values += inner
    return prefix, values


def _power(j, p, X):
    """Return the tokens of x_j^p and its constants; p stays free where the column is positive."""
    x = f"x{j + 1}"
    if (X[:, j] > 0).all():
        return ([], []) if abs(p) < 0.02 else (["pow", x, C], [p])
    named = {1: [x], 2: ["pow2", x], 3: ["pow3", x], -1: ["inv", x], -2: ["inv", "pow2", x]}
    return named.get(int(p), []), []


def _flattened(X, y, exponents):
    """Return y over the powers of the other columns (M,), which leaves the function of z."""
    with np.errstate(all="ignore"):
        flat = y.copy()
        for j, p in exponents.items():
            flat = flat / (np.abs(X[:, j]) ** p * np.sign(X[:, j]) ** int(round(p) % 2))
    return flat


def quantities(X, y, w, most=QUANTITIES):
    """Return the most promising (tokens, z (M,), {other column: exponent}, starts of constants in z), best first.

    Each z is judged by how well powers of the other columns times a polynomial in z explain y.
    """
    M, D = X.shape
    positive = (X > 0).all(0)
    every = set(range(D))
    trials = [([f"x{j + 1}"], X[:, j], every - {j}, []) for j in range(D)]
    for i, j in itertools.combinations(range(D), 2):
        a, b = f"x{i + 1}", f"x{j + 1}"
        for weight in WEIGHTS:
            trials.append((["+", a, "*", C, b], X[:, i] + weight * X[:, j], every, [weight]))
        trials.append((["*", a, b], X[:, i] * X[:, j], every - {j}, []))
        if (X[:, j] != 0).all():
            trials.append((["/", a, b], X[:, i] / X[:, j], every - {j}, []))
    judged = []
    for order, (tokens, z, others, inner) in enumerate(trials):
        others = sorted(others)
        basis = _basis(z, min(DEGREE, max(1, M - len(others) - 3)))
        exponents, share = _exponents(X, y, w, basis, others, positive)
        free = basis.shape[1] + len(others)
        bits = M / 2 * np.log2(max(share, 1e-20) / max(M - free, 1)) + free * np.log2(M) / 2
        judged.append((bits + 4 * len(inner), order, (tokens, z, exponents, inner)))
    chosen, pairs = [], set()
    for *_, trial in sorted(judged, key=lambda item: item[:2]):
        tokens, single = trial[0], len(trial[0]) == 1
        pair = tokens[0], *(token for token in tokens if token[0] == "x")
        if pair not in pairs and (len(chosen) < most or single):  # a column alone is always tried
            pairs.add(pair)
            chosen.append(trial)
    return chosen[: most + SINGLES]


def _basis(z, degree):
    """Return powers of z, or of its logarithm where that spreads more evenly, as columns (M, degree + 1)."""
    if z.min() > 0 and z.max() > 20 * z.min():
        z = np.log(z)
    half = np.ptp(z) / 2 or 1.0
    return np.polynomial.chebyshev.chebvander((z - z.min()) / half - 1, degree)


def _exponents(X, y, w, basis, others, positive):
    """Return {column: exponent} with which powers times the basis fit y best, and the share of y that is left."""
    one_sign = (y > 0).all() or (y < 0).all()
    if one_sign and all(positive[j] for j in others):
        logs = np.log(X[:, others])
        A, target = np.column_stack([logs, basis]), np.log(np.abs(y))
        v = w * np.abs(y)  # a residual of log y is one of y over y
        solution, left = _least_squares(A, target, v)
        spread = np.sum(np.square((target - np.average(target, weights=v * v)) * v))
        return dict(zip(others, solution[: len(others)].tolist(), strict=True)), left / max(spread, 1e-300)
    exponents = {j: 1.0 for j in others}
    target = np.sum(np.square((y - np.average(y, weights=w * w)) * w))

    def left(trial):
        with np.errstate(all="ignore"):
            factor = np.ones(len(y))
            for j, p in trial.items():
                factor = factor * np.abs(X[:, j]) ** p * (np.sign(X[:, j]) if int(p) % 2 else 1.0)
        if not np.isfinite(factor).all() or not factor.any():
            return np.inf
        return _least_squares(basis * factor[:, None], y, w)[1]

    best = left(exponents)
    for _ in range(2):
        for j in others:
            for p in EXPONENTS if positive[j] else WHOLE:
                trial = exponents | {j: float(p)}
                if (error := left(trial)) < best * (1 - 1e-9):
                    exponents, best = trial, error
    return exponents, best / max(target, 1e-300)


def _least_squares(A, y, w):
    """Return the weighted least-squares solution of A c = y and the sum of the weighted squares that is left."""
    A, y = A * w[:, None], y * w
    size = np.sqrt((A * A).sum(0))
    size = np.where(size > 0, size, 1.0)
    solution = np.linalg.lstsq(A / size, y, rcond=1e-10)[0]
    return solution / size, float(np.sum(np.square(A / size @ solution - y)))


def terms(D):
    """Return the prefix tokens of plain terms that a form may lack: simple powers of a column, products of two."""
    columns = [f"x{j + 1}" for j in range(D)]
    single = [[*function, x] for x in columns for function in ([], ["pow2"], ["inv"], ["inv", "pow2"], ["log"])]
    return single + [["*", a, b] for a, b in itertools.combinations(columns, 2)]


def screen(X, y, w, rng, most, points=256):
    """Return the columns that matter most for y, at most `most` of them and all that clearly matter, in their order.

    Sums of simple functions of one or two columns are fitted to y and to log |y|; the columns of the best ones count. A
    column clearly matters if all sums without it cost CLEAR bits more than the best.
    """
    D = X.shape[1]
    if D <= most:
        return list(range(D))
    rows = rng.permutation(len(y))[:points]
    X, y, w = X[rows], y[rows], w[rows]
    parts, members = [], []
    with np.errstate(all="ignore"):
        for j in range(D):
            for function in (lambda x: x, np.square, np.log, np.reciprocal, np.sin):
                parts.append(function(X[:, j]))
                members.append({j})
        for i, j in itertools.combinations(range(D), 2):
            parts += [X[:, i] * X[:, j], X[:, i] / X[:, j], X[:, j] / X[:, i]]
            members += [{i, j}] * 3
        parts = np.array(parts)
        usable = np.isfinite(parts).all(1) & (np.ptp(parts, 1) > 0)
        parts, members = parts[usable], [m for m, good in zip(members, usable.tolist(), strict=True) if good]
        parts = parts / np.abs(parts).max(1, keepdims=True)
        links = [(y, w)]
        if (y > 0).all() or (y < 0).all():
            links.append((np.log(np.abs(y)), w * np.abs(y)))
    scores, clear = np.zeros(D), np.zeros(D, bool)
    most_terms = int(min(D + 1, max(1, len(y) - 3)))
    for target, weights in links:
        sets = choose(parts, target / (np.abs(target).max() or 1.0), weights, width=4, most=most_terms)
        n = len(target)
        best, without = np.inf, np.full(D, np.inf)  # bits of a sum, also of those that lack a column
        for left, chosen in sets:
            bits = n / 2 * np.log2(max(left, 1e-12)) + len(chosen) * np.log2(n)
            columns = set().union(*(members[k] for k in chosen))
            for j in columns:
                scores[j] = min(scores[j], bits / len(chosen) ** 0.25)
            others = [j for j in range(D) if j not in columns]
            without[others] = np.minimum(without[others], bits)
            best = min(best, bits)
        clear |= without > best + CLEAR
    order = sorted(np.argsort(scores, kind="stable").tolist(), key=lambda j: not clear[j])
    return sorted(order[: max(most, clear.sum())])


def frequencies(z, y, w, most=PEAKS):
    """Return the angular frequencies at which a sine and a line in z explain y best (Lomb 1976, Scargle 1982).

    Up to the one at which neighbouring points are half a period apart.
    """
    places = np.unique(z)
    width = np.ptp(places)
    if len(places) < 6 or not width > 0:
        return []
    highest = np.pi / max(np.median(np.diff(places)), width / 200)
    grid = np.arange(0.25, max(highest * width / (2 * np.pi), 1.0), 0.125) * 2 * np.pi / width
    line = np.column_stack([np.ones(len(z)), (z - z.min()) / width])
    left = []
    for frequency in grid:
        A = np.column_stack([line, np.sin(frequency * z), np.cos(frequency * z)])
        left.append(_least_squares(A, y, w)[1])
    left = np.array([np.inf, *left, np.inf])
    peaks = np.flatnonzero((left[1:-1] <= left[:-2]) & (left[1:-1] <= left[2:]))
    return [float(grid[k]) for k in peaks[np.argsort(left[1:-1][peaks])][:most]]


def forms(values, y, w, product, flat):
    """Yield (prefix, constants) of general forms of "z", a quantity with the values (M,).

    product: whether an offset of the function is a constant of its own, as where powers of other columns stand before.
    flat (M,): y over those powers.
    """
    low, middle, high = np.quantile(values, [0.15, 0.5, 0.85])
    width = np.ptp(values) or 1.0
    positive = bool((values > 0).all())
    rates = [sign * size / width for size in (0.7, 2.5, 8.0, 25.0) for sign in (1, -1)]
    if len(np.unique(values)) < 3:
        yield ["z"], []
        return
    plain = [(["z"], []), (["pow2", "z"], []), (["log", "z"], []), (["*", "z", "log", "z"], [])]
    plain += [(["inv", "z"], []), (["inv", "pow2", "z"], []), (["pow1_2", "z"], []), (["exp", "z"], [])]
    if positive:
        plain += [(["pow", "z", C], [p]) for p in (0.5, 2.0, -1.0, -2.0, 3.5)]
    curves = [(["exp", "*", C, "z"], [k]) for k in rates]
    for times, s in itertools.product((1, 5), (4, -4)):  # Arrhenius' law with degrees Celsius
        shift = times * width - min(0.0, float(values.min()))
        curves.append((["exp", "/", C, "+", C, "z"], [s * (low + shift) * (high + shift) / width, shift]))
    if positive:
        curves += [(["exp", "/", C, "z"], [k * middle * s]) for k in (0.5, 2.0, 8.0, 25.0) for s in (1, -1)]
        for p, k in itertools.product((-2.0, 0.5, 2.0, -5.0), (-6.0, -1.5, 1.5)):
            curves.append((["*", "pow", "z", C, "exp", "*", C, "z"], [p, k / width]))
            curves.append((["*", "pow", "z", C, "exp", "/", C, "z"], [p, k * middle]))
        for p, k in itertools.product((-5.0, -1.0, 1.0, 3.0), (0.5, 2.0, 6.0)):
            curves.append((["/", "pow", "z", C, "+", C, "exp", "/", C, "z"], [p, -1.0, k * middle]))
            curves.append((["/", "pow", "z", C, "+", C, "exp", "*", C, "z"], [p, -1.0, k / middle]))
        for p, k in itertools.product((1.0, -1.0, 2.5, -2.5), (low, middle, high)):
            curves.append((["inv", "+", C, "pow", "z", C], [k**p, p]))
        curves += [(["log", "+", C, "z"], [k]) for k in (low, high)]
        curves += [(["exp", "*", C, "pow", "z", C], [-(middle**-p), p]) for p in (0.6, 1.7, 3.0)]
    curves += [(["/", "z", "+", C, "z"], [k]) for k in (low, middle, 3 * high)]
    curves += [(["inv", "+", C, "z"], [k]) for k in (low, middle, high, -2 * high, -low / 2)]
    curves += [(["inv", "+", C, "pow2", "z"], [k]) for k in (low**2, high**2, -2 * high**2, -(low**2) / 2)]
    curves += [(["/", "z", "+", C, "pow2", "z"], [k]) for k in (middle**2, high**2)]
    curves += [(["inv", "+", C, "pow2", "+", C, "z"], [k * width**2, -start])
               for k in (0.003, 0.1) for start in (low, middle, high)]  # fmt: skip
    if positive:
        curves += [(["+", "pow", "z", C, "*", C, "pow", "z", C], [p, s * middle ** (p - q), q])
                   for p, q in ((-2.0, -1.0), (-8.0, -4.0), (0.5, 2.0)) for s in (1.0, -1.0)]  # fmt: skip
    for sign, start in itertools.product((1, -1), (low, middle, high)):
        rate = sign * 8.0 / width
        curves.append((["inv", "+", C, "exp", "*", C, "z"], [float(np.exp(np.clip(rate * start, -60, 60))), rate]))
        rate /= 2
        curves.append((["exp", "*", C, "exp", "*", C, "z"], [-float(np.exp(np.clip(-rate * start, -60, 60))), rate]))
    curves += [
        (["tanh", "+", C, "*", C, "z"], [-k * start, k]) for k in (2 / width, 8 / width) for start in (low, high)
    ]
    curves += [(["exp", "*", C, "pow2", "+", C, "z"], [-k / width**2, -start])
               for k in (3.0, 20.0) for start in (low, middle, high)]  # fmt: skip
    largest = float(np.max(values**2)) or 1.0
    curves += [(["pow", "+", C, "pow2", "z", C], [s * largest, p]) for s in (-1.3, 0.5) for p in (0.5, -0.5, -1.5)]
    curves += [(["pow", "-", C, "pow2", "z", C], [1.3 * largest, p]) for p in (0.5, -0.5)]
    curves += [(["pow", "+", C, "z", C], [k, p]) for k in (low, high - 2 * low + width / 10) for p in (0.5, 2.0, -2.0)]
    curves += [([name, "*", C, "z"], [k / width]) for name in ("tanh", "atan", "cosh") for k in (1.0, 4.0)]
    curves += [([name, "*", C, "z"], [k / width]) for name in ("asin", "acos", "atanh") for k in (0.5,)]
    curves += [(["+", "z", "*", C, "pow2", "z"], [s / width]) for s in (1.0, -1.0)]
    curves += [(["+", "z", "+", "*", C, "pow2", "z", "*", C, "pow3", "z"], [1 / width, 1 / width**2])]
    curves += [(["+", "z", "*", C, "inv", "z"], [s * middle**2]) for s in (1.0, -1.0)]
    curves += [
        (["+", "exp", "*", C, "z", "*", C, "exp", "*", C, "z"], [-1 / width, s, -8 / width]) for s in (1.0, -1.0)
    ]
    for k in rates[2:6]:
        curves.append((["+", "z", "*", C, "exp", "*", C, "z"], [1.0, k]))
    for k in frequencies(values, flat, w * np.abs(y) if product and (y != 0).all() else w):
        curves += [([name, "*", C, "z"], [k]) for name in ("sin", "cos", "tan")]
        for phase in (0.0, 2.0, 4.0):
            curves.append((["sin", "+", C, "*", C, "z"], [phase, k]))
            curves.append((["+", "z", "*", C, "sin", "+", C, "*", C, "z"], [1.0, phase, k]))
            curves += [(["*", "exp", "*", C, "z", "sin", "+", C, "*", C, "z"], [-s / width, phase, k]) for s in (1, 4)]
    for k in (1.0, 2.0, 4.0):
        curves += [([name, "*", C, "z"], [k / width]) for name in ("sin", "cos")]
    for form, constants in plain + curves:
        yield form, [float(c) for c in constants]
    if product:
        for form, constants in plain + curves:
            yield ["+", C, *form], [-1.0 if form[0] in ("exp", "cos") else 1.0, *map(float, constants)]
