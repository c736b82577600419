"""Bits of formulas: what they prefer, plain constants under noise, and what may not be listed; units put back."""

import math

import numpy as np
import pytest

from data_utils.formulas.expressions import OPERATORS, Alphabet, evaluate, format_formula, padded_columns, parse_formula
from data_utils.formulas.scaling import decades, scaled, unscaled
from data_utils.formulas.score import Data, admissible, plain_bits, rank_formulas, structure_bits

ALPHABET = Alphabet(list(OPERATORS), ["x1", "x2", "x3"])
NAMES = ["a", "b", "c"]


def rank_formula(prefix, constants, data):
    return rank_formulas(ALPHABET, [(prefix, constants)], data)[0]


def ranked(text, X, y, **known):
    prefix, values = parse_formula(text, NAMES)
    return rank_formula(prefix, values, Data(X, y, **known))


def values_of(prefix, constants, X):
    constants = np.array([constants]) if len(constants) else np.zeros((1, 1))
    return evaluate(ALPHABET, np.array([ALPHABET.encode(prefix)], np.uint8), constants, X[None])[0]


def test_units_go_into_the_constants():
    near = np.random.default_rng(0).uniform(0.5, 2, (9, 3))
    powers = np.array([3, -20, 5])
    X = near * 10.0**powers
    texts = ["3*a*b", "a + 2*b - c/4", "2*exp(-a) + 4*b**2/(c + 7)", "sqrt(a*b) - 1/c", "sin(2*a + 1)*log(b)", "a**b",
             "pow1_3(a)*c**(-1.5)", "abs(a - b)", "(a + b)**2/(b - 3*c)", "2 - a", "5", "tanh(a/b)"]  # fmt: skip
    for text in texts:
        prefix, constants = parse_formula(text, NAMES)
        back = unscaled(prefix, constants, powers, 4, ALPHABET.operators)
        expected = 1e4 * values_of(prefix, constants, near)
        assert values_of(*back, X) == pytest.approx(expected, rel=1e-9), text
    plain = unscaled(["*", "x1", "pow2", "x2"], [], [-2, 3, 0], 1, ALPHABET.operators)
    assert format_formula(*plain, NAMES) == "0.001*a*b**2"


def test_powers_of_numbers_far_from_1_become_exponentials():
    power = ["*", "x2", "pow", "<constant>", "x1"]
    exponential = ["*", "x2", "exp", "*", "<constant>", "x1"]
    for base, powers, expected in ((1e-3, [0, 0], exponential), (0.5, [0, 0], power), (0.5, [-3, 0], exponential)):
        tokens, constants = unscaled(power, [base], powers, 0, ALPHABET.operators)
        assert tokens == expected and len(constants) == 1
        X = np.random.default_rng(0).uniform(0.1, 0.9, (9, 2)) * 10.0 ** np.array(powers)
        values = values_of(tokens, constants, padded_columns(ALPHABET, X))
        near = X / 10.0 ** np.array(powers)
        assert values == pytest.approx(near[:, 1] * base ** near[:, 0])
    assert unscaled(power, [1e-3], [0, 0], 0, ("*", "pow"))[0] == power


def test_columns_that_differ_by_a_power_of_ten_become_the_same_numbers():
    x = np.round(np.random.default_rng(0).uniform(0.1, 50, (40, 1)), 4)
    for k in (-30, -7, 3, 30):
        y = np.array([[float(f"{v!r}e{k}")] for v in x[:, 0].tolist()])
        assert decades(y) == decades(x) + k
        assert (scaled(y, decades(y)) == scaled(x, decades(x))).all()


def test_plain_numbers_are_cheap_and_data_decide_about_digits():
    assert plain_bits(2.0) == plain_bits(-2000.0) < plain_bits(2.5) < plain_bits(2.512) < plain_bits(2.512345)
    assert plain_bits(0.0) < plain_bits(1.0) and plain_bits(math.pi / 2) < plain_bits(1.57079)
    x = np.linspace(1, 9, 30)
    X = np.column_stack([x, x, x])
    noise = np.random.default_rng(0).standard_normal(30)
    formula = ranked("0.3 + 1.99*a", X, 2 * x + 0.05 * noise)
    assert format_formula(formula.prefix, formula.constants, NAMES) == "2*a"
    formula = ranked("0.3 + 1.99*a", X, 2.0345 * x + 0.0005 * noise)
    assert formula.prefix == ["*", "<constant>", "x1"] and formula.constants[0] == pytest.approx(2.0345, abs=1e-3)


def test_formulas_are_ranked_together_as_alone():
    x = np.linspace(0.5, 3, 30)
    X = np.column_stack([x, x[::-1] ** 2, x])
    y = 2 * x + 0.5 * X[:, 1] + 0.01 * np.random.default_rng(0).standard_normal(30)
    texts = [
        "1.9*a + 0.4*b",
        "0.1 + 2.1*a + 0.6*b",
        "a",
        "a + 1.1*b**0.9",
        "1.2*tan(9*a)",
        "3.1 + 0.2*exp(0.3*a*b)",
        "a/0",
    ]
    formulas = [parse_formula(text, NAMES) for text in texts]
    data = Data(X, y)
    together = rank_formulas(ALPHABET, formulas, data)
    for formula, one in zip(formulas, together, strict=True):
        alone = rank_formula(*formula, data)
        assert (one is None) == (alone is None)
        if one:
            assert one.prefix == alone.prefix and one.free == alone.free and one.relative == alone.relative
            assert one.bits == pytest.approx(alone.bits, abs=1e-6) and one.constants == pytest.approx(alone.constants)
    assert format_formula(together[1].prefix, together[1].constants, NAMES) == "2*a + 0.5*b"


def test_bits_do_not_depend_on_units():
    assert plain_bits(1.54e-11) == plain_bits(0.154)  # no multiple of a third
    x = np.geomspace(0.3, 3, 40)
    X = np.column_stack([x, x, x])
    y = 4.2 * x**1.3 * (1 + 0.01 * np.random.default_rng(0).standard_normal(40))
    prefix, _ = parse_formula("2.0123*a**0.7123", NAMES)
    near = rank_formula(prefix, [4.2, 1.3], Data(X, y))
    for k in (-10, 10, 30):  # 10^(1.3 k) has one digit
        formula = rank_formula(prefix, [4.2 * 10 ** (-1.3 * k), 1.3], Data(X * 10.0**k, y))
        assert formula.prefix == near.prefix and formula.constants[1] == near.constants[1], k
        assert formula.bits == pytest.approx(near.bits, abs=0.2), k


def test_noise_in_proportion_to_y_is_seen():
    x = np.geomspace(1, 1e4, 40)
    X = np.column_stack([x, x, x])
    noise = np.random.default_rng(0).standard_normal(40)
    formula = ranked("0.1 + 3*a**0.7", X, 3.4 * x**0.75 * (1 + 0.02 * noise))
    assert formula.relative and formula.prefix[0] == "*" and 0.75 in formula.constants
    assert not ranked("3 + 0.1*a", X, 3 + 0.1 * x + noise).relative


def test_a_constant_more_must_earn_its_bits():
    x = np.linspace(0.1, 3, 12)
    X = np.column_stack([x, x, x])
    y = 2 * x + 0.1 * np.random.default_rng(1).standard_normal(12)
    plain, longer = ranked("0 + 2*a", X, y), rank_formula(*parse_formula("0.3 + 1.7*a + 0.1*sin(3*a)", NAMES),
                                                          Data(X, y))  # fmt: skip
    assert plain.bits <= longer.bits
    few = Data(X[:3], y[:3])
    assert rank_formula(*parse_formula("1.1 + 2.2*a + 3.3*a**2", NAMES), few) is None  # as many as points


def test_rounding_bounds_what_a_fit_can_gain():
    data = Data(np.ones((5, 1)), np.arange(5.0), half=np.full(5, 0.05))
    assert (
        data.residual_bits(1e-20, 1, False) == data.residual_bits(1e-12, 1, False) < data.residual_bits(0.1, 1, False)
    )


@pytest.mark.parametrize(
    "text, good",
    [("sin(3*a)", True), ("sin(50*a)", False), ("tan(0.3*a)", True), ("tan(0.9*a)", False), ("cos(a*b)", True),
     ("(-0.89)**a", False), ("a**b", True), ("(a - 1)**b", False), ("(a - 1)**2", True), ("exp(50*a)", True),
     ("(1e11 - a)**a", False), ("(9 - a)**a", True)],
)  # fmt: skip
def test_what_data_can_support(text, good):
    x = np.linspace(0.1, 3, 20)
    prefix, values = parse_formula(text, NAMES)
    assert admissible(prefix, values, np.column_stack([x, x + 1, x])) is good


def test_functions_within_functions_cost_more():
    def bits(text):
        return structure_bits(parse_formula(text, NAMES)[0], 3)

    assert bits("exp(a) + sin(b)") < bits("exp(sin(a) + b)") < bits("sin(sin(a) + b)")
    assert bits("a*b") < bits("a*b + c") and bits("exp(a)*sin(b)") == bits("sin(b)*exp(a)")
