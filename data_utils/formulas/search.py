"""A formula for given points: candidates are proposed, bred, summed up of parts, fitted all at once, tidied, ranked.

M points, D variables, N candidates (rows of prefix ids, see expressions.py). A network proposes what it read off the
points (arXiv 2602.08885), the prior what training draws; offspring are a genetic programme's (Koza 1992).
"""

import itertools
import math
import time
from collections import namedtuple

import numpy as np
import torch

from data_utils.formulas.expressions import evaluate, padded, padded_columns
from data_utils.formulas.fit import fit, refine, spread, wrap
from data_utils.formulas.forms import screen, starts, terms
from data_utils.formulas.scaling import decades, scaled, unscaled
from data_utils.formulas.score import LEAST_POWER, Data, rank_formulas, rank_mean, refit, structure_bits
from data_utils.formulas.simplify import NotReal, simplify
from data_utils.formulas.skeletons import make_chunk, operator_weights
from data_utils.formulas.sums import Library

ROUND, LEAST_ROUND = 384, 128  # candidates that are fitted together: of up to FIT_POINTS rows, of many
ARCHIVE, DONORS = 100, 6000  # candidates that are bred from; proposals that lend them parts
PERFECT = 1e-22  # FVU (MSE over the variance of y) that the formula itself stays below; those close to it don't
SOLVED = 2.0**-23  # FVU below which float32 sees no difference
PER_CONSTANT = 6  # points for each constant but one of a perfect formula that ends the search: long sums fit anything
FIT_POINTS, LONGEST, CONSTANTS = 64, 24, 6
EXACT = 1e-22  # FVU below which the search does not look for a better fit, only for a shorter formula
SEARCHED, ROUGH, REFITTED = 512, 1000, 8  # rows that the search sees, that rank; formulas fitted to all rows
SEARCHING, MARGIN = (0.92, 0.75), 0.3  # share of max_seconds before few, many rows are ranked; seconds left over
MANY = 200  # rows
NATURAL, RAW = 2, 10.0  # decades within which columns are also searched in the user's units; bits this must earn
SHAPES, STARTS = 256, 3  # general forms that are fitted together; starts of each that are fitted well
EXTENDED = 6  # forms of each number of constants to which a plain term is added
SHAPING, AFTER_STOP = 0.3, 2.0  # share of max_seconds for them; seconds of ranking after Ctrl+C
FEW = 10  # points below which formulas without an offset are ranked, too
TIED = 0.05  # share by which a and b of a + b g may differ to be tried as one constant
ALWAYS, RANKED = 4, 64  # formulas that are ranked, whatever the deadline; that are ranked together
RANGE = 60  # decades of y beyond which it is ranked scaled
SCREENED = 5  # columns that are searched, where there are more
DONATED, FINAL = 40, 40  # general forms that are bred from; candidates of each kind that may be ranked
BEHIND = 50  # bits by which a candidate may be behind the best one to be ranked
SUMS, KEPT, LONGEST_SUM = 16, 8, 40  # searches for sums in a round, sums that are fitted, tokens of one
SWEPT = 64  # the best of all small formulas and of their sums, which are fitted
DRAWS = 4096  # trees of the prior that are drawn at a time
HOT = 1.3  # temperature of the draws once they repeat themselves

Candidate = namedtuple("Candidate", "prefix constants fvu length score")


class Prior:
    """prior(rng, n) -> n skeletons as training draws them, id lists over at most D variables. held: HoldOut."""

    def __init__(self, alphabet, pool, D, held=None):
        self.alphabet, self.pool, self.held = alphabet, pool, held
        self.last = alphabet.first_variable + D  # ids from here on are variables that the points lack
        self.rows, self.ends, self.left = [], np.zeros(0), 0

    def __call__(self, rng, n, temperature=None):
        if self.left <= 0:  # most of these were tried
            chunk, _ = make_chunk(rng, DRAWS, self.alphabet, self.pool, self.held)
            fits = chunk.tokens.max(1) < self.last
            self.rows, self.ends = chunk.tokens[fits], np.sqrt(chunk.counts[fits]).cumsum()
            self.left = len(self.rows)
        self.left -= n
        chosen = np.searchsorted(self.ends, rng.random(n) * self.ends[-1], "right")
        return [[t for t in row if t] for row in self.rows[chosen].tolist()]


class Network:
    """network(rng, n) -> n skeletons that the model reads off the points, each time off others and in another order.

    alphabet: of these id lists, None = the model's. There are fewer where it lacks their tokens.
    """

    def __init__(self, model, X, y, alphabet=None, *, max_points, prompt=(), numbers=(), width=0, **sampling):
        """width: of a beam, which then proposes the same each time but for points and order; 0 = draws."""
        self.model, self.X, self.y, self.max_points, self.width = model, X, y, max_points, width
        self.alphabet = alphabet or model.alphabet
        self.sampling = dict(prompt=prompt, numbers=numbers) | sampling

    def scale(self, powers, power):
        """Read columns over 10^powers and y over 10^power from now on."""
        self.X, self.y = scaled(self.X, powers), scaled(self.y, power)

    def __call__(self, rng, n, temperature=None):
        alphabet, D = self.model.alphabet, self.X.shape[1]
        device = next(self.model.parameters()).device
        rows = rng.permutation(len(self.X))[: self.max_points]
        order = rng.permutation(D) if not self.sampling["prompt"] else np.arange(D)  # a prompt names variables
        points = np.zeros((len(rows), len(alphabet.variables) + 1))
        points[:, :D], points[:, -1] = self.X[rows][:, order], self.y[rows]
        used = torch.zeros(1, len(alphabet.variables), dtype=torch.bool, device=device)
        used[:, :D] = True
        data = torch.from_numpy(points)[None]  # float64, which mps lacks: the model scales it before it moves it
        with torch.no_grad():
            encoded = self.model.encode(data, torch.ones(1, len(rows), dtype=torch.bool), used)
            generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
            settings = self.sampling | (dict(temperature=temperature) if temperature else {})
            if self.width:
                kept = {name: settings[name] for name in ("max_len", "prompt", "numbers")}
                drawn, _ = self.model.beam(encoded, self.width, **kept)
            else:
                drawn, _ = self.model.sample(encoded, n, generator=generator, **settings)
        ids = [self.alphabet.ids.get(token) for token in alphabet.tokens]
        for i, v in enumerate(order.tolist()):
            ids[alphabet.first_variable + i] = self.alphabet.first_variable + v
        rows = [[ids[t] for t in row if t] for row in drawn.tolist()]
        return [row for row in rows if None not in row]


def offspring(rng, archive, donors, alphabet, pool, D):
    """One skeleton bred from the best: a subtree exchanged, cut to a leaf, wrapped in an operator, or a token swapped.

    archive: id lists, best first; donors: id lists. Returns an id list that need not be in normal form.
    """
    parent = archive[int(len(archive) * rng.random() ** 2)]
    begin = int(rng.integers(len(parent)))
    end = subtree_end(alphabet, parent, begin)
    leaves = [alphabet.constant, *range(alphabet.first_variable, alphabet.first_variable + D)]
    kind = rng.random()
    if kind < 0.5:
        others = donors if kind < 0.3 and donors else archive
        donor = others[int(rng.integers(len(others)))]
        cut = int(rng.integers(len(donor)))
        part = donor[cut : subtree_end(alphabet, donor, cut)]
    elif kind < 0.65:
        part = [int(rng.choice(leaves))]
    elif kind < 0.85:
        arity = 2 if rng.random() < 0.6 or not len(operator_weights(alphabet, pool)[1][0]) else 1
        operator = _operator(rng, alphabet, pool, arity)
        part = [operator, *parent[begin:end], *([int(rng.choice(leaves))] if arity == 2 else [])]
    else:
        arity = int(alphabet.arity[parent[begin]])
        part = [
            int(rng.choice(leaves)) if not arity else _operator(rng, alphabet, pool, arity),
            *parent[begin + 1 : end],
        ]
    return [*parent[:begin], *part, *parent[end:]]


def _operator(rng, alphabet, pool, arity):
    ids, weights = operator_weights(alphabet, pool)[arity]
    return int(rng.choice(ids, p=weights / weights.sum()))


def subtree_end(alphabet, row, begin):
    """Place after the sub-expression that begins at `begin`."""
    need, place = 1, begin
    while need:
        need += int(alphabet.arity[row[place]]) - 1
        place += 1
    return place


def normal(alphabet, row, longest):
    """The normal form of an id list without what a + b g gives it anyway, as a tuple; None if it can't be used."""
    try:
        prefix = simplify(alphabet.decode(row), operators=alphabet.operators)[0]
    except NotReal:
        return None
    if len(prefix) > longest or prefix.count("<constant>") > CONSTANTS or not all(t in alphabet.ids for t in prefix):
        return None
    row = alphabet.encode(prefix)
    while (inner := _inside(alphabet, row)) != row:
        row = inner
    return tuple(row) if max(row) >= alphabet.first_variable else None


def _inside(alphabet, row):
    """g of a row that is g plus, minus, times or over a number, or the row itself."""
    name = alphabet.tokens[row[0]]
    if name == "neg" or name.startswith(("mult", "div")):
        return row[1:]
    if name in ("+", "-", "*", "/"):
        cut = subtree_end(alphabet, row, 1)
        left, right = row[1:cut], row[cut:]
        if max(left) < alphabet.first_variable and (name != "/"):
            return right
        if max(right) < alphabet.first_variable:
            return left
    return row


def fvu(y, predicted):
    """MSE over the variance of y; inf where a prediction is not finite."""
    if not np.isfinite(predicted).all():
        return np.inf
    largest = np.abs(y).max() or 1.0  # squares of large values are no floats
    with np.errstate(over="ignore"):
        return float(np.mean(((y - predicted) / largest) ** 2) / np.var(y / largest))


def predict(alphabet, formula, X):
    """Values of a formula (prefix tokens and constants, as in Ranked) at X (M, D): (M,)."""
    constants = np.asarray(formula.constants, float)[None] if len(formula.constants) else np.zeros((1, 1))
    row = np.array([alphabet.encode(formula.prefix)], np.uint8)
    return evaluate(alphabet, row, constants, padded_columns(alphabet, X)[None])[0]


class Search:
    """The candidates of one search, in columns over 10^powers and y over 10^power.

    relative: the kind of residuals (see score.Data.weights); exclude: token lists that may not occur in a formula;
    longest: tokens of a formula at most; cost: bits that its formulas have besides their own.
    """

    def __init__(
        self, alphabet, pool, data, powers, power, relative, rng, *, parsimony, exclude=(), longest=0, cost=0.0
    ):
        self.alphabet, self.pool, self.data, self.rng = alphabet, pool, data, rng
        self.powers, self.power, self.relative = powers, power, relative
        self.parsimony, self.exclude = parsimony, exclude
        self.cost = cost
        self.columns, self.weights = padded_columns(alphabet, data.X), data.weights[relative]
        self.spread = spread(data.y, self.weights) or 1e-300
        self.longest = longest or max(LONGEST, pool.max_length)
        self.longest_sum = longest or LONGEST_SUM
        few = rng.permutation(data.n)[:FIT_POINTS]
        self.library = Library(alphabet, self.columns[few], data.y[few], self.weights[few])
        self.seen, self.donors, self.hot, self.tried = set(), [], False, 0
        self.archive, self.sums, self.shapes, self.front = [], [], [], []

    def unseen(self, rows, longest):
        """Return the normal forms of id lists that are new and allowed, in a fixed order."""
        keys = {normal(self.alphabet, row, longest) for row in rows} - self.seen - {None}
        self.seen.update(keys)
        return sorted(key for key in keys if not contains(self.alphabet.decode(key), self.exclude))

    def fitted(self, rows, by, **settings):
        """Fit a + b g for id lists -> Candidates. Those with as many constants as points, less one, are left out."""
        if not rows:
            return []
        constants, error = by(self.alphabet, padded(rows), self.columns, self.data.y, rng=self.rng, affine=True,
                              weights=self.weights, **settings)  # fmt: skip
        return self.candidates(rows, constants, error)

    def candidates(self, rows, constants, error):
        """Return Candidates of fitted id lists, without those that have too many constants for the points."""
        candidates = []
        for row, c, e in zip(rows, constants, error, strict=True):
            count = 2 + list(row).count(self.alphabet.constant)
            if np.isfinite(e) and count < max(self.data.n - 1, 4):  # of few points the offset may go
                score = np.log10(max(e, EXACT)) + self.parsimony * len(row)
                candidates.append(Candidate(list(row), c[:count].tolist(), float(e), len(row), float(score)))
        return candidates

    def bits(self, candidate):
        """Return roughly the bits of a candidate, before its constants are looked at one by one."""
        n, count = self.data.n, len(candidate.constants)
        free = min(count, n - 1)
        error = self.data.deviation(candidate.fvu, free, self.relative) / self.spread
        digits = 1 + max(0.5 * math.log2(n), 0.5 * math.log2(n) - math.log2(error))  # no more than y itself has
        structure = structure_bits(self.alphabet.decode(candidate.prefix), self.data.D)
        return structure + count * digits + self.data.residual_bits(candidate.fvu, free, self.relative)

    def fit_shapes(self, deadline, batch=None):
        """Fit the general forms of forms.py, all of them roughly, then the most promising well.

        batch: (id list, start of its constants, whether it may lack a plain term) of these forms, where they are known.
        Returns those that fitted best.
        """
        batch = batch or [
            (self.alphabet.encode(prefix), constants, general)
            for prefix, constants, general in starts(
                self.alphabet, self.data, self.weights, self.rng, self.powers, self.power, deadline
            )
            if len(prefix) <= self.longest_sum and not contains(prefix, self.exclude)
        ]
        composed = {tuple(row) for row, _, general in batch if not general}
        few = self.rng.permutation(self.data.n)[:FIT_POINTS]
        rough = self._shapes([start[:2] for start in batch], few, 8, deadline)
        kept = {}
        rough.sort(key=self.bits)
        self.shapes = rough[:FINAL]  # these are there when Ctrl+C ends the fits below
        for candidate in rough:
            starting = kept.setdefault(tuple(candidate.prefix), [])
            if len(starting) < STARTS:
                starting.append((candidate.prefix, candidate.constants[2:]))
        best = {*list(kept)[:SHAPES], *[prefix for prefix in kept if prefix not in composed][:SHAPES]}
        chosen = [start for prefix, starting in kept.items() if prefix in best for start in starting]
        unique = {}
        for candidate in sorted(self._shapes(chosen, slice(None), 60, deadline), key=lambda c: c.fvu):
            unique.setdefault(tuple(candidate.prefix), candidate)
        self.shapes = sorted(unique.values(), key=self.bits)
        longer, counts = [], {}
        for shape in self.shapes:
            if tuple(shape.prefix) in composed:
                continue
            count = counts[len(shape.constants)] = counts.get(len(shape.constants), 0) + 1
            for term in terms(self.data.D) if count <= EXTENDED else ():
                prefix = ["+", *self.alphabet.decode(shape.prefix), "*", "<constant>", *term]
                if self.alphabet.ids.keys() >= set(prefix) and not contains(prefix, self.exclude):
                    longer.append((self.alphabet.encode(prefix), [*shape.constants[2:], 0.0]))
        for candidate in sorted(self._shapes(longer, slice(None), 30, deadline), key=lambda c: c.fvu):
            unique.setdefault(tuple(candidate.prefix), candidate)
        self.shapes = sorted(unique.values(), key=self.bits)
        self.tried += len(batch) + len(longer)
        general = [shape for shape in self.shapes if tuple(shape.prefix) not in composed]
        self.keep(archive=general[:DONATED])  # offspring of factors that fit by chance led astray
        return [(c.prefix, c.constants[2:], tuple(c.prefix) not in composed) for c in rough[: len(rough) // 4]]

    def _shapes(self, batch, points, steps, deadline):
        """Fit (id list, start of its constants) to some points -> Candidates."""
        candidates = []
        y = self.data.y[points]
        size = max(16, SHAPES * FIT_POINTS // max(len(y), FIT_POINTS))  # many points: fewer forms at a time
        for a in range(0, len(batch), size):
            if candidates and time.monotonic() > deadline:
                break
            rows, start = [row for row, _ in batch[a : a + size]], [c for _, c in batch[a : a + size]]
            padded_start = np.ones((len(rows), max(1, *map(len, start))))
            for i, constants in enumerate(start):
                padded_start[i, : len(constants)] = constants
            fitted = fit(self.alphabet, padded(rows), self.columns[points], y, 1, self.rng,
                         steps=steps, affine=True, start=padded_start, weights=self.weights[points])  # fmt: skip
            candidates += self.candidates(rows, *fitted)
        return candidates

    def best(self, candidates):
        return sorted(candidates, key=lambda candidate: candidate.score)[:ARCHIVE]

    def keep(self, archive=(), sums=()):
        """Take up fitted candidates."""
        self.archive, self.sums = self.best(self.archive + list(archive)), self.best(self.sums + list(sums))
        self.front = front(self.front + list(archive) + list(sums))

    def breed(self, propose, prior, n, evolve, restarts, refiner):
        """Fit about n candidates: proposals and offspring of the best so far, then sums of parts that they had."""
        rng, D = self.rng, self.data.D
        bred = int(n * evolve) if len(self.archive) >= 20 else 0
        new = []
        if not bred or len(self.donors) < DONORS // 2 or rng.random() < 0.3:
            if self.hot and prior:
                new = propose(rng, (n - bred + 1) // 2, HOT) + prior(rng, (n - bred) // 2)
            else:
                new = propose(rng, n - bred)
            self.donors = (self.donors + new)[-DONORS:]
            self.tried += n - bred
        rows = self.unseen(new, self.longest)
        self.hot = self.hot or len(rows) < len(new) / 2
        parents = [candidate.prefix for candidate in self.archive]
        offsprings = [offspring(rng, parents, self.donors, self.alphabet, self.pool, D) for _ in range(bred)]
        rows += self.unseen(offsprings, self.longest)
        self.keep(archive=self.fitted(rows, refine, method=refiner, points=FIT_POINTS, restarts=restarts))
        self.tried += bred
        if evolve:
            self.library.add(new)
            pairs = sorted(pair for _ in range(SUMS) for pair in self.library(rng, self.parsimony))
            shares = [Candidate(row, [], score - self.parsimony * len(row), len(row), score) for score, row in pairs]
            new = [candidate.prefix for candidate in shares[:KEPT] + front(shares)]
            self.keep(sums=self.fitted(self.unseen(new, self.longest_sum), fit, restarts=2, steps=20))
            self.tried += len(new)

    def sweep(self):
        """Fit the best of all small formulas without constants, and sums of them."""
        operators = [i for ids, _ in operator_weights(self.alphabet, self.pool).values() for i in ids.tolist()]
        scored = self.library.sweep(operators, self.parsimony)
        shares = [Candidate(row, [], score - self.parsimony * len(row), len(row), score) for score, row in scored]
        best = sorted(shares, key=lambda candidate: candidate.score)[:SWEPT] + front(shares)
        rows = self.unseen([candidate.prefix for candidate in best], self.longest_sum)
        self.keep(sums=self.fitted(rows, fit, restarts=2, steps=20))
        self.tried += len(rows)

    def leader(self):
        """Return the Candidate with the best score so far, or None."""
        return min(self.archive[:1] + self.sums[:1], key=lambda candidate: candidate.score, default=None)

    def finalists(self):
        """Return the candidates that may be the answer, the most promising first, and the best of each length."""
        pool = {}
        for candidate in self.front + self.shapes[:FINAL] + self.archive[:FINAL] + self.sums[:FINAL]:
            key = tuple(candidate.prefix), tuple(f"{c:.6g}" for c in candidate.constants)
            pool.setdefault(key, candidate)
        bits = {key: self.bits(candidate) for key, candidate in pool.items()}
        least = min(bits.values(), default=0.0)
        best_of_length = {id(candidate) for candidate in front(list(pool.values()))}
        kept = [key for key in pool if bits[key] < least + BEHIND or id(pool[key]) in best_of_length]
        return [pool[key] for key in sorted(kept, key=bits.get)]


def contains(prefix, excluded):
    """Whether one of the token lists stands somewhere in prefix tokens."""
    prefix = list(prefix)
    return any(prefix[i : i + len(part)] == list(part) for part in excluded for i in range(len(prefix)))


def find_formula(
    propose, X, y, *, alphabet, pool, rng, prior=None, choices=512, evolve=0.7, restarts=4, parsimony=0.05,
    max_seconds=0.0, refiner="lm", sigma=None, half=None, exclude=(), longest=0, shapes=True, stop=False, watch=None,
):  # fmt: skip
    """Search a formula y = f(x) -> (list of score.Ranked, best first; how many candidates were fitted).

    propose: Network or Prior; prior: where half the proposals come from once it repeats itself. X: (M, D), y: (M,),
    finite; sigma: (M,) uncertainties of y; half: (M,) half a unit of the last digit of y as it was written. exclude:
    token lists that may not occur; longest: tokens of a formula at most. Rounds go on until `choices` were tried, or
    with max_seconds until these are nearly over: the rest is for ranking. A perfect fit ends them after as many
    candidates again, since a simpler one may follow. Ctrl+C ends them too. watch(best Candidate, seconds) is called
    after each round.

    The search sees columns in units near 1, so that its answer does not depend on units. If the user's units are not
    far from these, every other round sees columns as they are: in radians sin(x) needs no constant. There the network
    proposes, in the other rounds the prior.
    """
    begin = time.monotonic()
    deadline = begin + max_seconds if max_seconds else math.inf
    X, y = np.asarray(X, float), np.asarray(y, float)
    powers, power = decades(X), int(decades(y))
    power = max(power, math.floor(math.log10(np.abs(y).max() or 1.0)) - RANGE)  # the squares of all must be floats
    rows = np.sort(rng.permutation(len(y))[:SEARCHED])
    near = Data(scaled(X[rows], powers), scaled(y[rows], power), None if sigma is None else sigma[rows],
                None if half is None else scaled(half[rows], power))  # fmt: skip
    active = list(range(X.shape[1]))
    if isinstance(propose, Prior):
        active = screen(near.X, near.y, near.weights[False], rng, SCREENED)
        if len(active) < X.shape[1]:
            near.X, near.D = near.X[:, active], len(active)
            propose = prior = Prior(alphabet, pool, len(active), propose.held)
    powers, settings = powers[active], dict(parsimony=parsimony, exclude=exclude, longest=longest)
    searches = [Search(alphabet, pool, near, powers, power, relative, rng, **settings) for relative in (False, True)
                if near.weights[relative] is not None]  # fmt: skip
    apart = np.random.default_rng(rng.integers(2**62))  # for the user's units, which change no draw of the others
    tried = 0
    try:
        if shapes and evolve:  # without evolution only proposals count
            batch = None
            for search in reversed(searches):  # residuals in proportion to y first: they see small values too
                batch = search.fit_shapes(begin + SHAPING * max_seconds if max_seconds else math.inf, batch)
            searches.sort(key=lambda search: search.bits(search.shapes[0]) if search.shapes else math.inf)
        best = other = searches[0]
        natural = np.abs(powers).max() <= NATURAL
        if natural and powers.any():
            raw = near.subset(np.arange(near.n))
            raw.X = X[np.ix_(rows, active)]
            other = Search(alphabet, pool, raw, 0 * powers, power, best.relative, apart, **settings, cost=RAW)
            searches.append(other)
        if isinstance(propose, Network):
            propose.scale(other.powers, 0 if natural else power)  # y = x^5 is large, in units as in training
        others = propose if isinstance(propose, Prior) else prior
        breeding = [(other, propose)] + [(best, others)] * bool(others and evolve)  # in turn
        for search in dict.fromkeys((best, other)) if shapes and evolve else ():
            search.sweep()
        tried = sum(search.tried for search in searches)
        turns, enough, choices = itertools.cycle(breeding), math.inf, choices + tried
        latest = SEARCHING[len(y) > MANY] * max_seconds
        size = max(LEAST_ROUND, ROUND * FIT_POINTS // max(near.n, FIT_POINTS))
        spent, slowest = time.monotonic() - begin, 0.0
        while not stop and tried < enough:
            if spent + slowest > latest if max_seconds else tried >= choices:
                break
            search, proposals = next(turns)
            before = search.tried
            n = size if max_seconds else min(size, choices - tried)
            search.breed(proposals, prior, n, evolve, restarts, refiner)
            tried += search.tried - before
            leader = min(filter(None, (s.leader() for s in searches)), key=lambda best: best.score, default=None)
            perfect = leader and leader.fvu <= PERFECT and PER_CONSTANT * (len(leader.constants) - 1) <= near.n
            enough = min(enough, 2 * tried) if perfect else enough
            now = time.monotonic() - begin
            spent, slowest = now, max(slowest, now - spent)
            if watch and leader:
                watch(leader, spent)
    except KeyboardInterrupt:
        deadline = min(deadline, time.monotonic() + AFTER_STOP)
    finalists = []
    for search in searches:
        most = FINAL // 2 if search.relative != searches[0].relative else None
        finalists += [(search, candidate) for candidate in search.finalists()[:most]]
    finalists.sort(key=lambda final: final[0].bits(final[1]))
    shift = power if abs(power) > RANGE else 0  # of y while formulas are ranked: its squares must stay floats
    if shift:
        y, half = scaled(y, shift), None if half is None else scaled(half, shift)
    data = Data(X, y, sigma, half)
    formulas = ranking(alphabet, finalists, data, active, power - shift, rng, deadline, exclude)
    return [in_units(alphabet, formula, shift) for formula in formulas], tried


def in_units(alphabet, formula, power):
    """Return a Ranked formula about y / 10^power as one about y."""
    if not power:
        return formula
    zeros = np.zeros(len(alphabet.variables), int)
    raw = unscaled(formula.prefix, formula.constants, zeros, power, alphabet.operators)
    return formula if raw is None else formula._replace(prefix=raw[0], constants=raw[1], length=len(raw[0]))


def ranking(alphabet, finalists, data, active, power, rng, deadline, exclude=()):
    """Return finalists, (Search of the `active` columns, Candidate), as Ranked formulas in the user's units.

    Best first, and the mean of y is among them. Of many rows some decide the order, and the first formulas are fitted
    to all of them. Candidates that the deadline leaves no time for are left out.
    """
    rough = data if data.n <= ROUGH else data.subset(np.sort(rng.permutation(data.n)[:ROUGH]))
    names = {f"x{i + 1}": f"x{j + 1}" for i, j in enumerate(active)}
    formulas, costs = [], []
    for search, candidate in finalists:
        forms = [(wrap(alphabet.decode(candidate.prefix)), candidate.constants)]
        if data.n < FEW:  # too few for one constant more: b g beside a + b g
            forms.append((forms[0][0][2:], candidate.constants[1:]))
        forms += filter(None, [with_logarithm(alphabet, *form) for form in forms])
        raws = [unscaled(*form, search.powers, power, alphabet.operators) for form in forms]
        raws.append(tied(alphabet, *forms[0], search.powers, power))
        for raw in raws:
            prefix = [names.get(token, token) for token in raw[0]] if raw else []
            if raw and all(token in alphabet.ids for token in prefix):
                formulas.append((prefix, raw[1]))
                costs.append(search.cost)
    ranked, place, size = [(rank_mean(rough), 0.0)], 0, ALWAYS
    last = deadline - MARGIN * (1 if rough is data else 3)
    while place < len(formulas) and size:
        begin, some = time.monotonic(), slice(place, place + size)
        ranked += zip(rank_formulas(alphabet, formulas[some], rough), costs[some], strict=True)
        place += size
        now = time.monotonic()
        left = max(last - now, 0.0) / max(now - begin, 1e-9) * size  # as many more may be ranked in time
        size = int(min(RANKED, left / 2))
        if not any(formula for formula, _ in ranked[1:]):
            size = max(size, ALWAYS)  # the mean alone is no answer
    distinct = {}
    for formula, cost in in_order(ranked):
        if not contains(formula.prefix, exclude):
            distinct.setdefault((*formula.prefix, *(f"{c:.5g}" for c in formula.constants)), (formula, cost))
    ranked = list(distinct.values())
    if rough is not data:
        refitted = []
        for formula, cost in ranked:
            one = any(formula for formula, _ in refitted)  # some fit only the rows that ranked them
            if not one or len(refitted) < REFITTED and time.monotonic() < deadline - MARGIN:
                refitted.append((refit(alphabet, formula, data), cost))
        ranked = in_order(refitted)
    return [formula._replace(bits=formula.bits + cost) for formula, cost in ranked]


def in_order(ranked):
    """Return pairs (Ranked or None, cost in bits) without None, the fewest bits first, cost included."""
    return sorted((pair for pair in ranked if pair[0]), key=lambda pair: pair[0].bits + pair[1])


def tied(alphabet, tokens, constants, powers, power):
    """Return a + b g with b near a or -a as a (1 + g) or a (1 - g) in the user's units -> tokens, constants.

    Its normal form has two constants again. None is returned for other formulas.
    """
    a, b = constants[:2]
    if abs(abs(a) - abs(b)) > TIED * abs(a):
        return None
    g = unscaled(tokens[4:], constants[2:], powers, 0, alphabet.operators)
    return g and (["*", "<constant>", "+" if a * b > 0 else "-", "1", *g[0]], [a * 10.0**power, *g[1]])


def with_logarithm(alphabet, tokens, constants):
    """Return a formula with log u for the first power u^c with c near 0, which is 1 + c log u -> tokens, constants.

    None is returned where there is no such power.
    """
    row = alphabet.encode(tokens)
    places = [i for i, token in enumerate(tokens) if token == "<constant>"]
    for begin in [i for i, token in enumerate(tokens) if token == "pow"]:
        end = subtree_end(alphabet, row, begin + 1)
        if tokens[end] == "<constant>":
            number = places.index(end)
            if abs(constants[number]) < LEAST_POWER:
                without = [*constants[:number], *constants[number + 1 :]]
                return [*tokens[:begin], "log", *tokens[begin + 1 : end], *tokens[end + 1 :]], without
    return None


def front(candidates):
    """Of each length the best, if it is better than all shorter ones: under noise the longest fit best."""
    best, least = [], math.inf
    for candidate in sorted(candidates, key=lambda candidate: (candidate.length, candidate.fvu)):
        if candidate.fvu < least:
            best.append(candidate)
            least = candidate.fvu
    return best


def solve_problems(model, batches, numbers, choices, seed, stop=False):
    """How many of the samples `numbers` of fixed batches a model's own candidates solve: FVU <= SOLVED."""
    solved, size = 0, len(batches[0]["x_tensors"])
    for i in numbers:
        if stop:
            break
        batch, j = batches[i // size], i % size
        D = int((batch["skeletons"][j].max() - model.alphabet.first_variable + 1).clamp_min(1))
        X, y = batch["x_tensors"][j, :, :D].double().numpy(), batch["y_tensors"][j, :, 0].double().numpy()
        network = Network(
            model, X, y, max_points=len(X), temperature=1.0, top_k=0, top_p=1.0, max_len=model.max_seq_len
        )
        rng = np.random.default_rng((seed, i))
        rows = {normal(model.alphabet, row, LONGEST) for row in network(rng, choices)} - {None}
        columns = batch["x_tensors"][j].double().numpy()
        if rows:
            error = refine(model.alphabet, padded(sorted(rows)), columns, y, rng, affine=True)[1]
            solved += bool((error <= SOLVED).any())
    return solved
