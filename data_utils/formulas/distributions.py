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

import difflib
import functools
import re
from collections import namedtuple

import numpy as np
from numpy.random import Generator

from data_utils.errors import UsageError

CLIP = 30.0  # ends of an interval
LONGEST = 1000  # characters of a text
TOKEN = re.compile(r"\s*(?:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\S))")
END, NUMBER, NAME, SIGN = range(4)  # kinds of tokens: the groups of TOKEN

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


def parse_distribution(text, support=False):
    """Return the function (rng, shape) -> float64 array that `text` describes.

    Numbers have that shape, supports (*shape, 3). Raises UsageError, with the column, for any other text.
    """
    return _parse(str(text), support)


@functools.cache  # every batch asks for the same few texts
def _parse(text, support):
    return _Parser(text).read(SUPPORTS if support else NUMBERS)


class _Parser:
    """Read a text from left to right; `place` is the next of its tokens (text, kind, column)."""

    def __init__(self, text):
        if len(text) > LONGEST:
            raise UsageError(f"a distribution of {len(text)} characters: expected {LONGEST} or fewer")
        self.text = text
        self.place = 0
        matches = TOKEN.finditer(text.rstrip())
        self.tokens = [(m[m.lastindex], m.lastindex, m.start(m.lastindex) + 1) for m in matches]
        self.tokens.append(("the end", END, len(text.rstrip()) + 1))

    def read(self, table):
        """Return the function of the whole text, of terms in `table`."""
        function = self.mixture(table)
        if self.tokens[self.place][1] != END:
            self.fail("| and another term, or the end")
        return function

    def fail(self, expected, place=None):
        token, _, column = self.tokens[self.place if place is None else place]
        raise UsageError(f"distribution {self.text!r}, column {column}: expected {expected}, found {token}")

    def take(self, sign):
        """Return whether the next token is `sign`, and step over it."""
        token, kind, _ = self.tokens[self.place]
        matches = kind == SIGN and token == sign
        self.place += matches
        return matches

    def number(self):
        token, kind, _ = self.tokens[self.place]
        if kind != NUMBER or not np.isfinite(float(token)):
            self.fail("a number")
        self.place += 1
        return float(token)

    def mixture(self, table):
        start = self.place
        terms = [self.term(table)]
        while self.take("|"):
            terms.append(self.term(table))
        weights = np.array([weight for weight, _ in terms])
        if len(terms) == 1 and weights[0] > 0:
            return terms[0][1]
        if weights.min() < 0 or not weights.sum() > 0:
            self.fail("weights of 0 or more that are not all 0", start)
        return _mix(weights / weights.sum(), [function for _, function in terms])

    def term(self, table):
        """Return (weight, function) of one term."""
        weight = 1.0
        if self.tokens[self.place][1] == NUMBER:
            weight = self.number()
            if not self.take("*"):
                if table is SUPPORTS:
                    self.fail("*")
                return 1.0, lambda rng, shape: np.full(shape, weight)
        return weight, self.call(table)

    def call(self, table):
        start = self.place
        name, kind, _ = self.tokens[start]
        if kind != NAME or name not in table:
            near = difflib.get_close_matches(name, table, 1) if kind == NAME else []
            self.fail(f"perhaps {near[0]}" if near else f"one of {' '.join(table)}")
        draw, count, allowed, words = table[name]
        self.place += 1
        if not self.take("("):
            self.fail("(")
        arguments = []
        for i in range(count):
            if i and not self.take(","):
                self.fail(f"a comma: {name} takes {count}")
            arguments.append(self.number() if allowed else self.mixture(NUMBERS))
        if not self.take(")"):
            self.fail(f"): {name} takes {count}")
        if allowed and not allowed(*arguments):
            self.fail(f"{name} with {words}", start)
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
