"""Formulas as text, Python, LaTeX and sympy, and the digits of their constants."""

import ast
import re

import numpy as np
import pytest

from data_utils.formulas.expressions import OPERATORS, Alphabet, evaluate, parse_formula
from data_utils.formulas.formats import (
    FORMATS,
    GROWTH,
    STYLES,
    identifiers,
    latex_name,
    number_text,
    round_constants,
    to_sympy,
    write_equation,
    write_formula,
)
from data_utils.formulas.score import Data, Ranked
from tests.helpers import run_python

NAMES = ["T_K", "lambda", "a b"]
ALPHABET = Alphabet(OPERATORS, ["x1", "x2", "x3"])
FORMULAS = """2*x1**2 + 3.5/(x1 - -2); -0.5*sin(x2)**2; exp(-x1/2)*cos(3*x2 + 1); cbrt(x1*x2); 1/(1 + exp(-2*x1))
x1 - (x2 - 3); x1*-2; (x1 + 1)**-3; 6.6e-34*x1*1e8; x1/x2/x3; x1/(x2*x3); abs(x1)**2.5; -(x1**2); x1**x2**2
(x1**x2)**2; 2**-x1; atan(x1) + pi*e; sqrt(x1)**3; pow1_5(x1 - x2); pow1_4(x1); 3*4*x1; asinh(x1); mult3(x1 + x2)
div2(x1 + x2)**2; neg(x1)**2; acosh(1 + x1); atanh(x1/9); asin(x1/9)*acos(x2/9); x1**-2.5; log(x1)*tanh(x2); 1 - (-x1)
-(x1 - x2)*(-3); pow4(x1 + x2)/pow5(x3); sinh(x1)/cosh(x1)*tan(x1); pow4(pow3(x1)); pow2(pow5(-x2 - 1)); div2(inv(x1))
div5(inv(x1 + x2)); mult3(inv(x1))"""
FORMULAS = [text.strip() for text in re.split("[;\n]", FORMULAS)]


def points(n=20):
    return np.random.default_rng(0).uniform(0.3, 2, (n, 3))


def values(prefix, constants, X):
    row = np.array([ALPHABET.encode(prefix)], np.uint8)
    return evaluate(ALPHABET, row, np.array([constants or [0.0]]), X[None])[0]


def written(text):
    prefix, constants = parse_formula(text, ["x1", "x2", "x3"])
    return prefix, constants, [number_text(value) for value in constants]


def test_every_operator_has_every_format():
    assert set(STYLES) == set(FORMATS)
    assert all(templates.keys() == OPERATORS.keys() for templates, _ in STYLES.values())


@pytest.mark.parametrize("text", FORMULAS)
def test_text_is_read_back_as_the_same_formula(text):
    prefix, constants, numbers = written(text)
    again = parse_formula(write_formula(prefix, numbers, ["x1", "x2", "x3"]), ["x1", "x2", "x3"])
    np.testing.assert_allclose(values(*again, points()), values(prefix, constants, points()), rtol=1e-14)


@pytest.mark.parametrize("text", FORMULAS)
def test_python_runs_and_gives_the_same_numbers(text):
    prefix, constants, numbers = written(text)
    code = write_equation(prefix, numbers, NAMES, "y (m)", "python")
    X = points()
    arguments = {"x1": X[:, 0], "x2": X[:, 1], "x3": X[:, 2]}
    used = [arguments[f"x{i}"] for i in (1, 2, 3) if f"x{i}" in prefix]
    np.testing.assert_allclose(run_python(code, "y_m", *used), values(prefix, constants, X), rtol=1e-14)


def test_powers_of_powers_and_fractions_are_written_as_one():
    written = {"pow4 pow3 x1": "T_K**12", "div2 inv x1": "1/(2*T_K)", "mult3 inv x1": "3/T_K"}
    assert {prefix: write_formula(prefix.split(), [], NAMES) for prefix in written} == written
    assert write_formula("pow4 pow3 x2".split(), [], ["T", r"\lambda"], "latex") == r"\lambda^{12}"


def test_python_takes_whole_numbers():
    for text in ("x1**5", "x1**-2.0", "1/x1", "2*x1**-3"):
        prefix, constants, numbers = written(text)
        code = write_equation(prefix, numbers, NAMES, "y", "python")
        x = np.array([1, 20000, 30000])
        expected = values(prefix, constants, np.stack([x, x, x], 1).astype(float))
        np.testing.assert_allclose(run_python(code, "y", x), expected, rtol=1e-14)


@pytest.mark.parametrize("text", FORMULAS)
def test_sympy_gives_the_same_numbers(text):
    sympy = pytest.importorskip("sympy")
    prefix, constants, numbers = written(text)
    expression = to_sympy(prefix, constants, NAMES)
    X, expected = points(3), values(prefix, constants, points(3))
    symbols = [sympy.Symbol(name, real=True) for name in NAMES]
    assert expression.free_symbols <= set(symbols)
    for row, y in zip(X.tolist(), expected.tolist(), strict=True):
        assert float(expression.subs(dict(zip(symbols, row, strict=True)))) == pytest.approx(y, rel=1e-12)
    code = write_equation(prefix, numbers, NAMES, "y", "sympy")
    symbols = ", ".join(f"sp.Symbol({name!r}, real=True): {x!r}" for name, x in zip(NAMES, X[0].tolist(), strict=True))
    code += f"\ndef value():\n    return float((y + sp.Integer(0)).subs({{{symbols}}}))"
    assert run_python(code, "value") == pytest.approx(expected[0], rel=1e-12)


def test_latex():
    def latex(text):
        prefix, _, numbers = written(text)
        return write_equation(prefix, numbers, NAMES, "y_max", "latex").removeprefix("y_{\\mathrm{max}} = ")

    assert latex("2*x1**2") == "2 \\, T_{K}^{2}"
    assert latex("6.6e-34/x2") == "\\frac{6.6 \\times 10^{-34}}{\\lambda}"
    assert latex("3*4*x1") == "3 \\cdot 4 \\, T_{K}"
    assert latex("sin(x1)**2 - -3") == "\\left(\\sin\\left(T_{K}\\right)\\right)^{2} + 3"
    assert latex("(x1/x2)**2") == "\\left(\\frac{T_{K}}{\\lambda}\\right)^{2}"
    assert latex("exp(-x1)") == "e^{-T_{K}}" and latex("x1**x2**2") == "T_{K}^{\\lambda^{2}}"
    assert latex("x1*-2") == "T_{K} \\, \\left(-2\\right)" and latex("x3") == "\\mathrm{a\\ b}"
    for text in FORMULAS:
        assert latex(text).count("{") == latex(text).count("}")
        assert latex(text).count("\\left") == latex(text).count("\\right")


def test_latex_is_drawn_by_matplotlib():
    mathtext = pytest.importorskip("matplotlib.mathtext")
    parser = mathtext.MathTextParser("path")
    for text in FORMULAS:
        prefix, _, numbers = written(text)
        parser.parse(f"${write_equation(prefix, numbers, NAMES, 'y', 'latex')}$")


def test_names_become_identifiers_and_latex():
    names = ["x", "lambda", "a b", "a-b", "1st", "np", "Δt", "%", "a_b", "λ [nm]"]
    assert identifiers(names) == ["x", "lambda_", "a_b", "a_b_", "x1st", "np_", "Δt", "x_", "a_b__", "λ_nm"]
    assert identifiers(["x²", "m³ b"]) == ["x", "m_b"]
    assert all(name.isidentifier() and ast.parse(name) for name in identifiers(names))
    names = ["v", "lambda", "T_max", "x1", "x_10", "period_s", "a_", "50% & $"]
    expected = ["v", "\\lambda", "T_{\\mathrm{max}}", "x_{1}", "x_{10}", "\\mathrm{period\\_s}", "\\mathrm{a\\_}"]
    assert [latex_name(name) for name in names] == [*expected, "\\mathrm{50\\%\\ \\&\\ \\$}"]


def test_numbers_are_written_short_and_read_back():
    expected = {2.0: "2", 2455000.37: "2455000.37", 6.62607015e-34: "6.62607015e-34", -0.001: "-0.001", 3e8: "3e8"}
    expected |= {0.0: "0", 1e6: "1000000", 1e22: "1e22", 1 / 3: "0.3333333333333333"}
    assert {value: number_text(value) for value in expected} == expected
    assert (
        number_text(-0.0) == "0"
        and number_text(2455000.37, 3) == "2460000"
        and number_text(6.62607015e-34, 4) == "6.626e-34"
    )
    for value in 10 ** np.random.default_rng(0).uniform(-300, 300, 200):
        assert float(number_text(value)) == value and float(number_text(value, 5)) == pytest.approx(value, rel=1e-4)


def fitted(text, x, y):
    """A formula with its constants as they are, Data, and the texts of the constants."""
    prefix, constants = parse_formula(text, ["x1"])
    data = Data(x[:, None], y)
    formula = Ranked(prefix, constants, 0.0, 0.0, len(prefix), False, [True] * len(constants))
    return prefix, constants, round_constants(ALPHABET, formula, data)


def residual(prefix, constants, x, y):
    return np.sqrt(np.mean((values(prefix, constants, np.stack([x, x, x], 1)) - y) ** 2))


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("n", [12, 300, 3000])
@pytest.mark.parametrize(
    "text", ["3.0123456789*sin(0.8607103160519981*(x1 - 2455000.371234567))", "x1*2.0000000123 - 4910000.123456"]
)
def test_printed_constants_keep_the_fit_and_no_more(text, n, noise):
    rng = np.random.default_rng(n)
    x = np.sort(2455000 + 100 * rng.random(n))
    y = values(*parse_formula(text, ["x1"]), np.stack([x, x, x], 1)) + noise * rng.standard_normal(n)
    prefix, constants, numbers = fitted(text, x, y)
    before, after = (residual(prefix, c, x, y) for c in (constants, [float(number) for number in numbers]))
    assert after <= before * (1 + GROWTH) + 1e-12 * np.abs(y).max()
    digits = [len(re.sub(r"e.*|\D", "", number).lstrip("0")) for number in numbers]
    if noise:  # a digit less in all constants would show
        coarse = [float(f"{c:.{max(d - 2, 1) - 1}e}") for c, d in zip(constants, digits, strict=True)]
        assert residual(prefix, coarse, x, y) ** 2 > before**2 * (1 + 0.01 / n)


def test_digits_of_a_date_of_a_constant_and_of_a_plain_number():
    x = np.linspace(2455000, 2455100, 60)
    y = 3 * np.sin(0.8607103160519981 * (x - 2455000.37))
    assert fitted("3.0*sin(0.8607103160519981*(x1 - 2455000.37))", x, y)[2] == ["3", "0.860710316052", "2455000.37"]
    x = np.arange(1.0, 5)
    assert fitted("1.9999999999999998*x1", x, 2 * x)[2] == ["2"]
    assert round_constants(
        ALPHABET, Ranked(["<constant>"], [1 / 3], 0, 0, 1, False, [True]), Data(x[:, None], x), 3
    ) == ["0.333"]
