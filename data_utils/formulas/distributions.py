"""Distributions written as text: `0.5*normal(0,5)|0.25*int(1,9)|0.25*signed_log(1e-3,1e3)`.

A mixture is terms joined by `|`, each with a weight `w*` (1 without), scaled to a sum of 1. Numbers:

| term | draws |
| --- | --- |
| constant(a), or a number | a |
| uniform(a,b), normal(mean,std), cauchy(middle,scale), triangular(low,mode,high) | as named |
| int(a,b), log_int(a,b) | a to b, both ends included: all alike; as the floor of a log-uniform number |
| log(a,b), signed_log(a,b) | log-uniform; with either sign |

Supports, where the x of one variable are drawn, are rows (low, high, kind): kind 0 is uniform from low to high, 1 and
-1 log-uniform from low to high with that sign, 2 with a sign for each x.

| term | support |
| --- | --- |
| interval(A,B) | between two draws of number distributions, clipped to +-30 |
| textbook(A) | [0, s], [-s, s] or [s, 5 s], s a draw of A |
| decade(a,b) | one or two decades between 10^a and 10^b, of positive, of negative or of either sign |
"""

import difflib
import functools
import re

import numpy as np

from data_utils.errors import UsageError

CLIP = 30.0  # ends of an interval
LONGEST = 1000  # characters of a text
TOKEN = re.compile(r"\s*(?:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\S))")


def _log(rng, shape, low, high):
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


def _log_int(rng, shape, low, high):
    return np.clip(np.floor(_log(rng, shape, low, high + 1)), low, high)


def _signed_log(rng, shape, low, high):
    return _log(rng, shape, low, high) * rng.choice([-1.0, 1.0], shape)


def _triangular(rng, shape, low, mode, high):
    return rng.triangular(low, mode, high, shape) if low < high else np.full(shape, low)


def _interval(rng, shape, one, other):
    ends = np.clip(np.stack([one(rng, shape), other(rng, shape)], -1), -CLIP, CLIP)
    return np.concatenate([np.sort(ends, -1), np.zeros((*shape, 1))], -1)


def _textbook(rng, shape, size):
    size, kind = size(rng, shape)[..., None], rng.integers(0, 3, shape)
    return size * np.array([[0, 1, 0], [-1, 1, 0], [1, 5, 0]])[kind]


def _decade(rng, shape, low, high):
    width = np.minimum(rng.integers(1, 3, shape), high - low)
    start = rng.uniform(low, high - width)
    return np.stack([10**start, 10 ** (start + width), rng.choice([-1, 1, 2], shape)], -1)


# what draws, what it takes ("number" or "distribution" each), and the condition on numbers, in words too
NUMBERS = {
    "constant": (lambda rng, shape, a: np.full(shape, a), 1, lambda a: True, ""),
    "uniform": (lambda rng, shape, a, b: rng.uniform(a, b, shape), 2, lambda a, b: a <= b, "low <= high"),
    "normal": (lambda rng, shape, a, b: rng.normal(a, b, shape), 2, lambda a, b: b >= 0, "std >= 0"),
    "cauchy": (lambda rng, shape, a, b: a + b * rng.standard_cauchy(shape), 2, lambda a, b: b >= 0, "scale >= 0"),
    "int": (lambda rng, shape, a, b: rng.integers(int(a), int(b), shape, endpoint=True).astype(float), 2,
            lambda a, b: a <= b and a == int(a) and b == int(b), "integers, low <= high"),
    "log": (_log, 2, lambda a, b: 0 < a <= b, "0 < low <= high"),
    "log_int": (_log_int, 2, lambda a, b: 0 < a <= b and a == int(a) and b == int(b), "integers, 0 < low <= high"),
    "signed_log": (_signed_log, 2, lambda a, b: 0 < a <= b, "0 < low <= high"),
    "triangular": (_triangular, 3, lambda a, b, c: a <= b <= c, "low <= mode <= high"),
}  # fmt: skip
SUPPORTS = {
    "interval": (_interval, 2, None, ""),
    "textbook": (_textbook, 1, None, ""),
    "decade": (_decade, 2, lambda a, b: -300 <= a < b <= 300, "-300 <= low < high <= 300"),
}


def parse(text, support=False):
    """Return the function (rng, shape) -> float64 array that `text` describes.

    Numbers have that shape, supports (*shape, 3). Raises UsageError, with the column, on anything else.
    """
    return _parsed(str(text), support)


@functools.cache  # the same few texts in every batch
def _parsed(text, support):
    return _Parser(text).read(SUPPORTS if support else NUMBERS)


class _Parser:
    def __init__(self, text):
        self.text, self.place, self.tokens = text, 0, []
        if len(text) > LONGEST:
            raise UsageError(f"a distribution of {len(text)} characters: expected {LONGEST} or fewer")
        for found in TOKEN.finditer(text.rstrip()):
            self.tokens.append((found[found.lastindex], found.lastindex, found.start(found.lastindex) + 1))
        self.tokens.append(("the end", 0, len(text.rstrip()) + 1))

    def read(self, table):
        function = self.mixture(table)
        if self.tokens[self.place][1]:
            self.fail("| and another term, or the end")
        return function

    def fail(self, expected, place=None):
        found, _, column = self.tokens[self.place if place is None else place]
        raise UsageError(f"distribution {self.text!r}, column {column}: expected {expected}, found {found}")

    def take(self, sign):
        matches = self.tokens[self.place][0] == sign and self.tokens[self.place][1] == 3
        self.place += matches
        return matches

    def number(self):
        token, kind, _ = self.tokens[self.place]
        if kind != 1 or not np.isfinite(float(token)):
            self.fail("a number")
        self.place += 1
        return float(token)

    def mixture(self, table):
        start, terms = self.place, [self.term(table)]
        while self.take("|"):
            terms.append(self.term(table))
        weights = np.array([weight for weight, _ in terms])
        if len(terms) == 1 and weights[0] > 0:
            return terms[0][1]
        if weights.min() < 0 or not weights.sum() > 0:
            self.fail("weights of 0 or more that are not all 0", start)
        return _mix(weights / weights.sum(), [function for _, function in terms])

    def term(self, table):
        weight = 1.0
        if self.tokens[self.place][1] == 1:
            weight = self.number()
            if not self.take("*"):
                if table is SUPPORTS:
                    self.fail("*", self.place)
                return 1.0, lambda rng, shape: np.full(shape, weight)
        return weight, self.call(table)

    def call(self, table):
        name, kind, _ = self.tokens[self.place]
        if kind != 2 or name not in table:
            close = difflib.get_close_matches(name, table, 1) if kind == 2 else []
            self.fail(f"perhaps {close[0]}" if close else f"one of {' '.join(table)}")
        draw, count, allowed, words = table[name]
        start, self.place = self.place, self.place + 1
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
        return lambda rng, shape: draw(rng, _tuple(shape), *arguments)


def _mix(weights, functions):
    ends = np.cumsum(weights)[:-1]

    def draw(rng, shape):
        which = np.searchsorted(ends, rng.random(shape), "right").reshape(-1)
        parts = [function(rng, (int((which == i).sum()),)) for i, function in enumerate(functions)]
        found = np.empty((len(which), *parts[0].shape[1:]))
        for i, part in enumerate(parts):
            found[which == i] = part
        return found.reshape(*_tuple(shape), *found.shape[1:])

    return draw


def _tuple(shape):
    return (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
