"""Skeletons, formulas with blank constants: drawn as trees and simplified, as many as needed.

N rows of prefix token ids, uint8, padded with 0; D variables. All trees with n operators are equally likely, as Lample
and Charton (arXiv 1912.01412) count them. Here the cycle lemma (Dershowitz and Zaks 1990) draws all rows at once.
"""

import difflib
import gc
import itertools
import math
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.formulas.distributions import parse_distribution
from data_utils.formulas.expressions import OPERATORS, Alphabet
from data_utils.formulas.simplify import NotReal, simplify

TEST_SETS = tuple("{{ROOT}}/configs/test_set/" + name for name in ("nguyen.csv", "feynman.csv", "fastsrb.csv"))
RARE = "pow1_3 pow1_4 pow1_5 asin acos sinh cosh asinh acosh atanh".split()
USUAL = tuple(name for name in OPERATORS if name not in RARE)
WEIGHTS = "+:10,*:10,-:5,/:5,pow:1,pow2:4,pow1_2:4,exp:4,log:4,sin:4,cos:4,pow3:2,inv:2,neg:2"
CONSTANTS = "0.5*normal(0,5)|0.25*int(1,9)|0.25*signed_log(1e-3,1e3)"
SUPPORTS = "0.4*interval(normal(0,10),normal(0,10))|0.3*textbook(log(0.5,10))|0.3*decade(-6,6)"
Sizes = Literal["length_proportional", "length_exponential", "equiprobable_lengths"]
PARTS = 4096  # draws between two looks at a pool that grows
PATIENCE = 100  # batches of draws with (almost) nothing new, after which nothing new is expected


@dataclass
class PoolConfig:
    n_operator_distribution: Sizes = "length_proportional"  # p(n) ~ n^power; exp(n^power / lambda_); all n alike
    power: float = 0.0  # exponent of the number of operators n
    lambda_: float = 1.0  # scale of length_exponential
    min_operators: int = 1  # least operators of a drawn tree
    max_operators: int = 9  # most operators of a drawn tree
    max_length: int = 21  # tokens of a simplified skeleton; longer ones are rejected
    max_tries: int = 4  # tries of constants and intervals per skeleton, before another takes its place
    simplify: bool = True  # bring skeletons into normal form
    allow_nan: bool = False  # keep samples where some y is not finite
    variables: tuple[str, ...] = ("x1", "x2", "x3")  # x1 to xD
    operators: tuple[str, ...] = USUAL  # operators that may occur
    operator_weights: str = WEIGHTS  # how often, among those with as many operands; 1 for one not named
    leaf_prior: Literal["counted", "distinct"] = "counted"  # k variables, p(k) ~ k^-decay; or k of D + 1 symbols
    constant_probability: float = 0.2  # that a leaf is a constant (counted); at least one leaf is a variable
    variable_decay: float = 1.0  # decay of the number of variables (counted)
    literal_prior: str = CONSTANTS  # distribution of the constants
    support_prior: str = SUPPORTS  # distribution of the interval of a variable
    independent_dimensions: bool = True  # an interval per variable, not one for all
    n_support_prior: str = "log_int(16,64)"  # distribution of the number of points
    y_limit: float = 1e4  # a sample with a larger abs(y) is drawn again
    holdout_pools: tuple[str, ...] = TEST_SETS  # saved pools or csv files never to draw from; `none` for none


class Pool(namedtuple("Pool", "tokens counts")):
    """Distinct skeletons (N, L) uint8, and how often each was drawn (N,)."""


def check_pool(pool: PoolConfig) -> Alphabet:
    """Return the Alphabet of a PoolConfig. Raises UsageError for settings that can't be drawn from."""
    at_least(pool, 0, "min_operators", "variable_decay")
    at_least(pool, 1, "max_operators", "max_length", "max_tries")
    if pool.min_operators > pool.max_operators:
        raise UsageError(f"--min_operators {pool.min_operators} > --max_operators {pool.max_operators}")
    if list(pool.variables) != [f"x{i + 1}" for i in range(len(pool.variables))] or not pool.variables:
        raise UsageError(f"--variables {' '.join(pool.variables) or 'none'}: expected x1 to xD, at least x1")
    if not 0 <= pool.constant_probability <= 1 or not pool.lambda_ > 0 or not pool.y_limit > 0:
        raise UsageError(
            f"--constant_probability {pool.constant_probability} --lambda_ {pool.lambda_} --y_limit {pool.y_limit}: "
            "expected 0 to 1, above 0, above 0"
        )
    alphabet = Alphabet(pool.operators, pool.variables)
    operator_weights(alphabet, pool)
    point_counts(pool)
    parse_distribution(pool.literal_prior)
    parse_distribution(pool.support_prior, support=True)
    return alphabet


def point_counts(pool: PoolConfig) -> np.ndarray:
    """Return the numbers of points that occur, ascending: at most 8, so that few shapes are compiled."""
    draws = parse_distribution(pool.n_support_prior)(np.random.default_rng(0), 4096)
    counts = np.unique(np.rint(np.quantile(draws, np.linspace(0, 1, 8))).astype(int))
    if counts[0] < 2:
        raise UsageError(f"--n_support_prior {pool.n_support_prior}: {counts[0]} points, expected 2 or more")
    return counts


def operator_weights(alphabet, pool):
    """Return {arity: (ids, weights)} of the operators of a PoolConfig, for the arities 1 and 2."""
    named = {}
    for term in filter(None, pool.operator_weights.split(",")):
        name, _, weight = term.strip().rpartition(":")
        try:
            named[name] = float(weight)
        except ValueError:
            named[name] = -1.0
        if name not in OPERATORS or not 0 <= named[name] < math.inf:
            message = f"--operator_weights: {term.strip()!r}: expected OPERATOR:WEIGHT, 0 or more"
            near = difflib.get_close_matches(name, OPERATORS, 1)
            if near and name not in OPERATORS:
                message += f" (did you mean {near[0]}?)"
            raise UsageError(message)
    weights = {}
    for arity in (1, 2):
        names = [name for name in pool.operators if OPERATORS[name].arity == arity and named.get(name, 1)]
        ids = np.array(alphabet.encode(names), np.uint8)
        weights[arity] = ids, np.array([named.get(name, 1.0) for name in names])
    if not len(weights[1][0]) + len(weights[2][0]):
        raise UsageError("--operator_weights: all operators have weight 0: give one of them more")
    return weights


def _pick(rng, weights, shape):
    """Draw indices in proportion to `weights`."""
    ends = np.cumsum(weights)
    return np.minimum(np.searchsorted(ends, rng.random(shape) * ends[-1], "right"), len(ends) - 1)


def sample_arities(rng, sizes, unary=True, binary=True):
    """Draw uniform trees with sizes[i] operators each: arities in prefix order, (N, 2 max + 1) int8, padded with -1.

    unary, binary: whether there are operators of that arity. There are L! / (u! b! (b + 1)!) / L trees with u unary and
    b binary operators, L = u + 2b + 1. So b is drawn by these numbers, and the arities are shuffled. Of the L rotations
    of a word exactly one is a tree: it begins after the first position where the sum of (arity - 1) is least (cycle
    lemma).
    """
    width = 2 * int(sizes.max(initial=0)) + 1
    binaries = np.zeros(len(sizes), int)  # b of each tree
    for n in np.unique(sizes).tolist():
        b = np.arange(n + 1)
        logs = [-math.lgamma(n - i + 1) - math.lgamma(i + 1) - math.lgamma(i + 2) + math.lgamma(n + i + 1) for i in b]
        logs = np.array(logs)
        if not unary:
            possible = b == n if binary else b < 0
        else:
            possible = b >= 0 if binary else b == 0
        weights = np.where(possible, np.exp(logs - logs.max()), 0)
        binaries[sizes == n] = _pick(rng, weights, int((sizes == n).sum()))
    length = (sizes + binaries + 1)[:, None]
    place = np.arange(width)
    inside = place < length
    order = np.where(inside, rng.random((len(sizes), width)), 2).argsort(1)
    arity = (order < sizes[:, None]).astype(np.int8) + (order < binaries[:, None])
    first = np.where(inside, np.cumsum(arity - 1, 1, dtype=np.int16), width).argmin(1)[:, None] + 1
    arity = np.take_along_axis(arity, np.where(inside, (place + first) % length, place), 1)
    return np.where(inside, arity, -1).astype(np.int8)


def sample_trees(rng, n, alphabet, pool):
    """Draw n skeletons, not simplified: (n, 2 max_operators + 1) uint8, each with at least one variable."""
    operators = operator_weights(alphabet, pool)
    k = np.arange(pool.min_operators, pool.max_operators + 1)
    with np.errstate(divide="ignore", over="ignore"):
        weights = k.astype(float) ** pool.power
    if pool.n_operator_distribution == "length_exponential":
        weights = np.exp(weights / pool.lambda_ - (weights / pool.lambda_).max())
    elif pool.n_operator_distribution == "equiprobable_lengths":
        weights = np.ones(len(k))
    if not np.isfinite(weights).all() or not weights.sum() > 0:
        raise UsageError(f"--power {pool.power}: no probabilities for {k[0]} to {k[-1]} operators")
    arity = sample_arities(rng, k[_pick(rng, weights, n)], *(len(operators[a][0]) > 0 for a in (1, 2)))
    tokens = np.zeros(arity.shape, np.uint8)
    for a, (ids, weights) in operators.items():
        if len(ids):
            is_operator = arity == a
            tokens[is_operator] = ids[_pick(rng, weights, int(is_operator.sum()))]

    # Leaves: symbols 0 to D - 1 are variables, D is a constant.
    D = len(pool.variables)
    is_leaf = arity == 0
    u = rng.random(arity.shape)
    if pool.leaf_prior == "counted":
        count = 1 + _pick(rng, np.arange(1.0, D + 1) ** -pool.variable_decay, (n, 1))
        symbol = np.where(rng.random(arity.shape) < pool.constant_probability, D, (u * count).astype(int))
    else:
        count = rng.integers(1, D + 2, (n, 1))
        chosen = rng.random((n, D + 1)).argsort(1)
        symbol = np.take_along_axis(chosen, (u * count).astype(int), 1)
    bare = np.flatnonzero(~(is_leaf & (symbol < D)).any(1))  # trees without a variable get one
    place = np.where(is_leaf[bare], rng.random((len(bare), is_leaf.shape[1])), -1).argmax(1)
    symbol[bare, place] = rng.integers(0, D if pool.leaf_prior == "distinct" else count[bare, 0])
    symbols = np.array([*alphabet.encode(pool.variables), alphabet.constant], np.uint8)
    tokens[is_leaf] = symbols[symbol[is_leaf]]
    return tokens


def distinct(tokens, counts=None):
    """Return the distinct rows in the order of their first occurrence, and the sum of their counts (1 each)."""
    packed = np.ascontiguousarray(tokens).view(f"V{tokens.shape[1]}").ravel()
    _, first, group = np.unique(packed, return_index=True, return_inverse=True)
    sums = np.bincount(group.ravel(), counts, len(first))
    order = first.argsort()
    return tokens[first[order]], sums[order].astype(np.int64)


@contextmanager
def _without_gc():
    """Turn garbage collection off: nodes of formulas have no cycles, and the search for them took a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_chunk(rng, draws, alphabet, pool, held=None) -> tuple[Pool, Counter]:
    """Draw, simplify and hold out -> Pool of the distinct skeletons, Counter of the rejected draws by reason.

    held: HoldOut of skeletons to leave out.
    """
    rows, counts = distinct(sample_trees(rng, draws, alphabet, pool))
    rejected = Counter()
    forms = np.zeros((len(rows), pool.max_length), np.uint8)
    usable = np.zeros(len(rows), bool)
    names = alphabet.tokens
    ids = alphabet.ids
    variables = set(alphabet.variables)
    with _without_gc():
        for i, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
            prefix = [names[t] for t in row if t]
            if pool.simplify:
                try:
                    prefix = simplify(prefix)[0]
                except NotReal:
                    rejected["not real"] += count
                    continue
            if len(prefix) > pool.max_length:
                rejected["longer than max_length"] += count
            elif variables.isdisjoint(prefix):
                rejected["without a variable"] += count
            elif not ids.keys() >= set(prefix):
                rejected["with an operator beyond the alphabet"] += count
            else:
                forms[i, : len(prefix)] = [ids[token] for token in prefix]
                usable[i] = True
    tokens, counts = distinct(forms[usable], counts[usable])
    if held is not None:
        is_held = held(tokens, alphabet)
        rejected["held out"] += int(counts[is_held].sum())
        tokens, counts = tokens[~is_held], counts[~is_held]
    return Pool(tokens, counts), rejected


def draw_pool(size, alphabet, pool, held, *, seed, split, fits=None, report=lambda n: None):
    """Return a Pool of exactly `size` distinct skeletons, in the order in which they were drawn.

    fits(rows) -> (n,) bool marks further skeletons to leave out (see `fitting`). report(n) gets their number so far.
    Raises DataError, with the number that exist, when draws bring nothing new any more.
    """
    counts = {}  # {row as bytes: draws}
    refused = set()
    rejected = Counter()
    idle = 0  # chunks in a row without anything new
    for j in itertools.count():
        chunk, reasons = make_chunk(np.random.default_rng((seed, split, 2, j)), PARTS, alphabet, pool, held)
        rejected += reasons
        before = len(counts)
        drawn = dict(zip(map(bytes, chunk.tokens), chunk.counts.tolist(), strict=True))
        for key in drawn.keys() & counts.keys():
            counts[key] += drawn[key]
        new = [key for key in drawn if key not in counts and key not in refused]
        while new and len(counts) < size:
            missing = size - len(counts)
            part, new = new[:missing], new[missing:]
            out = fits(_rows(part, pool.max_length)) if fits else np.zeros(len(part), bool)
            refused.update(key for key, bad in zip(part, out, strict=True) if bad)
            counts.update({key: drawn[key] for key, bad in zip(part, out, strict=True) if not bad})
        report(len(counts))
        idle = 0 if len(counts) > before else idle + 1
        if len(counts) == size:
            break
        if idle == PATIENCE:
            reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common() if n)
            raise DataError(
                f"{size} skeletons asked for, only {len(counts)} exist (rejected draws: {reasons or 'none'})\n"
                + (f"try: --size {len(counts)}" if counts else "fix: more operators, variables or a larger max_length")
            )
    return Pool(_rows(counts, pool.max_length), np.array(list(counts.values())))


def _rows(keys, width):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, width)
