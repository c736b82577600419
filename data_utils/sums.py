"""Sums of known parts that explain y: y ~ h(a + b1 g1 + ... + bk gk), the parts g taken from a library.

Orthogonal least squares (Chen, Billings and Luo 1989) with a beam, on y and on what undoes h: the log of y finds
products of powers, its square a root, its inverse a fraction. K parts, M points, W beam width.
"""

import numpy as np

from data_utils.expressions import Program
from data_utils.sr_data import subtrees

LONGEST, MOST, LARGEST = 7, 3000, 1e12  # tokens of a part, parts of a library, what a part may be
TINY = 1e-10  # share of a part's power that what was chosen before leaves unexplained: less is rounding

# h of the sum -> what undoes it; all that y may be is checked by whether the result is finite
LINKS = {
    "": lambda y: y,
    "exp": lambda y: np.log(y),
    "pow1_2": lambda y: np.where(y >= 0, y * y, np.nan),
    "inv": lambda y: 1 / y,
    "log": lambda y: np.exp(y / max(1.0, np.abs(y).max() / 30)),
}


def choose(parts, y, *, width=16, most=6):
    """Sets of rows of `parts` (K, M) whose sums explain y (M,) -> list of (share of y left, tuple of indices).

    Each step adds to each of the `width` best sets the part that explains most of what is left; sets of every size are
    returned, the best first within a size.
    """
    parts, y = parts - parts.mean(1, keepdims=True), y - y.mean()
    power = (parts * parts).sum(1)
    whole = y @ y
    left, rest, sets, found = y[None], parts[None], [()], []
    for _ in range(most):
        own = (rest * rest).sum(2)  # (W, K)
        usable = own > TINY * power
        gain = np.where(usable, (rest @ left[:, :, None])[:, :, 0] ** 2 / np.where(usable, own, 1.0), -1.0)
        error = (left * left).sum(1)[:, None] - gain
        kept = {}
        for flat in np.argsort(error, axis=None, kind="stable")[: 4 * width]:
            row, k = divmod(int(flat), len(parts))
            if usable[row, k]:
                kept.setdefault(tuple(sorted((*sets[row], k))), (row, k))
        if not kept:
            break
        sets = list(kept)[:width]
        rows, chosen = np.array([kept[key] for key in sets]).T
        unit = rest[rows, chosen] / np.sqrt(own[rows, chosen])[:, None]
        left = left[rows] - (left[rows] * unit).sum(1)[:, None] * unit
        rest = rest[rows] - (rest[rows] @ unit[:, :, None]) * unit[:, None]
        found += [(float(share), key) for share, key in zip((left * left).sum(1) / whole, sets, strict=True)]
    return found


class Library:
    """Parts g without constants, what they are at X (M, D) of all variables, and how often proposals had them."""

    def __init__(self, alphabet, X, y):
        self.alphabet, self.X, self.y = alphabet, X, y
        self.places, self.counts, self.values = {}, [], np.zeros((0, len(y)))
        self.add([(alphabet.first_variable + v,) for v in np.flatnonzero(np.ptp(X, 0))])

    def add(self, rows):
        """Count the short sub-expressions without constants of id tuples."""
        new = {}
        for row in rows:
            for part in subtrees(row, self.alphabet):
                if len(part) > LONGEST or self.alphabet.constant in part or max(part) < self.alphabet.first_variable:
                    continue
                if part in self.places:
                    self.counts[self.places[part]] += 1
                else:
                    new[part] = new.get(part, 0) + 1
        if not new or len(self.places) >= MOST:
            return
        tokens = np.zeros((len(new), LONGEST), np.uint8)
        for i, part in enumerate(new):
            tokens[i, : len(part)] = part
        values = Program(self.alphabet, tokens, self.X)(np.zeros((len(new), 1)))
        good = np.isfinite(values).all(1) & (np.abs(values).max(1) < LARGEST)
        good[good] &= np.ptp(values[good], axis=1) > 0
        for part, fine in zip(new, good, strict=True):
            if fine:
                self.places[part] = len(self.counts)
                self.counts.append(new[part])
        self.values = np.concatenate([self.values, values[good]])

    def __call__(self, rng, size=48):
        """Draw some of the parts, explain y by sums of them -> id lists, constants still to be fitted."""
        names, parts = list(self.places), self.values
        lengths = np.array([len(name) for name in names])
        weights = np.sqrt(self.counts) / lengths
        chosen = rng.choice(len(names), min(size, len(names)), replace=False, p=weights / weights.sum())
        name = str(rng.choice(list(LINKS))) if rng.random() < 0.5 else ""
        with np.errstate(all="ignore"):
            y, parts = LINKS[name](self.y), parts[chosen]
        names = [list(names[i]) for i in chosen]
        if not np.isfinite(y).all() or name and name not in self.alphabet.ids or not np.ptp(y):
            return []
        if name == "exp":
            log = self.alphabet.ids["log"]
            positive = (parts > 0).all(1)
            parts = np.concatenate([np.log(parts[positive]), parts])
            names = [[log, *part] for part, good in zip(names, positive, strict=True) if good] + names
        best = {}
        for share, key in choose(parts, y):
            if len(key) not in best or share < best[len(key)][0]:
                best[len(key)] = share, key
        return [self._row(name, [names[i] for i in key]) for _, key in best.values() if name or len(key) > 1]

    def _row(self, name, parts):
        plus, times, c = self.alphabet.ids["+"], self.alphabet.ids["*"], self.alphabet.constant
        row = parts[0]
        for part in parts[1:]:
            row = [plus, *row, times, c, *part]
        if name == "exp":
            return [self.alphabet.ids[name], times, c, *row]
        return [self.alphabet.ids[name], plus, c, *row] if name else row
