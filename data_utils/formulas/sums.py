"""Sums of known parts that explain y: y = h(a + b1 g1 + ... + bk gk), the parts g out of a library.

Orthogonal least squares (Chen, Billings and Luo 1989) with a beam, on what undoes h: the log of y finds products of
powers, its square a root, its inverse a fraction. K parts, M points, W sets in the beam.
"""

import itertools

import numpy as np

from data_utils.formulas.expressions import Program, padded
from data_utils.formulas.prompts import subtrees
from data_utils.formulas.score import FUNCTIONS

LONGEST, MOST, LARGEST = 7, 3000, 1e12  # tokens of a part, parts of a library, what a part may be
DRAWN, PAIRS, TERMS, WIDTH = 64, 32, 6, 16  # parts of a search and products of them, parts of a sum, sets in the beam
SMALL, ALONE, TOGETHER = 16000, 24, 600  # small parts that are tried; the best alone; parts that are summed up
LONGEST_SMALL, DEEPEST, MOST_WRITTEN = 5, 2, 200_000  # tokens of a small part, functions in it, parts of a length
EXACT = 1e-22  # share of the variance below which no better sum is looked for
RELATED = 1e-10  # share of a part's power beyond what was chosen already: less is rounding

# h -> what undoes it, where values of y that h can't have become nan or inf; and the slope of that
LINKS = {
    "": (lambda y: y, np.ones_like),
    "exp": (np.log, lambda y: 1 / y),
    "pow1_2": (lambda y: np.where(y < 0, np.nan, y * y), lambda y: 2 * y),
    "inv": (lambda y: 1 / y, lambda y: 1 / (y * y)),
    "inv pow1_2": (lambda y: np.where(y < 0, np.nan, 1 / (y * y)), lambda y: 2 / (y * y * y)),
    "log": (np.exp, np.exp),
}


def centred(parts, weights):
    """Return rows (K, M) or a row (M,) without the weighted mean, times the weights (M,)."""
    share = weights * weights / np.sum(weights * weights)
    return (parts - (parts @ share)[..., None]) * weights


def choose(parts, y, weights=None, *, width=WIDTH, most=TERMS, start=(), kinds=None):
    """Which rows of `parts` (K, M) sum up to y (M,) -> list of (share of its variance left, tuple of rows).

    Each step adds to the `width` best sets the parts that explain most of what they leave. start: sets of one size to
    begin with, in place of the empty one. kinds: K labels of parts, alike where these differ by constants inside: a set
    has one part of a kind at most, and of sets of the same kinds only the best is kept.
    """
    kinds = range(len(parts)) if kinds is None else kinds
    weights = np.ones(len(y)) if weights is None else weights
    parts, y = centred(parts, weights), centred(y, weights)
    power, total = (parts * parts).sum(1), y @ y
    sets, results = list(start) or [()], []
    left, rest = np.repeat(y[None], len(sets), 0), np.repeat(parts[None], len(sets), 0)  # orthogonal to each set

    def add(i, k, last=False):
        """Return what is left of y and, but for the last time, of the parts after part k[n] joined set i[n]."""
        with np.errstate(all="ignore"):  # parts that the set explains already, such as all others of two rows
            unit = rest[i, k] / np.sqrt((rest[i, k] ** 2).sum(1))[:, None]
        new = left[i] - (left[i] * unit).sum(1)[:, None] * unit
        return new, rest if last else rest[i] - (rest[i] @ unit[:, :, None]) * unit[:, None]

    for members in zip(*sets, strict=True):
        left, rest = add(np.arange(len(sets)), np.array(members))
    for size in range(len(sets[0]), most):
        power_left = (rest * rest).sum(2)
        usable = power_left > RELATED * power
        gain = np.where(usable, (rest @ left[:, :, None])[:, :, 0] ** 2 / np.where(usable, power_left, 1.0), -1.0)
        error = (left * left).sum(1)[:, None] - gain
        kept = {}  # a set is reached in several orders
        for place in np.argsort(error, axis=None, kind="stable").tolist():
            i, k = divmod(place, len(parts))
            inside = [kinds[member] for member in sets[i]]
            if usable[i, k] and kinds[k] not in inside:
                kept.setdefault(tuple(sorted((*inside, kinds[k]))), (i, k))
            if len(kept) == width:
                break
        if not kept:
            break
        sets = [tuple(sorted((*sets[i], k))) for i, k in kept.values()]
        left, rest = add(*np.array(list(kept.values())).T, size + 1 == most)
        results += zip(((left * left).sum(1) / total).tolist(), sets, strict=True)
    return results


def best_pairs(parts, y, weights, most=WIDTH):
    """Return the two rows of `parts` (K, M) that explain y (M,) best, of all pairs -> as `choose`."""
    parts, y = centred(parts, weights), centred(y, weights)
    size = np.sqrt((parts * parts).sum(1))
    unit = parts / np.where(size > 0, size, 1.0)[:, None]
    along, common = unit @ y / np.sqrt(y @ y), unit @ unit.T
    gain = np.square(along - common * along[:, None])  # of the second part, on what the first leaves
    rest = 1 - np.square(common, out=common)
    gain /= np.where(rest > RELATED, rest, np.inf)
    gain += np.square(along)[:, None]
    gain[np.tri(len(gain), dtype=bool)] = 0.0
    best = np.argpartition(gain, max(gain.size - most, 0), axis=None)[-most:]
    best = best[np.argsort(-gain.ravel()[best], kind="stable")]
    pairs = [divmod(place, len(gain)) for place in best.tolist()]
    return [(max(0.0, 1 - float(gain[pair])), pair) for pair in pairs if gain[pair] > 0]


def plain_pairs(parts, y, weights=None, most=WIDTH):
    """Sums and differences of two rows of `parts` (K, M) that y (M,) is linear in -> list of (share left, i, sign, k).

    A constant less than `choose` asks for: under noise that is what tells the law from what fits as well.
    """
    weights = np.ones(len(y)) if weights is None else weights
    parts, y = centred(parts, weights), centred(y, weights)
    gram, along, total = parts @ parts.T, parts @ y, y @ y
    i, k = np.triu_indices(len(parts), 1)
    results = []
    for sign in (1, -1):
        power = gram[i, i] + gram[k, k] + 2 * sign * gram[i, k]
        usable = power > RELATED * (gram[i, i] + gram[k, k])
        gain = np.where(usable, (along[i] + sign * along[k]) ** 2 / np.where(usable, power, 1.0), 0.0)
        best = np.argsort(-gain, kind="stable")[:most]
        results += [(max(0.0, 1 - gain[b] / total), int(i[b]), sign, int(k[b])) for b in best.tolist()]
    return results


def small_parts(alphabet, operators, columns, most=SMALL):
    """Return the formulas of up to five tokens without constants about columns, id tuples, shortest first.

    operators: ids; columns: ids of variables. Of a length with more than `most` formulas only so many are returned, and
    none of one with too many to write down.
    """
    names = {int(i): alphabet.tokens[i] for i in operators}
    unary = [i for i, name in names.items()
             if alphabet.arity[i] == 1 and not name.startswith(("mult", "div")) and name != "neg"]  # fmt: skip
    binary = [i for i in names if alphabet.arity[i] == 2]
    functions = {i for i, name in names.items() if name in FUNCTIONS}
    rows, every = {1: [(v,) for v in columns]}, [(v,) for v in columns]
    for length in range(2, LONGEST_SMALL + 1):
        pairs = [(rows[left], rows[length - 1 - left]) for left in range(1, length - 1)]
        if len(binary) * sum(len(left) * len(right) for left, right in pairs) > MOST_WRITTEN:
            break
        new = [(b, *f, *g) for left, right in pairs for f, g in itertools.product(left, right) for b in binary
               if f <= g or names[b] not in ("+", "*")]  # fmt: skip
        for g in rows[length - 1]:
            if length < LONGEST_SMALL or g[0] in binary:  # five functions of one column say little
                deep = sum(token in functions for token in g) >= DEEPEST
                new += [(u, *g) for u in unary if not (deep and u in functions)]
        rows[length] = new[:: -(-len(new) // most) or 1]
        every += rows[length]
    return every


class Library:
    """Parts without constants, their values at X (M, all variables), y (M,), how often they came.

    Columns, products and quotients of two of them, and the parts that proposals had.
    """

    def __init__(self, alphabet, X, y, weights=None):
        self.alphabet, self.X, self.y = alphabet, X, y
        self.weights = np.ones(len(y)) if weights is None else weights  # of residuals of y
        self.counts, self.values = {}, {}
        self.columns = [alphabet.first_variable + v for v in np.flatnonzero(np.ptp(X, 0)).tolist()]
        self.add([(v,) for v in self.columns])
        for sign, pairs in (("*", itertools.combinations), ("/", itertools.permutations)):
            if sign in alphabet.ids:
                self.add([(alphabet.ids[sign], *pair) for pair in pairs(self.columns, 2)])

    def add(self, rows):
        """Count the short parts of id lists."""
        new = {}
        for row in map(tuple, rows):
            for part in subtrees(row, self.alphabet):
                if part in self.counts:
                    self.counts[part] += 1
                elif len(part) <= LONGEST and self.alphabet.constant not in part:
                    new[part] = new.get(part, 0) + 1
        new = {part: n for part, n in new.items() if max(part) >= self.alphabet.first_variable}
        if not new or len(self.counts) > MOST:
            return
        for part, value in self.usable(list(new)):
            self.counts[part], self.values[part] = new[part], value

    def usable(self, parts):
        """Return (part, its values (M,)) of the parts, id tuples, that are finite, not too large, not constant."""
        with np.errstate(all="ignore"):
            values = Program(self.alphabet, padded(parts), self.X)(np.zeros((len(parts), 1)))
            good = np.isfinite(values).all(1) & (np.abs(values).max(1) < LARGEST) & (np.ptp(values, 1) > 0)
        return [(parts[i], values[i]) for i in np.flatnonzero(good).tolist()]

    def sweep(self, operators, parsimony):
        """Try all small parts under each link: the best alone, sums of the best and of the shortest -> as a call."""
        usable = self.usable(small_parts(self.alphabet, operators, self.columns)) if self.columns else []
        if not usable:
            return []
        kinds = centred(np.array([value for _, value in usable]), np.ones(len(self.y)))
        kinds = kinds / np.take_along_axis(kinds, np.abs(kinds).argmax(1)[:, None], 1)
        unique = {}  # of parts that differ by a + b g the shortest
        for part, kind in zip(usable, np.round(kinds, 9) + 0.0, strict=True):
            unique.setdefault(kind.tobytes(), part)
        rows, values = [row for row, _ in unique.values()], np.array([value for _, value in unique.values()])
        results = []
        for link in LINKS:
            target = self.target(link)
            if target is None:
                continue
            y, weights = target
            parts, goal = centred(values, weights), centred(y, weights)
            share = 1 - (parts @ goal) ** 2 / np.maximum((parts * parts).sum(1), 1e-300) / (goal @ goal)
            order = np.argsort(share, kind="stable")
            best = order[:ALONE].tolist()
            results += [(float(share[i]), self._row(link, [rows[i]])) for i in best]
            several = sorted({*range(min(TOGETHER, len(rows))), *order[:TOGETHER].tolist()})
            sums = best_pairs(values[several], y, weights) if len(several) > 1 else []
            sums += choose(values[several], y, weights, start=[pair for _, pair in sums])
            results += [(left, self._row(link, [rows[several[k]] for k in chosen])) for left, chosen in sums]
        return [(np.log10(max(share, EXACT)) + parsimony * len(row), row) for share, row in results]

    def target(self, link):
        """Return what a sum under a link is to be, (M,), and the weights of its residuals; None where y has none."""
        if not {"+", "*", *link.split()} <= self.alphabet.ids.keys():
            return None
        with np.errstate(all="ignore"):
            undo, slope = LINKS[link]
            y, weights = undo(self.y), self.weights / np.abs(slope(self.y))
        largest = np.abs(y).max()
        if not np.isfinite(y).all() or np.ptp(y) <= RELATED * largest or not 0 < weights.max() < np.inf:
            return None
        y, weights = y / largest, weights / weights.max()
        return (y, weights) if np.square(centred(y, weights)).sum() > 0 else None  # a few values may have all weight

    def __call__(self, rng, parsimony):
        """Sums of some parts, under a link or none -> (score, id list) of the best, constants still to be fitted."""
        ids, names, values = self.alphabet.ids, list(self.counts), list(self.values.values())
        link = str(rng.choice(list(LINKS)[1:])) if rng.random() < 0.5 else ""
        target = self.target(link)
        if not names or target is None:
            return []
        y, weights = target
        shares = np.array([n / len(part) for part, n in self.counts.items()])
        chosen = rng.choice(len(names), min(DRAWN, len(names)), replace=False, p=shares / shares.sum())
        parts = {names[i]: values[i] for i in chosen}
        with np.errstate(all="ignore"):
            if link != "exp":
                pairs = rng.choice(chosen, (PAIRS, 2))
                parts |= {(ids["*"], *names[i], *names[k]): values[i] * values[k] for i, k in pairs}
            elif "log" in ids:  # sums of logs are products
                parts |= {(ids["log"], *g): np.log(v) for g, v in parts.items() if (v > 0).all()}
        names, values = list(parts), np.array(list(parts.values()))
        sums = choose(values, y, weights)
        rows = [self._row(link, [names[i] for i in chosen]) for _, chosen in sums]
        signs = {1: ids["+"], -1: ids.get("-")}
        for share, i, sign, k in plain_pairs(values, y, weights) if signs[-1] else ():
            sums.append((share, (i, k)))
            rows.append(self._row(link, [(signs[sign], *names[i], *names[k])]))
        return [(np.log10(max(share, EXACT)) + parsimony * len(row), row)
                for (share, _), row in zip(sums, rows, strict=True)]  # fmt: skip

    def _row(self, link, parts):
        plus, times = self.alphabet.ids["+"], self.alphabet.ids["*"]
        row = list(parts[0])
        for part in parts[1:]:
            row = [plus, *row, times, self.alphabet.constant, *part]
        if not link:
            return row
        return [*self.alphabet.encode(link.split()), times if link == "exp" else plus, self.alphabet.constant, *row]
