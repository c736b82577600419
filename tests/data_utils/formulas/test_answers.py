"""The words of a user: operators, terms that may not occur, the Pareto front."""

import numpy as np
import pytest

from data_utils.errors import UsageError
from data_utils.formulas.answers import (
    ARITHMETIC,
    LEFT_OUT,
    check_operators,
    contains,
    read_terms,
    to_answers,
    vocabulary,
)
from data_utils.formulas.expressions import OPERATORS, parse_formula
from data_utils.formulas.score import Data, Ranked


def ranked(text):
    prefix, constants = parse_formula(text, ["x1", "x2"])
    return Ranked(prefix, constants, 0.0, 0.0, len(prefix), False, [True] * len(constants))


def excludes(term, text, names=("x1", "x2")):
    return contains(ranked(text), *read_terms([term], list(names)))


def test_operators():
    assert set(check_operators(())) == set(OPERATORS) - set(LEFT_OUT)
    assert set(check_operators(("sin", "sqrt"))) == {*ARITHMETIC, "sin", "pow1_2"}
    assert "asinh" in check_operators(("asinh",)) and {"pow", "pow2", "pow1_3"} <= set(check_operators(("**",)))
    with pytest.raises(UsageError, match="--operators sinus: no operator.*\nnearest: .*sin"):
        check_operators(("sinus",))
    pool, alphabet = vocabulary(3, check_operators(("sin", "exp")), ("exp",))
    assert "exp" not in alphabet.ids and "sin" in alphabet.ids and pool.variables == ("x1", "x2", "x3")


@pytest.mark.parametrize(
    "term, inside, outside",
    [
        ("sin", "2*sin(x1)", "2*cos(x1)"),
        ("sqrt", "sqrt(x1)", "x1**0.3"),
        ("sqrt", "x1**0.5", "x1**2"),
        ("/", "1/x1", "x1**-1.5"),
        ("**", "sqrt(x1)", "x1*x2"),
        ("x1**2", "exp(3*x1**2)", "x2**2"),
        ("x1*x2", "3 + x1*x2", "x1 + x2"),
        ("x2*x1", "3 + x1*x2", "x1/x2"),
        ("x2", "x1 + x2", "x1**2"),
        ("exp(x1 + x2)", "exp(x2 + x1)", "exp(x1*x2)"),
    ],
)
def test_terms_are_found_however_they_are_written(term, inside, outside):
    assert excludes(term, inside) and not excludes(term, outside)


def test_a_power_that_is_printed_as_a_square_counts_as_one():
    square = Ranked(["pow", "x1", "<constant>"], [2.0], 0.0, 0.0, 3, False, [False])
    assert contains(square, *read_terms(["x**2"], ["x"]))


@pytest.mark.parametrize("term", ["sinus", "x3", "x1 +", "import os", "frobnicate(x1)", "+", "*"])
def test_an_unknown_term_is_an_error(term):
    with pytest.raises(UsageError, match="^--exclude_terms "):
        read_terms([term], ["x1", "x2"])


def test_the_front_holds_what_nothing_shorter_fits_better():
    x = np.linspace(1, 2, 30)
    X, y = np.stack([x, x], 1), 2 * x**2
    _, alphabet = vocabulary(2, check_operators(()))
    formulas = [ranked(text) for text in ("2*x1**2", "2*x1**2 + 0*x2", "3*x1", "2.5*x1", "1.5")]
    answers = to_answers(alphabet, formulas, Data(X, y))
    assert [answer.front for answer in answers] == [True, True, False, True]  # the second says what the first does
    assert answers[0].fvu < 1e-20 and answers[0].numbers == ["2"] and answers[0].length == 4
