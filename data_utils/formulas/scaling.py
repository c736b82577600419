"""Columns brought near 1 by powers of ten before a search, and formulas about them brought back to the user's units."""

import math

import numpy as np

from data_utils.formulas.expressions import LITERALS, OPERATORS
from data_utils.formulas.simplify import NotReal, simplify

POWERS = {"pow2": 2, "pow3": 3, "pow4": 4, "pow5": 5}
ROOTS = {"pow1_2": 2, "pow1_3": 3, "pow1_4": 4, "pow1_5": 5}
MOST_BASE = math.log(10)  # logarithm of the largest base of a power that is not written with exp
SCALES = {f"mult{k}": float(k) for k in (2, 3, 4, 5)} | {f"div{k}": 1 / k for k in (2, 3, 4, 5)}


def decades(x):
    """Return for each column of x (M, ...) the power of ten next to the median of its magnitudes, int (...)."""
    size = np.abs(np.where(x == 0, np.nan, x))
    median = np.array([np.nanmedian(column) if np.isfinite(column).any() else 1.0 for column in np.atleast_2d(size.T)])
    return np.rint(np.log10(median)).astype(int).reshape(np.shape(x)[1:])


def scaled(x, powers):
    """Return x (M, ...) / 10^powers, to 15 digits: columns that differ by a power of ten become the same numbers."""
    flat = np.atleast_2d(np.asarray(x).T)
    texts = [[f"{v:.15g}" for v in column] for column in flat.tolist()]
    columns = []
    for column, power in zip(texts, np.ravel(powers).tolist(), strict=True):
        shifted = []
        for text in column:
            mantissa, _, exponent = text.partition("e")
            shifted.append(float(f"{mantissa}e{int(exponent or 0) - power}"))
        columns.append(shifted)
    return np.array(columns).T.reshape(np.shape(x))


def unscaled(prefix, constants, powers, power=0, operators=None):
    """Turn a formula about x / 10^powers and y / 10^power into one about x and y -> tokens, constants.

    Factors move up the tree: through products, powers and roots to one constant, into the arguments of functions, and
    between the terms of a sum. The formula gets at most one constant more for each term and function, and powers of
    numbers far from 1 become exponentials.
    """
    tokens, values = iter(prefix), iter(constants)

    def number(value):
        return float(value), None, []

    def scaled_tree(factor, tree, numbers):
        """Write factor x tree."""
        if tree is None:
            return ["<constant>"], [factor]
        if factor == 1:
            return tree, numbers
        return ["*", "<constant>", *tree], [factor, *numbers]

    def read():
        """Return (factor, tree, its constants) of the next subtree; tree is None for a number."""
        token = next(tokens)
        if token == "<constant>":
            return number(next(values))
        if token in LITERALS:
            return number(LITERALS[token])
        if token not in OPERATORS:
            return 10.0 ** -int(powers[int(token[1:]) - 1]), [token], []
        operands = [read() for _ in range(OPERATORS[token].arity)]
        (a, tree, numbers), *others = operands
        if others:
            (b, right, more) = others[0]
            if token == "*":
                factors = [part for part in (tree, right) if part]
                joined = ["*", *factors[0], *factors[1]] if len(factors) == 2 else factors[0] if factors else None
                return a * b, joined, [*numbers, *more]
            if token == "/":
                if right is None:
                    return a / b, tree, numbers
                return a / b, ["/", *tree, *right] if tree else ["inv", *right], [*numbers, *more]
            if token in "+-":
                b = -b if token == "-" else b
                if tree is None and right is None:
                    return number(a + b)
                if tree is None:
                    return b, ["+", "<constant>", *right], [a / b, *more]
                second, seconds = scaled_tree(b / a, right, more)
                return a, ["+", *tree, *second], [*numbers, *seconds]
            if right is None and (a > 0 or b == int(b)):  # a power with a constant exponent
                return (a**b, None, []) if tree is None else (a**b, ["pow", *tree, "<constant>"], [*numbers, b])
            base, bases = scaled_tree(a, tree, numbers)
            exponent, exponents = scaled_tree(b, right, more)
            return 1.0, ["pow", *base, *exponent], [*bases, *exponents]
        if token in SCALES or token == "neg":
            return a * SCALES.get(token, -1.0), tree, numbers
        if token in POWERS:
            return a ** POWERS[token], tree and [token, *tree], numbers
        if token == "inv":
            return 1 / a, tree and [token, *tree], numbers
        if token in ROOTS and (a > 0 or ROOTS[token] % 2):
            return math.copysign(abs(a) ** (1 / ROOTS[token]), a), tree and [token, *tree], numbers
        if token == "abs":
            return abs(a), tree and [token, *tree], numbers
        argument, numbers = scaled_tree(a, tree, numbers)
        return 1.0, [token, *argument], numbers

    try:
        factor, tree, numbers = read()
        tree, numbers = scaled_tree(factor * 10.0 ** int(power), tree, numbers)
        return with_exp(*simplify(tree, numbers, operators), operators)
    except (NotReal, OverflowError, ZeroDivisionError):  # beyond the range of floats
        return None


def with_exp(prefix, constants, operators=None):
    """Return a formula with exp(log(c) u) for c^u where c is a number below 0.1 or above 10 -> tokens, constants."""
    tokens, numbers, values = [], [], iter(constants)
    for token in prefix:
        tokens.append(token)
        if token == "<constant>":
            numbers.append(next(values))
            if tokens[-2:-1] == ["pow"] and numbers[-1] > 0 and abs(math.log(numbers[-1])) > MOST_BASE:
                if operators is None or "exp" in operators:
                    tokens[-2:] = ["exp", "*", "<constant>"]
                    numbers[-1] = math.log(numbers[-1])
    return tokens, numbers
