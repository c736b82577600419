"""Products of factors and sums of parts with constants inside: laws of each kind, and searches for them."""

import numpy as np
import pytest

from data_utils.formulas.answers import vocabulary
from data_utils.formulas.expressions import OPERATORS, evaluate, padded_columns, parse_formula
from data_utils.formulas.factors import factors, linked, parts, powered, product, products, sums
from data_utils.formulas.fit import fit
from data_utils.formulas.scaling import decades, scaled
from data_utils.formulas.search import Prior, find_formula, predict

POOL, ALPHABET = vocabulary(3, OPERATORS)
LAWS = {
    "differences of equal powers": ("3.1*(a**4 - b**4)", dict(a=(3, 8), b=(1, 3))),
    "differences of equal functions": ("12*(sqrt(a) - sqrt(b))*c", dict(a=(30, 90), b=(1, 20), c=(1, 5))),
    "an ellipse in degrees": ("a/(1 + b*cos(pi/180*c))", dict(a=(2, 9), b=(0.1, 0.7), c=(0, 350))),
    "refraction in degrees": ("57.29578*asin(a/b*sin(pi/180*c))", dict(a=(1, 1.3), b=(1.5, 2), c=(5, 75))),
    "products of shifted factors": ("a*(71 + b)/(71 - c)", dict(a=(100, 900), b=(0, 20), c=(0, 30))),
    "a shifted factor of a difference": ("(a - 1)*(1/b - 1/c)", dict(a=(1.2, 1.9), b=(1, 3), c=(4, 9))),
    "a reciprocal resonance": ("7/sqrt((9 - a**2)**2 + 0.7*a**2)", dict(a=(0.3, 7))),
    "a resonance of a column": ("a/sqrt(900 + (4*b - 700/b)**2)", dict(a=(1, 9), b=(5, 40))),
    "a limit times a power": ("a*(1 - exp(-0.4*b))**3", dict(a=(1, 9), b=(0.3, 9))),
    "growth in a denominator": ("a*b/(1 - (1 + b)**(-c))", dict(a=(10, 90), b=(0.01, 0.1), c=(3, 30))),
    "a logarithmic mean": ("c*(a - b)/log(a/b)", dict(a=(30, 90), b=(2, 20), c=(1, 5))),
}


def table(law, n=80, widen=0.0, seed=0):
    """Return X (n, D), y (n,) of a law, on ranges that are wider by a share at their upper end."""
    text, ranges = law
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.uniform(low, high + widen * (high - low), n) for low, high in ranges.values()])
    prefix, values = parse_formula(text, list(ranges))
    row = np.array([ALPHABET.encode(prefix)], np.uint8)
    return X, evaluate(ALPHABET, row, np.array([values or [0.0]]), padded_columns(ALPHABET, X)[None])[0]


@pytest.mark.parametrize("name", LAWS)
def test_each_kind_of_law_has_a_start_that_fits(name):
    X, y = table(LAWS[name])
    powers, power = decades(X), int(decades(y))
    X, y, w = scaled(X, powers), scaled(y, power), np.ones(len(y))
    starts = [*products(X[:64], y[:64], w[:64], powers, power), *sums(X[:64], y[:64], w[:64], powers)]
    starts = [start for start in starts if len(start[0]) <= 40]
    tokens = np.zeros((len(starts), 40), np.uint8)
    constants = np.ones((len(starts), 12))
    for i, (prefix, values) in enumerate(starts):
        assert prefix.count("<constant>") == len(values)
        tokens[i, : len(prefix)], constants[i, : len(values)] = ALPHABET.encode(prefix), values
    columns = padded_columns(ALPHABET, X)
    error = fit(ALPHABET, tokens, columns, y, 1, np.random.default_rng(0), affine=True, start=constants)[1]
    assert error.min() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_each_kind_of_law_is_found(name):
    X, y = table(LAWS[name])
    pool, alphabet = vocabulary(X.shape[1], OPERATORS)
    prior, rng = Prior(alphabet, pool, X.shape[1]), np.random.default_rng(0)
    digits = 10.0 ** (np.floor(np.log10(np.abs(y))) - 4)
    formula = find_formula(prior, X, np.rint(y / digits) * digits, alphabet=alphabet, pool=pool, rng=rng, prior=prior,
                           half=digits / 2, choices=1)[0][0]  # fmt: skip
    beyond, truth = table(LAWS[name], widen=0.2, seed=1)
    assert predict(alphabet, formula, beyond) == pytest.approx(truth, rel=1e-3), formula
    assert formula.length <= 26, formula


def test_parts_have_the_values_of_their_tokens():
    X = np.random.default_rng(0).uniform(0.3, 2, (20, 3)) * [1, 100, 1]
    powers = decades(X)
    near = scaled(X, powers)
    library = factors(near, powers) + parts(near, powers)
    rows = [ALPHABET.encode(part.tokens) for part in library]
    tokens, constants = np.zeros((len(rows), max(map(len, rows))), np.uint8), np.zeros((len(rows), 4))
    for i, (row, part) in enumerate(zip(rows, library, strict=True)):
        tokens[i, : len(row)], constants[i, : len(part.constants)] = row, part.constants
    values = evaluate(ALPHABET, tokens, constants, np.repeat(padded_columns(ALPHABET, near)[None], len(rows), 0))
    np.testing.assert_allclose(values, [part.values for part in library], rtol=1e-9, atol=1e-12)


def test_exponents_near_plain_ones_become_these():
    X, powers = np.random.default_rng(0).uniform(1, 2, (20, 2)), np.zeros(2, int)
    a, b = factors(X, powers)[:2]
    assert product([a, b], [1.99, -0.5], 0.02) == (["*", "inv", "pow1_2", "x2", "pow2", "x1"], [])
    assert product([a, b], [1.9, 0.01], 0.02) == (["pow", "x1", "<constant>"], [1.9])
    assert powered(a, 7.0, True) == (["pow", "x1", "<constant>"], [7.0])
    assert powered(a, -1.5, True) == (["inv", "pow1_2", "pow3", "x1"], [])


def test_a_link_of_a_sum_keeps_its_offset():
    X, powers = np.random.default_rng(0).uniform(1, 2, (20, 1)), np.zeros(1, int)
    x = parts(X, powers)[0]
    assert linked("inv", [x], [3.0, 2.0], False) == (["inv", "+", "<constant>", "x1"], [1.5])
    assert linked("", [x], [3.0, 2.0], False) == (["x1"], [])
    assert linked("exp", [x], [3.0, 2.0], False) == (["exp", "*", "<constant>", "x1"], [2.0])
