"""Fits in batches against one plain fit at a time."""

import numpy as np
import pytest

from data_utils.errors import UsageError
from data_utils.formulas.expressions import OPERATORS, Alphabet, evaluate, parse_formula
from data_utils.formulas.fit import _solved, fit, refine, wrap

ALPHABET = Alphabet(OPERATORS, ["x1", "x2"])
FORMULAS = {  # starts near these constants find them
    "2.5*x1 + 1.5": lambda x, z, c: c[0] * x + c[1],
    "1.5*sin(2.5*x1 + 0.5)": lambda x, z, c: c[0] * np.sin(c[1] * x + c[2]),
    "2.5*x1**2 + 0.5*exp(0.7*x1)": lambda x, z, c: c[0] * x * x + c[1] * np.exp(c[2] * x),
    "log(1.5 + x1) + log(2.5 + x2**2)": lambda x, z, c: np.log(c[0] + x) + np.log(c[1] + z * z),
    "(2.5*x1 + 1.5)/(0.5 + x1**2)": lambda x, z, c: (c[0] * x + c[1]) / (c[2] + x * x),
    "1.7*cos(x2)*sin(x1)": lambda x, z, c: c[0] * np.cos(z) * np.sin(x),
    "exp(-(x1 - 0.8)**2/0.6)": lambda x, z, c: np.exp(-((x - c[0]) ** 2) / c[1]),
    "2.2*x1**1.7 + 0.4": lambda x, z, c: c[0] * x ** c[1] + c[2],
    "sqrt(x1 + 1.3) - 0.6*x2": lambda x, z, c: np.sqrt(x + c[0]) - c[1] * z,
    "0.8*tanh(1.4*x1 - 0.9)": lambda x, z, c: c[0] * np.tanh(c[1] * x - c[2]),
    "inv(1.1 + 0.6*x1*x2)": lambda x, z, c: 1 / (c[0] + c[1] * x * z),
    "x1**2 - 1.9*x1 + 0.3*x2": lambda x, z, c: x * x - c[0] * x + c[1] * z,
}


def rows(texts):
    """(N, L) tokens, (N, C) constants of the formulas."""
    read = [parse_formula(text, ["x1", "x2"]) for text in texts]
    width, most = (max(len(x[i]) for x in read) for i in (0, 1))
    tokens = np.array([ALPHABET.encode(p) + [0] * (width - len(p)) for p, _ in read], np.uint8)
    return tokens, np.array([v + [0.0] * (most - len(v)) for _, v in read])


def points(n=20, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 2, (n, 2))


def plain_fit(f, y, c):
    """Levenberg-Marquardt on one start, derivatives by central differences -> FVU."""
    mu, r = 0.0, f(c) - y
    for _ in range(50):
        if r @ r < 1e-16:
            break
        J = np.stack([(f(c + d) - f(c - d)) / 2e-6 for d in 1e-6 * np.eye(len(c))], 1)
        square = J.T @ J
        step = np.linalg.lstsq(square + mu * np.diag(np.diag(square)), J.T @ r, rcond=None)[0]
        trial = f(c - step) - y
        if trial @ trial < r @ r:
            c, r, mu = c - step, trial, mu / 3
        else:
            mu = max(4 * mu, 1e-2)
    return r @ r / len(y) / np.var(y)


@pytest.mark.parametrize("text", FORMULAS)
def test_from_twenty_starts_as_a_plain_fit(text):
    tokens, truth = rows([text])
    X, rng = points(), np.random.default_rng(1)
    y = FORMULAS[text](*X.T, truth[0])
    starts, tokens = truth * rng.uniform(0.7, 1.4, (20, truth.shape[1])), np.repeat(tokens, 20, 0)
    with np.errstate(all="ignore"):
        plain = np.array([plain_fit(lambda c: FORMULAS[text](*X.T, c), y, start) for start in starts])
    assert (plain < 1e-12).mean() > 0.7
    for kind in (dict(), dict(affine=True), dict(method="bfgs", steps=100)):
        constants, fvu = fit(ALPHABET, tokens, X, y, 1, rng, start=starts, **kind)
        assert (fvu < 1e-12).mean() >= (plain < 1e-12).mean() - (0.5 if "method" in kind else 0.05)
        again = [FORMULAS[text](*X.T, c) for c in constants[:, 2 * (constants.shape[1] > truth.shape[1]) :]]
        if "affine" in kind:
            again = constants[:, :1] + constants[:, 1:2] * np.array(again)
        np.testing.assert_allclose(np.mean((again - y) ** 2, 1) / y.var(), fvu, rtol=1e-6, atol=1e-20)


def test_a_batch_is_its_formulas_one_by_one():
    tokens, truth = rows(FORMULAS)
    X = points()
    y = evaluate(ALPHABET, tokens[4:5], truth[4:5], X[None])[0]
    for kind in (dict(), dict(affine=True), dict(method="bfgs")):
        together = fit(ALPHABET, tokens, X, y, 1, np.random.default_rng(0), steps=3, start=truth * 1.1, **kind)
        for i in range(len(tokens)):
            one = fit(ALPHABET, tokens[i : i + 1], X, y, 1, np.random.default_rng(0), steps=3, start=1.1 * truth[i:i+1],
                      **kind)  # fmt: skip
            # In a + b g some constants are redundant: their system is singular, and rounding moves three steps.
            np.testing.assert_allclose(together[1][i], one[1][0], rtol=1e-3 if "affine" in kind else 1e-6, atol=1e-20)


def test_linear_constants_take_one_step():
    tokens, truth = rows(["2.5*x1 + 1.5", "3.5*sin(x1) - 2.5*x2 + 0.5", "1.5*x1*x2"])
    for i in range(3):
        y = evaluate(ALPHABET, tokens[i : i + 1], truth[i : i + 1], points()[None])[0]
        constants, fvu = fit(ALPHABET, tokens[i : i + 1], points(), y, 1, np.random.default_rng(0), steps=1)
        assert fvu < 1e-24
        np.testing.assert_allclose(constants, truth[i : i + 1, : constants.shape[1]], rtol=1e-9)


def test_affine_constants_are_those_of_the_wrapped_formula():
    prefix, values = parse_formula("exp(-1.5*x1)", ["x1", "x2"])
    y = 3 - 7 * np.exp(-1.5 * points()[:, 0])
    tokens = np.array([ALPHABET.encode(prefix)], np.uint8)
    constants, fvu = fit(ALPHABET, tokens, points(), y, 4, np.random.default_rng(0), affine=True)
    np.testing.assert_allclose(constants, [[3, -7, -1.5]], rtol=1e-7)
    wrapped = np.array([ALPHABET.encode(wrap(prefix))], np.uint8)
    np.testing.assert_allclose(evaluate(ALPHABET, wrapped, constants, points()[None])[0], y, rtol=1e-9)
    assert fvu < 1e-14


def test_regions_without_values_are_survived():
    tokens, truth = rows(["log(x1 + 5.5) + 1.5*sqrt(x2 + 3.5)", "log(-1.5)*x1", "1/(x1 - x1)", "x1"])
    X = points() - 3
    y = evaluate(ALPHABET, tokens[:1], truth[:1], X[None])[0]
    constants, fvu = fit(ALPHABET, tokens, X, y, 40, np.random.default_rng(0))
    assert fvu[0] < 1e-12 and fvu[2] == np.inf and fvu[3] > 0.01
    np.testing.assert_allclose(constants[0], truth[0], rtol=1e-4)
    for method in ("lm", "bfgs"):
        _, worst = fit(ALPHABET, tokens, X, np.full(20, 3.0), 2, np.random.default_rng(0), method=method)  # constant y
        assert worst.shape == (4,)
    with pytest.raises(UsageError, match="'newton'.*lm or bfgs"):
        fit(ALPHABET, tokens, X, y, 1, np.random.default_rng(0), method="newton")


def test_a_derivative_whose_square_is_beyond_floats_ends_nothing():
    tokens, truth = rows(["1.0 + exp(3.41e-8*x1) + 1.0*x2 - 1.0"])
    X, y = np.array([[2.0, 0.3], [1.0, 0.4], [0.9, 1.5], [0.4, 1.9], [1e10, 1.5]]), np.array([2.5, 1.5, 2.5, 2.7, 1.0])
    _, fvu = fit(ALPHABET, tokens, X, y, 1, np.random.default_rng(0), start=truth)
    assert np.isfinite(fvu).all()


def test_a_singular_matrix_ends_nothing():
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((3, 2, 2)), rng.standard_normal((3, 2))
    expected = [np.linalg.inv(a) @ c for a, c in zip(A, b, strict=True)]
    np.testing.assert_allclose(_solved(A, b), expected)
    A[1] = 1.0
    np.testing.assert_allclose(_solved(A, b)[[0, 2]], [expected[0], expected[2]], rtol=1e-4)
    assert np.isfinite(_solved(A, b)).all()


def test_constants_that_are_not_free_stay():
    tokens, truth = rows(["2.5*x1 + 1.5"])
    y = 4 * points()[:, 0] + 1.5
    constants, fvu = fit(ALPHABET, tokens, points(), y, 3, np.random.default_rng(0), start=truth,
                         free=np.array([[True, False]]))  # fmt: skip
    np.testing.assert_allclose(constants, [[4, 1.5]], rtol=1e-9)
    assert fvu < 1e-20


def test_two_rounds_find_the_law_among_others():
    tokens, truth = rows(FORMULAS)
    X = points(3000)
    y = evaluate(ALPHABET, tokens[1:2], truth[1:2], X[None])[0]
    for affine in (False, True):
        constants, fvu = refine(ALPHABET, tokens, X, y, np.random.default_rng(0), affine=affine)
        assert fvu.argmin() == 1 and fvu[1] < 1e-12 and constants.shape == (12, truth.shape[1] + 2 * affine)


def test_weights_are_those_of_a_plain_weighted_fit():
    rng = np.random.default_rng(0)
    X, weights = rng.uniform(0.5, 2, (30, len(ALPHABET.variables))), rng.uniform(0.1, 3, 30)
    y = 2 + 3 * X[:, 0] ** 1.7 + 0.1 * rng.standard_normal(30)
    row = np.array([ALPHABET.encode("pow x1 <constant>".split())], np.uint8)
    (a, b, p), fvu = (x[0] for x in fit(ALPHABET, row, X, y, 4, rng, affine=True, weights=weights))
    A = np.column_stack([np.ones(30), X[:, 0] ** p])
    solution = np.linalg.lstsq(A * weights[:, None], y * weights, rcond=None)[0]
    assert (a, b) == pytest.approx(tuple(solution), rel=1e-8)
    mean = np.average(y, weights=weights**2)
    expected = np.sum((weights * (A @ solution - y)) ** 2) / np.sum((weights * (y - mean)) ** 2)
    assert fvu == pytest.approx(expected, rel=1e-8)
    for moved in (0.999, 1.001):  # no other exponent is better
        other = np.column_stack([np.ones(30), X[:, 0] ** (p * moved)])
        rest = other @ np.linalg.lstsq(other * weights[:, None], y * weights, rcond=None)[0] - y
        assert np.sum((weights * rest) ** 2) / np.sum((weights * (y - mean)) ** 2) > fvu
