"""A formula for given points: candidates are proposed, bred, summed up of parts, fitted all at once, tidied, ranked.

M points, D variables, N candidates (rows of prefix ids, see expressions.py). A network proposes what it read off the
points (arXiv 2602.08885), the prior what training draws; offspring are a genetic programme's (Koza 1992).
"""

import math
import time
from collections import namedtuple

import numpy as np
import torch

from data_utils.formulas.expressions import evaluate
from data_utils.formulas.fit import EXACT, fit, refine, tidy, wrap
from data_utils.formulas.simplify import NotReal, simplify
from data_utils.formulas.skeletons import make_chunk, operator_weights
from data_utils.formulas.sums import Library
from models.set_transformer import EXPONENT

ROUND = 128  # candidates that are fitted together
ARCHIVE, DONORS = 100, 6000  # candidates that are bred from; proposals that lend them parts
PERFECT = 1e-22  # FVU (MSE over the variance of y) that the formula itself stays below; those close to it don't
SOLVED = 2.0**-23  # FVU below which float32 sees no difference
FIT_POINTS, LONGEST, CONSTANTS = 64, 24, 6
TIDIED, TIDIED_NOISY = 20, 60  # of the best that are rounded; under noise plain constants decide between many
SUMS, KEPT, LONGEST_SUM = 16, 8, 40  # searches for sums in a round, sums that are fitted, tokens of one
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
    """network(rng, n) -> n skeletons that the model reads off the points, each time off others and in another order."""

    def __init__(self, model, X, y, *, max_points, prompt=(), numbers=(), width=0, **sampling):
        """width: of a beam, which then proposes the same each time but for points and order; 0 = draws."""
        self.model, self.X, self.y, self.max_points, self.width = model, X, y, max_points, width
        self.sampling = dict(prompt=prompt, numbers=numbers) | sampling

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
        first = alphabet.first_variable
        back = {first + i: first + int(v) for i, v in enumerate(order)}
        return [[back.get(t, t) for t in row if t] for row in drawn.tolist()]


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


def padded(rows):
    """Id lists -> (N, L) uint8."""
    found = np.zeros((len(rows), max(map(len, rows))), np.uint8)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def fvu(y, predicted):
    """MSE over the variance of y; inf where a prediction is not finite."""
    return float(np.mean((y - predicted) ** 2) / np.var(y)) if np.isfinite(predicted).all() else np.inf


def predict(alphabet, candidate, X):
    """Values of a candidate at X (M, D): (M,)."""
    columns = np.zeros((len(X), len(alphabet.variables)))
    columns[:, : X.shape[1]] = X
    constants = np.asarray(candidate.constants, float)[None] if len(candidate.constants) else np.zeros((1, 1))
    return evaluate(alphabet, padded([candidate.prefix]), constants, columns[None])[0]


def find_formula(propose, X, y, *, alphabet, pool, rng, prior=None, choices=512, evolve=0.7, restarts=4, parsimony=0.05,
                 max_seconds=0.0, refiner="lm", rank="mdl", stop=False):  # fmt: skip
    """Search a formula y = f(x) -> (list of Candidate, best first; how many were fitted).

    propose: Network or Prior; prior: where half the proposals come from once it repeats itself. X: (M, D), y: (M,),
    finite. Rounds go on until `choices` were tried, or with max_seconds until these are over. A perfect fit ends
    them after as many candidates again, since a simpler one may follow. rank: what is returned is ordered by `bits`
    ("mdl") or by the score of the search. Columns far from 1 are searched over powers of two, as the network sees them.
    """
    (X, powers), (y, power) = into_range(X), into_range(y)
    start, seen, donors, archive, sums, plain = time.monotonic(), set(), [], [], [], []
    tried, hot, enough = 0, False, math.inf
    columns = np.zeros((len(X), len(alphabet.variables)))
    columns[:, : X.shape[1]] = X
    D, longest = X.shape[1], max(LONGEST, pool.max_length)
    few = rng.permutation(len(y))[:FIT_POINTS]
    library = Library(alphabet, columns[few], y[few])

    def unseen(rows, longest):
        keys = {normal(alphabet, row, longest) for row in rows} - seen - {None}
        seen.update(keys)
        return sorted(keys)

    def fitted(rows, by, **settings):
        if not rows:
            return []
        constants, error = by(alphabet, padded(rows), columns, y, rng=rng, affine=True, **settings)
        return [
            scored(row, c[: 2 + row.count(alphabet.constant)], e, parsimony)
            for row, c, e in zip(rows, constants, error, strict=True) if np.isfinite(e)
        ]  # fmt: skip

    def best(candidates):
        return sorted(candidates, key=lambda candidate: candidate.score)[:ARCHIVE]

    while not stop and tried < enough and (time.monotonic() - start < max_seconds if max_seconds else tried < choices):
        n = min(ROUND, choices - tried) if not max_seconds else ROUND
        bred = int(n * evolve) if len(archive) >= 20 else 0
        new = []
        if not bred or len(donors) < DONORS // 2 or rng.random() < 0.3:
            if hot and prior:
                new = propose(rng, (n - bred + 1) // 2, HOT) + prior(rng, (n - bred) // 2)
            else:
                new = propose(rng, n - bred)
            donors = (donors + new)[-DONORS:]
        rows = unseen(new, longest)
        hot = hot or len(rows) < len(new) / 2
        parents = [candidate.prefix for candidate in archive]
        rows += unseen([offspring(rng, parents, donors, alphabet, pool, D) for _ in range(bred)], longest)
        found = fitted(rows, refine, method=refiner, points=FIT_POINTS, restarts=restarts)
        archive, plain = best(archive + found), front(plain + found)
        tried += len(new) + bred
        if evolve:
            library.add(new)
            pairs = sorted(pair for _ in range(SUMS) for pair in library(rng, parsimony))
            shares = [Candidate(row, [], score - parsimony * len(row), len(row), score) for score, row in pairs]
            new = [candidate.prefix for candidate in shares[:KEPT] + front(shares)]
            found = fitted(unseen(new, LONGEST_SUM), fit, restarts=2, steps=20)
            sums, plain = best(sums + found), front(plain + found)
            tried += len(new)
        first = best(archive[:1] + sums[:1])[:1]
        if enough == math.inf and first and first[0].fvu <= PERFECT:
            if finish(first, columns, y, alphabet, parsimony)[0].fvu <= SOLVED:
                enough = 2 * tried
            else:  # written out, its large constants cancel
                (archive if archive and first[0] is archive[0] else sums).pop(0)
    found = best(archive + sums)
    exact = found and found[0].fvu <= SOLVED
    found = finish(
        found[: TIDIED if exact else TIDIED_NOISY] + ([] if exact else plain), columns, y, alphabet, parsimony
    )
    if rank == "mdl":
        found = best(c._replace(score=bits(alphabet, c, len(y))) for c in found)
    if power or powers.any():
        found = [put_back(alphabet, candidate, powers, power) for candidate in found]
    return found, tried


def into_range(x):
    """x (M, ...) -> (x 2^-powers, powers (...)): 0 but where the largest magnitude lies outside 2^-60 and 2^60."""
    largest = np.abs(x).max(0)
    outside = (largest > 0) & ((largest < 2.0**-EXPONENT) | (largest > 2.0**EXPONENT))
    powers = np.where(outside, np.frexp(largest)[1] - 1, 0).clip(-1000, 1000)
    return np.ldexp(x, -powers), powers


def put_back(alphabet, candidate, powers, power):
    """A Candidate about columns over 2^powers and y over 2^power -> one about the columns and y themselves."""
    numbers, constants = iter(candidate.constants), [2.0 ** int(power)] if power else []
    prefix = ["*", "<constant>"] if power else []
    for token, i in zip(alphabet.decode(candidate.prefix), candidate.prefix, strict=True):
        k = i - alphabet.first_variable
        if 0 <= k < len(powers) and powers[k]:
            prefix += ["*", "<constant>"]
            constants.append(2.0 ** -int(powers[k]))
        prefix.append(token)
        constants += [next(numbers)] if token == "<constant>" else []
    try:
        prefix, constants = simplify(prefix, constants, alphabet.operators)
    except NotReal:  # beyond the range of floats: it stays as it is
        pass
    return candidate._replace(prefix=alphabet.encode(prefix), constants=constants, length=len(prefix))


def front(candidates):
    """Of each length the best, if it is better than all shorter ones: under noise the longest fit best."""
    found, least = [], math.inf
    for candidate in sorted(candidates, key=lambda candidate: (candidate.length, candidate.fvu)):
        if candidate.fvu < least:
            found.append(candidate)
            least = candidate.fvu
    return found


def scored(row, constants, error, parsimony):
    """A Candidate with its score, the lower the better."""
    score = np.log10(max(error, EXACT)) + parsimony * len(row)
    return Candidate(list(row), [float(c) for c in constants], float(error), len(row), float(score))


def bits(alphabet, candidate, n):
    """Description length of a Candidate and of n residuals (Rissanen 1978), in bits up to a constant.

    A token costs the log of how many there are; an integer its digits; another constant half a log of n besides.
    """
    operators = len(alphabet.operators) + len(alphabet.variables) + 1
    numbers = sum(math.log2(1 + abs(c)) + (1 if c == round(c) else 1 + math.log2(n) / 2) for c in candidate.constants)
    residuals = n / 2 * math.log2(max(candidate.fvu, EXACT))
    return candidate.length * math.log2(operators) + numbers + residuals


def finish(archive, columns, y, alphabet, parsimony):
    """Write out a + b g, round the constants of the best where that costs nothing -> candidates, best first."""
    found = {}
    for candidate in archive:
        whole = wrap(alphabet.decode(candidate.prefix))
        prefix, constants, error = tidy(alphabet, whole, candidate.constants, columns, y)
        same = (*prefix, *(f"{c:.6g}" for c in constants))
        found.setdefault(same, scored(alphabet.encode(prefix), constants, error, parsimony))
    return sorted(found.values(), key=lambda candidate: candidate.score)


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
