"""Distributions written as text: `0.5*normal(0,5)|0.25*int(1,9)|0.25*signed_log(1e-3,1e3)`.

A mixture is terms joined by `|`, each with a weight `w*` (1 without one). Weights are scaled to a sum of 1. Numbers:

| term | draws |
| --- | --- |
| constant(a), or a number | a |
| uniform(a,b), normal(mean,std), cauchy(middle,scale), triangular(low,mode,high) | as named |
| int(a,b) | an integer from a to b, both included, each equally likely |
| log_int(a,b) | the same, but as the floor of a log-uniform number |
| log(a,b), signed_log(a,b) | log-uniform; with either sign |

A support is the interval from which the x of one variable are drawn: a row (low, high, kind). Kind 0 is uniform from
low to high, 1 and -1 are log-uniform with that sign, and 2 draws a sign for each x.

| term | support |
| --- | --- |
| interval(A,B) | between two draws of number distributions, clipped to +-30 |
| textbook(A) | [0, s], [-s, s] or [s, 5 s], where s is a draw of A |
| decade(a,b) | one or two decades between 10^a and 10^b, of positive, of negative or of either sign |
"""

import ast
import difflib
import functools
import math
from collections import namedtuple

import numpy as np
from numpy.random import Generator

from data_utils.errors import UsageError

CLIP = 30.0  # ends of an interval
LONGEST = 1000  # characters of a text

# draw(rng, *arguments, shape); how many arguments; allowed(*numbers), None where they are distributions of numbers;
# the condition of `allowed` in words.
Term = namedtuple("Term", "draw count allowed words")


def _constant(rng, value, shape):
    return np.full(shape, value)


def _cauchy(rng, middle, scale, shape):
    return middle + scale * rng.standard_cauchy(shape)


def _int(rng, low, high, shape):
    return rng.integers(int(low), int(high), shape, endpoint=True).astype(float)


def _log(rng, low, high, shape):
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _log_int(rng, low, high, shape):
    return np.clip(np.floor(_log(rng, low, high + 1, shape)), low, high)


def _signed_log(rng, low, high, shape):
    return _log(rng, low, high, shape) * rng.choice([-1.0, 1.0], shape)


def _triangular(rng, low, mode, high, shape):
    return rng.triangular(low, mode, high, shape) if low < high else np.full(shape, low)


def _interval(rng, one, other, shape):
    ends = np.clip(np.stack([one(rng, shape), other(rng, shape)], -1), -CLIP, CLIP)
    return np.concatenate([np.sort(ends, -1), np.zeros((*shape, 1))], -1)


def _textbook(rng, size, shape):
    size = size(rng, shape)[..., None]
    choice = rng.integers(0, 3, shape)
    return size * np.array([[0, 1, 0], [-1, 1, 0], [1, 5, 0]])[choice]


def _decade(rng, low, high, shape):
    width = np.minimum(rng.integers(1, 3, shape), high - low)
    start = rng.uniform(low, high - width)
    return np.stack([10**start, 10 ** (start + width), rng.choice([-1, 1, 2], shape)], -1)


def _whole(a, b):
    return a <= b and a == int(a) and b == int(b)


NUMBERS = {
    "constant": Term(_constant, 1, lambda a: True, ""),
    "uniform": Term(Generator.uniform, 2, lambda a, b: a <= b, "low <= high"),
    "normal": Term(Generator.normal, 2, lambda a, b: b >= 0, "std >= 0"),
    "cauchy": Term(_cauchy, 2, lambda a, b: b >= 0, "scale >= 0"),
    "int": Term(_int, 2, _whole, "integers, low <= high"),
    "log": Term(_log, 2, lambda a, b: 0 < a <= b, "0 < low <= high"),
    "log_int": Term(_log_int, 2, lambda a, b: 0 < a and _whole(a, b), "integers, 0 < low <= high"),
    "signed_log": Term(_signed_log, 2, lambda a, b: 0 < a <= b, "0 < low <= high"),
    "triangular": Term(_triangular, 3, lambda a, b, c: a <= b <= c, "low <= mode <= high"),
}
SUPPORTS = {
    "interval": Term(_interval, 2, None, ""),
    "textbook": Term(_textbook, 1, None, ""),
    "decade": Term(_decade, 2, lambda a, b: -300 <= a < b <= 300, "-300 <= low < high <= 300"),
}


def parse_distribution(text: str | float, support: bool = False):
    """Return the function (rng, shape) -> float64 array that `text` describes.

    Numbers have that shape, supports (*shape, 3). Raises UsageError, with the column, for any other text.
    """
    return _parse(" ".join(str(text).split()), support)


@functools.cache  # every batch asks for the same few texts
def _parse(text, support):
    if len(text) > LONGEST:
        raise UsageError(f"a distribution of {len(text)} characters: expected {LONGEST} or fewer")
    try:
        tree = ast.parse(text, mode="eval").body  # the notation is that of Python; nothing is executed
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        column = getattr(e, "offset", 1) or 1
        raise UsageError(
            f"distribution {text!r}, column {column}: expected terms like 0.5*normal(0,1), joined by |"
        ) from e
    return _mixture(text, tree, SUPPORTS if support else NUMBERS)


def _fail(text, node, expected):
    source = ast.get_source_segment(text, node)
    raise UsageError(f"distribution {text!r}, column {node.col_offset + 1}: expected {expected}, found {source}")


def _mixture(text, tree, table):
    """Return the function of terms joined by |, each of a name in `table`."""
    terms = []
    node = tree
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        terms.append(node.right)
        node = node.left
    terms.append(node)
    weights, functions = zip(*(_term(text, term, table) for term in reversed(terms)), strict=True)
    weights = np.array(weights)
    if weights.min() < 0 or not weights.sum() > 0:
        _fail(text, tree, "weights of 0 or more that are not all 0")
    return _mix(weights / weights.sum(), functions) if len(functions) > 1 else functions[0]


def _term(text, node, table):
    """Return (weight, function) of one term."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _number(text, node.left), _call(text, node.right, table)
    if table is NUMBERS and not isinstance(node, ast.Call):
        value = _number(text, node)
        return 1.0, lambda rng, shape: np.full(shape, value)
    return 1.0, _call(text, node, table)


def _number(text, node):
    try:
        value = ast.literal_eval(node)
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except (ValueError, OverflowError):
        pass
    _fail(text, node, "a number")


def _call(text, node, table):
    """Return the function of a call like normal(0,1)."""
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        _fail(text, node, f"perhaps {near[0]}" if near else f"one of {' '.join(table)}")
    draw, count, allowed, words = table[name]
    if len(node.args) != count or node.keywords:
        _fail(text, node, f"{name} with {count} arguments")
    if allowed:
        arguments = [_number(text, argument) for argument in node.args]
    else:
        arguments = [_mixture(text, argument, NUMBERS) for argument in node.args]
    if allowed and not allowed(*arguments):
        _fail(text, node, f"{name} with {words}")
    return lambda rng, shape: draw(rng, *arguments, _tuple(shape))


def _mix(weights, functions):
    ends = np.cumsum(weights)[:-1]

    def draw(rng, shape):
        choice = np.searchsorted(ends, rng.random(shape), "right").reshape(-1)
        parts = [function(rng, (int((choice == i).sum()),)) for i, function in enumerate(functions)]
        values = np.empty((len(choice), *parts[0].shape[1:]))
        for i, part in enumerate(parts):
            values[choice == i] = part
        return values.reshape(*_tuple(shape), *values.shape[1:])

    return draw


def _tuple(shape):
    return (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
