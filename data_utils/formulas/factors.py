"""Starts for laws that are products of factors, or of which a link is a sum of parts, with constants inside.

A factor is a column, c + x, a^2 - b^2, 1 - exp(-k t), c + cos(k x) or alike. log |y| is linear in the logarithms of
factors, and what undoes a link is linear in parts. `choose` finds which ones, over grids of the constants inside: these
are projected out (Golub and Pereyra 1973) before all constants are fitted. M points, D variables, K parts.
"""

import itertools
import time
from collections import namedtuple

import numpy as np

from data_utils.formulas.sums import LINKS, centred, choose

C = "<constant>"
DEGREE = np.pi / 180
TURNS = 0.05, 2.5  # of an angle in a table
SHIFTS = 0.02, 0.1, 0.3, 1.0, 3.0, 10.0  # c of c + z, in widths of z beyond its range
RATES = 0.1, 0.25, 0.6, 1.5, 4.0, 10.0, 25.0  # k of exp(k z), over the largest z
PERIODS = 1.0, 1 / 12, 0.01, 1 / 1200  # interest per year or month, as a share or in percent
FACTORS, PARTS = 3, 3  # of a product besides columns, of a sum
SIZE = 18_000  # sets in the beam times parts, at most
CURVED = 3  # columns up to which parts with constants inside are multiplied by others
STARTED = 12  # sets of each size that become starts
NEAR = 0.02  # of a plain exponent, within which it is taken
LARGEST = 1e9  # what a part may be, in units near 1

# tokens with C where the constants inside stand; unit: power of ten of the user's units in those of the search
Part = namedtuple("Part", "tokens constants values unit")


def times(c, tokens):
    """Return the tokens and constants of c times a part; c stays out where it is 1."""
    return (tokens, []) if c == 1 else (["*", C, *tokens], [c])


def columns(X, powers):
    """Return the columns as parts."""
    return [Part([f"x{j + 1}"], [], X[:, j], int(powers[j])) for j in range(X.shape[1])]


def applied(name, part, function, unit=0):
    """Return a function of a part."""
    with np.errstate(all="ignore"):
        return Part([name, *part.tokens], part.constants, function(part.values), unit)


def joined(name, a, b, function, unit=0):
    """Return the part that joins two."""
    with np.errstate(all="ignore"):
        return Part([name, *a.tokens, *b.tokens], [*a.constants, *b.constants], function(a.values, b.values), unit)


def powers_of(x):
    """Return simple powers of a column as parts, and its logarithm."""
    square = applied("pow2", x, np.square)
    functions = {"pow3": lambda v: v**3, "pow4": lambda v: v**4, "inv": np.reciprocal, "pow1_2": np.sqrt, "log": np.log}
    parts = [applied(name, x, function) for name, function in functions.items()]
    return [x, square, applied("inv", square, np.reciprocal), *parts]


def waves(x):
    """Return sines and cosines of a column that may be an angle in degrees or radians, also of its half and double."""
    angles = [k * 10.0**x.unit for k in (1.0, DEGREE)]
    rates = [k * m for k in angles if TURNS[0] < k * np.ptp(x.values) / (2 * np.pi) < TURNS[1] for m in (1.0, 2.0, 0.5)]
    return [Part([name, "*", C, *x.tokens], [k], function(k * x.values), 0)
            for name, function in (("sin", np.sin), ("cos", np.cos)) for k in rates]  # fmt: skip


def rates_of(z):
    """Return rates k of exp(k z) that the range of z can tell."""
    largest = np.abs(z.values).max() or 1.0
    return [sign * k / largest for k in RATES for sign in (-1, 1)]


def pairs(a, b):
    """Return sums and differences of equal functions of two columns in the user's units, and functions of a / b."""
    ratio = 10.0 ** (b.unit - a.unit)
    functions = [([], 1.0), (["pow2"], 2.0), (["pow3"], 3.0), (["pow4"], 4.0), (["pow1_2"], 0.5)]
    with np.errstate(all="ignore"):
        for function, p in functions:
            second, constants = times(ratio**p, [*function, *b.tokens])
            for sign, name in ((1, "+"), (-1, "-")):
                values = a.values**p + sign * (ratio * b.values) ** p
                yield Part([name, *function, *a.tokens, *second], constants, values, 0)
        quotient, constants = times(1 / ratio, ["/", *a.tokens, *b.tokens])
        values = a.values / (ratio * b.values)
        yield Part(["log", *quotient], constants, np.log(values), 0)
        yield Part(["atan", *quotient], constants, np.arctan(values), 0)


def grown(u, v):
    """Return 1 - (1 + c u)^(s v), of a rate u over a time v."""
    for c, s in itertools.product(PERIODS, (-1.0, 1.0)):
        rate, span = c * 10.0**u.unit, s * 10.0**v.unit
        with np.errstate(all="ignore"):
            values = 1 - (1 + rate * u.values) ** (span * v.values)
        yield Part(["-", "1", "pow", "+", "1", "*", C, *u.tokens, "*", C, *v.tokens], [rate, span], values, 0)


def shifted(z):
    """Return c + z above 0 and c - z above 0, for c around its range and for 1 in the user's units."""
    low, high = z.values.min(), z.values.max()
    one = 10.0**-z.unit
    above = [d * (high - low) - low for d in SHIFTS] + [c for c in (one, -one) if c > -low]
    below = [d * (high - low) + high for d in SHIFTS] + [c for c in (one,) if c > high]
    return [Part([sign, C, *z.tokens], [c, *z.constants], c + s * z.values, 0)
            for sign, s, places in (("+", 1, above), ("-", -1, below)) for c in places]  # fmt: skip


@np.errstate(all="ignore")  # what is not finite is left out
def factors(X, powers):
    """Return the factors of products as parts: those that are finite and never 0."""
    x = columns(X, powers)
    products = [joined("*", a, b, np.multiply, a.unit + b.unit) for a, b in itertools.combinations(x, 2)]
    quotients = [joined("/", a, b, np.divide, a.unit - b.unit) for a, b in itertools.permutations(x, 2)]
    angles = [wave for column in x for wave in waves(column)]
    swings = [joined("*", a, wave, np.multiply, a.unit) for a in x for wave in angles if a.tokens[0] not in wave.tokens]
    squares = [applied("pow2", a, np.square, 2 * a.unit) for a in x]
    quantities = x + products + quotients
    library = [*x, *angles]
    library += [Part(["exp", *a.tokens], [], np.exp(a.values), 0) for a in x]  # its exponent becomes a rate
    for a, b in itertools.combinations(x, 2):
        library += pairs(a, b)
    for a, b in itertools.permutations(x, 2):
        library += grown(a, b)
    for z in (quantity for quantity in quantities + squares + angles + swings if np.ptp(quantity.values) > 0):
        library += shifted(z)
    for z in quantities:
        library += [Part(["-", "1", "exp", "*", C, *z.tokens], [k], 1 - np.exp(k * z.values), 0) for k in rates_of(z)]
    for a in x:
        for k, faster in itertools.combinations(rates_of(a)[::2], 2):
            values = np.exp(k * a.values) - np.exp(faster * a.values)
            library.append(Part(["-", *["exp", "*", C, *a.tokens] * 2], [k, faster], values, 0))
    return usable(library, lambda values: (values != 0).all() and np.ptp(np.abs(values)) > 0)


@np.errstate(all="ignore")
def parts(X, powers):
    """Return the parts of sums: simple functions of a column, products of two of them."""
    simple, curved = [], []
    for x in columns(X, powers):
        simple.append(powers_of(x))
        curved.append(waves(x) + [Part(["exp", "*", C, *x.tokens], [k], np.exp(k * x.values), 0) for k in rates_of(x)])
    library = [part for some in simple + curved for part in some]
    for i, j in itertools.permutations(range(len(simple)), 2):
        others = (simple[j] if i < j else []) + (curved[j] if len(simple) <= CURVED else [])
        library += [joined("*", a, b, np.multiply) for a in simple[i] for b in others]
    return usable(library, lambda values: np.ptp(values) > 0)


def variables(part):
    """Return the columns in a part."""
    return {token for token in part.tokens if token[0] == "x"}


def usable(library, good):
    """Return the parts that are finite, not too large, and good."""
    finite = [part for part in library if np.isfinite(part.values).all()]
    return [part for part in finite if np.abs(part.values).max() < LARGEST and good(part.values)]


def best_sets(trials, most, deadline, first=()):
    """Yield (label, parts, coefficients, that of 1 first) of the sets that leave least of y, STARTED of each size.

    trials: (label, parts, their values (K, M), what is to be their sum (M,), weights (M,) with which its residuals are
    those of y). A set has the parts `first` and up to `most` others. Trials after the deadline are left out.
    """
    judged, counts = [], {}
    for label, library, values, target, w in trials:
        finite = library and np.isfinite(target).all() and np.isfinite(w).all() and w.max() > 0
        total = np.square(centred(target, w / w.max())).sum() if finite else 0.0
        if not total > 0 or time.monotonic() > deadline:
            continue
        kinds = [" ".join(part.tokens) for part in library]
        size, width = min(len(first) + most, len(w) - 3), max(8, min(32, SIZE // len(library)))
        sets = choose(values, target, w / w.max(), width=width, most=size, kinds=kinds, start=[first])
        judged += [(share * total * w.max() ** 2, len(judged) + i, label, library, values, target, w, chosen)
                   for i, (share, chosen) in enumerate(sets)]  # fmt: skip
    for _, _, label, library, values, target, w, chosen in sorted(judged, key=lambda item: item[:2]):
        counts[len(chosen)] = counts.get(len(chosen), 0) + 1
        if counts[len(chosen)] <= STARTED:
            A = np.column_stack([np.ones(len(w)), *values[list(chosen)]]) * w[:, None]
            yield label, [library[k] for k in chosen], np.linalg.lstsq(A, target * w, rcond=None)[0].tolist()


def powered(part, p, plain):
    """Return the tokens and constants of a factor to the power p; plain: p is a half-integer."""
    if part.tokens[0] == "exp" and not part.constants:
        return ["exp", "*", C, *part.tokens[1:]], [p]
    number = abs(p) if p % 1 == 0 else 2 * abs(p)  # x^1.5 is the root of x^3
    if not plain or number > 5:
        return ["pow", *part.tokens, C], [*part.constants, p]
    operators = ["inv"] * (p < 0) + ["pow1_2"] * (p % 1 != 0) + [f"pow{number:.0f}"] * (number > 1)
    return [*operators, *part.tokens], part.constants


def product(chosen, exponents, near):
    """Return the tokens and constants of a product of powers; exponents within `near` of half-integers become these."""
    tokens, constants = [], []
    for part, p in zip(chosen, exponents, strict=True):
        plain = round(2 * p) / 2
        if plain == 0 and part.tokens[0] != "exp":
            continue
        rounded = abs(p - plain) <= near and part.tokens[0] != "exp"
        factor, numbers = powered(part, plain if rounded else p, rounded)
        tokens, constants = ["*", *factor, *tokens] if tokens else factor, [*numbers, *constants]
    return tokens, constants


def products(X, y, w, powers, power, deadline=np.inf):
    """Yield (prefix, constants) of products of factors for y, and of those whose arc sine y is."""
    library = factors(X, powers)
    logs = np.log(np.abs([part.values for part in library]))
    plain = tuple(k for k, part in enumerate(library) if len(part.tokens) == 1)
    targets = [([], y, w)]
    for k in (1.0, DEGREE):
        angle = k * 10.0**power * y
        if TURNS[0] < np.ptp(angle) / (2 * np.pi) and np.abs(angle).max() < np.pi / 2:
            targets.append((["asin"], np.sin(angle), w / (k * 10.0**power * np.cos(angle))))
    trials = [(link, library, logs, np.log(np.abs(target)), v * np.abs(target))
              for link, target, v in targets if (target != 0).all()]  # fmt: skip
    for link, chosen, (offset, *exponents) in best_sets(trials, FACTORS, deadline, plain):
        for near in (NEAR, 0.5):
            tokens, constants = product(chosen, exponents, near)
            if tokens:
                yield ([*link, "*", C, *tokens], [np.exp(offset), *constants]) if link else (tokens, constants)


def sums(X, y, w, powers, deadline=np.inf):
    """Yield (prefix, constants) of links of sums of parts, also times or over a column that products of parts lack."""
    every, trials = parts(X, powers), []
    flat = [([], y, w, every)]
    for x in columns(X, powers) if X.shape[1] > 1 else ():
        if (x.values == 0).any():
            continue
        others = [part for part in every if x.tokens[0] not in part.tokens or len(variables(part)) == 1]
        for factor, size in ((["*", *x.tokens], x.values), (["*", "inv", *x.tokens], 1 / x.values)):
            flat.append((factor, y / size, w * np.abs(size), others))
    for factor, target, weights, library in flat:
        values = np.array([part.values for part in library])
        for link, (undo, slope) in LINKS.items():
            with np.errstate(all="ignore"):
                trials.append(((factor, link), library, values, undo(target), weights / np.abs(slope(target))))
    for (factor, link), chosen, coefficients in best_sets(trials, PARTS, deadline):
        tokens, constants = linked(link, chosen, coefficients, bool(factor))
        yield [*factor, *tokens], constants


def linked(link, chosen, coefficients, with_offset):
    """Return the tokens and constants of a link of a sum that a + b g scales and, without a factor, shifts."""
    offset, *factors = coefficients
    lead = 1.0 if link == "exp" else next((c for c in factors if c), 1.0)
    if link in ("pow1_2", "inv pow1_2", "log"):  # what they are of is above 0
        lead = next((c for c in factors if c > 0), abs(offset) or 1.0)
    row, constants = ([C], [offset / lead]) if with_offset and not link or link not in ("", "exp") else ([], [])
    for part, c in zip(chosen, factors, strict=True):
        tokens, numbers = times(c / lead, part.tokens)
        row = ["+", *row, *tokens] if row else tokens
        constants += [*numbers, *part.constants]
    return [*link.split(), *row], constants
