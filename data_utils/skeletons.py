"""Skeletons, formulas with blank constants: drawn as trees, simplified, kept off the test sets, saved as pools.

N rows of prefix token ids, uint8, padded with 0; D variables. Trees with n operators are equally likely, as Lample and
Charton (arXiv 1912.01412) count them; here the cycle lemma (Dershowitz and Zaks 1990) draws all rows at once.
"""

import csv
import dataclasses
import difflib
import hashlib
import itertools
import math
import sys
import zipfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from data_utils.config import DataError, UsageError, at_least, build, load_config, root
from data_utils.distributions import parse
from data_utils.expressions import LITERALS, OPERATORS, Alphabet, Program, from_text, structure
from data_utils.simplify import NotReal, simplify

TEST_SETS = tuple("{{ROOT}}/configs/test_set/" + name for name in ("nguyen.csv", "feynman.csv", "fastsrb.csv"))
RARE = "pow1_3 pow1_4 pow1_5 asin acos sinh cosh asinh acosh atanh".split()
USUAL = tuple(name for name in OPERATORS if name not in RARE)
WEIGHTS = "+:10,*:10,-:5,/:5,pow:1,pow2:4,pow1_2:4,exp:4,log:4,sin:4,cos:4,pow3:2,inv:2,neg:2"
CONSTANTS = "0.5*normal(0,5)|0.25*int(1,9)|0.25*signed_log(1e-3,1e3)"
SUPPORTS = "0.4*interval(normal(0,10),normal(0,10))|0.3*textbook(log(0.5,10))|0.3*decade(-6,6)"
Sizes = Literal["length_proportional", "length_exponential", "equiprobable_lengths"]
PARTS = 4096  # draws between two looks at a pool that grows
PATIENCE = 100  # batches of draws with (almost) nothing new, after which there is nothing new


@dataclass
class PoolConfig:
    n_operator_distribution: Sizes = "length_proportional"  # p(n) ~ n^power; exp(n^power / lambda_); all n alike
    power: float = 0.0  # of the number of operators n
    lambda_: float = 1.0  # of length_exponential
    min_operators: int = 1  # of a tree that is drawn
    max_operators: int = 9  # of it
    max_length: int = 21  # tokens of a simplified skeleton; longer ones are rejected
    max_tries: int = 4  # constants and intervals that a skeleton gets before another takes its place
    simplify: bool = True  # bring skeletons into normal form
    allow_nan: bool = False  # keep samples with some y that is not finite
    variables: tuple[str, ...] = ("x1", "x2", "x3")  # x1 to xD
    operators: tuple[str, ...] = USUAL  # that may occur
    operator_weights: str = WEIGHTS  # how often, among those that take as many operands; 1 for one not named
    leaf_prior: Literal["counted", "distinct"] = "counted"  # k variables, p(k) ~ k^-decay; or k of D + 1 symbols
    constant_probability: float = 0.2  # that a leaf is a constant (counted); one leaf at least is a variable
    variable_decay: float = 1.0  # of the number of variables (counted)
    literal_prior: str = CONSTANTS  # distribution of the constants
    support_prior: str = SUPPORTS  # distribution of the interval of a variable
    independent_dimensions: bool = True  # an interval per variable, not one for all
    n_support_prior: str = "log_int(16,64)"  # distribution of the number of points
    y_limit: float = 1e4  # a sample with a larger abs(y) is drawn again
    holdout_pools: tuple[str, ...] = TEST_SETS  # saved pools or csv files never to draw from; `none` for none


class Pool(namedtuple("Pool", "tokens counts")):
    """Distinct skeletons (N, L) uint8 and how often each was drawn (N,)."""


def check_pool(pool):
    """Return the Alphabet of a PoolConfig; UsageError for what can't be drawn from."""
    at_least(pool, 0, "min_operators", "variable_decay")
    at_least(pool, 1, "max_operators", "max_length", "max_tries")
    if pool.min_operators > pool.max_operators:
        raise UsageError(f"--min_operators {pool.min_operators} > --max_operators {pool.max_operators}")
    if list(pool.variables) != [f"x{i + 1}" for i in range(len(pool.variables))] or not pool.variables:
        raise UsageError(f"--variables {' '.join(pool.variables) or 'none'}: expected x1 to xD, at least x1")
    if not 0 <= pool.constant_probability <= 1 or not pool.lambda_ > 0 or not pool.y_limit > 0:
        raise UsageError(f"--constant_probability {pool.constant_probability} --lambda_ {pool.lambda_} "
                         f"--y_limit {pool.y_limit}: expected 0 to 1, above 0, above 0")  # fmt: skip
    alphabet = Alphabet(pool.operators, pool.variables)
    operator_weights(alphabet, pool)
    point_counts(pool)
    parse(pool.literal_prior), parse(pool.support_prior, support=True)
    return alphabet


def point_counts(pool):
    """Return the numbers of points that occur, at most 8 from the least to the largest: few shapes to compile."""
    draws = parse(pool.n_support_prior)(np.random.default_rng(0), 4096)
    counts = np.unique(np.rint(np.quantile(draws, np.linspace(0, 1, 8))).astype(int))
    if counts[0] < 2:
        raise UsageError(f"--n_support_prior {pool.n_support_prior}: {counts[0]} points, expected 2 or more")
    return counts


def operator_weights(alphabet, pool):
    """Return {arity: (ids, weights)} of the operators of a pool."""
    named = {}
    for term in filter(None, pool.operator_weights.split(",")):
        name, _, weight = term.strip().rpartition(":")
        try:
            named[name] = float(weight)
        except ValueError:
            named[name] = -1.0
        if name not in OPERATORS or not 0 <= named[name] < math.inf:
            near = difflib.get_close_matches(name, OPERATORS, 1)
            raise UsageError(f"--operator_weights: {term.strip()!r}: expected OPERATOR:WEIGHT, 0 or more"
                             + f" (did you mean {near[0]}?)" * (bool(near) and name not in OPERATORS))  # fmt: skip
    found = {}
    for arity in (1, 2):
        names = [name for name in pool.operators if OPERATORS[name].arity == arity and named.get(name, 1)]
        found[arity] = np.array(alphabet.encode(names), np.uint8), np.array([named.get(name, 1.0) for name in names])
    if not len(found[1][0]) + len(found[2][0]):
        raise UsageError("--operator_weights: all operators have weight 0: give one of them more")
    return found


def _pick(rng, weights, shape):
    """Indices drawn in proportion to `weights`."""
    ends = np.cumsum(weights)
    return np.minimum(np.searchsorted(ends, rng.random(shape) * ends[-1], "right"), len(ends) - 1)


def sample_arities(rng, sizes, unary=True, binary=True):
    """Arities in prefix order of uniformly drawn trees with sizes[i] operators each: (N, 2 max + 1) int8, padded by -1.

    Trees with u unary and b binary operators number L! / (u! b! (b+1)!) / L, L = u + 2b + 1: b is drawn by that, the
    arities are shuffled, and of the L rotations of a word the one that is a tree begins after the first position at
    which the sum of (arity - 1) is least (cycle lemma).
    """
    width = 2 * int(sizes.max(initial=0)) + 1
    twos = np.zeros(len(sizes), int)
    for n in np.unique(sizes).tolist():
        b = np.arange(n + 1)
        logs = np.array([-math.lgamma(n - i + 1) - math.lgamma(i + 1) - math.lgamma(i + 2) + math.lgamma(n + i + 1)
                         for i in b.tolist()])  # fmt: skip
        possible = (b == n if binary else b < 0) if not unary else b >= 0 if binary else b == 0
        weights = np.where(possible, np.exp(logs - logs.max()), 0)
        twos[sizes == n] = _pick(rng, weights, int((sizes == n).sum()))
    length, place = (sizes + twos + 1)[:, None], np.arange(width)
    inside = place < length
    order = np.where(inside, rng.random((len(sizes), width)), 2).argsort(1)
    arity = (order < sizes[:, None]).astype(np.int8) + (order < twos[:, None])
    first = np.where(inside, np.cumsum(arity - 1, 1, dtype=np.int16), width).argmin(1)[:, None] + 1
    arity = np.take_along_axis(arity, np.where(inside, (place + first) % length, place), 1)
    return np.where(inside, arity, -1).astype(np.int8)


def sample_trees(rng, n, alphabet, pool):
    """Return n drawn skeletons (n, 2 max_operators + 1) uint8, not simplified, each with a variable at least."""
    operators = operator_weights(alphabet, pool)
    k = np.arange(pool.min_operators, pool.max_operators + 1)
    with np.errstate(divide="ignore", over="ignore"):
        grown = k.astype(float) ** pool.power
    if pool.n_operator_distribution == "length_exponential":
        grown = np.exp(grown / pool.lambda_ - (grown / pool.lambda_).max())
    elif pool.n_operator_distribution == "equiprobable_lengths":
        grown = np.ones(len(k))
    if not np.isfinite(grown).all() or not grown.sum() > 0:
        raise UsageError(f"--power {pool.power}: no probabilities for {k[0]} to {k[-1]} operators")
    arity = sample_arities(rng, k[_pick(rng, grown, n)], *(len(operators[a][0]) > 0 for a in (1, 2)))
    tokens = np.zeros(arity.shape, np.uint8)
    for a, (ids, weights) in operators.items():
        if len(ids):
            here = arity == a
            tokens[here] = ids[_pick(rng, weights, int(here.sum()))]
    leaf, D = arity == 0, len(pool.variables)
    u = rng.random(arity.shape)
    if pool.leaf_prior == "counted":
        count = 1 + _pick(rng, np.arange(1.0, D + 1) ** -pool.variable_decay, (n, 1))
        symbol = np.where(rng.random(arity.shape) < pool.constant_probability, D, (u * count).astype(int))
    else:
        count, chosen = rng.integers(1, D + 2, (n, 1)), rng.random((n, D + 1)).argsort(1)
        symbol = np.take_along_axis(chosen, (u * count).astype(int), 1)
    bare = np.flatnonzero(~(leaf & (symbol < D)).any(1))
    place = np.where(leaf[bare], rng.random((len(bare), leaf.shape[1])), -1).argmax(1)
    symbol[bare, place] = rng.integers(0, D if pool.leaf_prior == "distinct" else count[bare, 0])
    symbols = np.array([*alphabet.encode(pool.variables), alphabet.constant], np.uint8)
    tokens[leaf] = symbols[symbol[leaf]]
    return tokens


def distinct(tokens, counts=None):
    """Return the distinct rows in the order in which they first occur, and the sum of their counts (1 each)."""
    packed = np.ascontiguousarray(tokens).view(f"V{tokens.shape[1]}").ravel()
    _, first, which = np.unique(packed, return_index=True, return_inverse=True)
    sums = np.bincount(which.ravel(), counts, len(first))
    order = first.argsort()
    return tokens[first[order]], sums[order].astype(np.int64)


def make_chunk(rng, draws, alphabet, pool, held=None):
    """Draw, simplify, hold out -> Pool of the distinct skeletons, Counter of the draws rejected by reason."""
    rows, counts = distinct(sample_trees(rng, draws, alphabet, pool))
    names, rejected = alphabet.tokens, Counter()
    found = np.zeros((len(rows), pool.max_length), np.uint8)
    keep = np.zeros(len(rows), bool)
    variables, ids = set(alphabet.variables), alphabet.ids
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
            found[i, : len(prefix)], keep[i] = [ids[token] for token in prefix], True
    tokens, counts = distinct(found[keep], counts[keep])
    if held is not None:
        out = held(tokens, alphabet)
        rejected["held out"] += int(counts[out].sum())
        tokens, counts = tokens[~out], counts[~out]
    return Pool(tokens, counts), rejected


def draw_pool(size, alphabet, pool, held, *, seed, split, fits=None, report=lambda n: None):
    """Return a Pool of exactly `size` distinct skeletons, in the order in which they were drawn.

    fits(rows) -> (n,) bool marks those that are left out besides (see `fitting`); report(n) is told how many there are.
    Raises DataError, with how many exist, when draws find nothing new any more.
    """
    seen, refused, rejected, idle = {}, set(), Counter(), 0
    for j in itertools.count():
        chunk, reasons = make_chunk(np.random.default_rng((seed, split, 2, j)), PARTS, alphabet, pool, held)
        rejected += reasons
        found, before = dict(zip(map(bytes, chunk.tokens), chunk.counts.tolist(), strict=True)), len(seen)
        for key in found.keys() & seen.keys():
            seen[key] += found[key]
        new = [key for key in found if key not in seen and key not in refused]
        while new and len(seen) < size:
            part, new = new[: size - len(seen)], new[size - len(seen) :]
            out = fits(_rows(part, pool.max_length)) if fits else np.zeros(len(part), bool)
            refused.update(key for key, bad in zip(part, out, strict=True) if bad)
            seen.update({key: found[key] for key, bad in zip(part, out, strict=True) if not bad})
        report(len(seen))
        idle = 0 if len(seen) > before else idle + 1
        if len(seen) == size:
            break
        if idle == PATIENCE:
            reasons = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common() if n)
            raise DataError(f"{size} skeletons asked for, only {len(seen)} exist (rejected draws: {reasons or 'none'})"
                            "\ntry: a smaller --size, or more operators, variables or a larger max_length")  # fmt: skip
    return Pool(_rows(seen, pool.max_length), np.array(list(seen.values())))


def _rows(keys, width):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, width)


# what is held out

EVERY = Alphabet(OPERATORS, [f"x{i + 1}" for i in range(64)])  # any skeleton fits it
ORDERS = 5  # up to so many variables all orders are registered
POINTS = 32  # of an image
FEWEST = 8  # finite values below which an image says too little
VALUE = 1.2207031  # of every constant of an image


def _matrix():
    """The points of the images, (64, POINTS): each variable positive on one half, of either sign on the other."""
    rng = np.random.default_rng(271828)
    points = rng.uniform(0.15, 2.9, (len(EVERY.variables), POINTS))
    points[:, POINTS // 2 :] *= rng.choice([-1.0, 1.0], (len(EVERY.variables), POINTS // 2))
    return points


MATRIX = _matrix()


class HoldOut:
    """held(tokens (N, L), alphabet) -> (N,) bool: which skeletons must not be drawn.

    A skeleton is compared in three ways, under every order of the variables: its normal form with numbers as constants;
    the values of that form on fixed points (its image); the image of what is left without constants, where a binary
    operator with a constant operand becomes the other operand (c / x its inverse), mult, div, neg their operand, and
    differences sums, as the sign is that of a constant.
    """

    def __init__(self, prefixes):
        """prefixes: token lists of the formulas, variables x1 to xk, numbers as "<constant>"."""
        rows = {row for prefix in prefixes for row in _orders(prefix)}
        width = max(map(len, rows), default=1)
        tokens = np.array([list(row) + [0] * (width - len(row)) for row in sorted(rows)], np.uint8).reshape(-1, width)
        forms, images, bare = _keys(tokens)
        self.forms, self.images, self.bare = set(forms), set(images) - {b""}, set(bare) - {b""}

    def __call__(self, tokens, alphabet):
        table = np.array([EVERY.ids.get(token, 0) for token in alphabet.tokens], np.uint8)
        keys = zip(*_keys(table[tokens]), strict=True)
        return np.array([a in self.forms or b in self.images or c in self.bare for a, b, c in keys], bool)


def _orders(prefix):
    """Rows of ids in EVERY of the normal forms of a formula under every order of its variables."""
    variables = sorted({token for token in prefix if token in EVERY.variables}, key=EVERY.ids.get)
    new = EVERY.variables[: len(variables)]
    for order in itertools.permutations(new) if len(new) <= ORDERS else [new]:
        names = dict(zip(variables, order, strict=True))
        yield bytes(EVERY.encode(_normal([names.get(token, token) for token in prefix])))


def _normal(prefix):
    try:
        return simplify([("<constant>" if token in LITERALS else token) for token in simplify(prefix)[0]])[0]
    except NotReal:
        return prefix


def _keys(tokens):
    """What skeletons are compared by: lists of form, image, bare image, each bytes; an image that says nothing is b"".

    tokens: ids of EVERY. Variables are renamed x1 to xk in their order, above ORDERS of them as they occur.
    """
    literals = [EVERY.ids[name] for name in LITERALS]
    tokens = _renamed(np.where(np.isin(tokens, literals), EVERY.constant, tokens).astype(np.uint8))
    forms = [row.tobytes().rstrip(b"\0") for row in tokens]
    return forms, _images(tokens), _images(_renamed(_without_constants(tokens)))


def _renamed(tokens):
    first, D = EVERY.first_variable, len(EVERY.variables)
    row, place = np.nonzero(tokens >= first)
    variable = tokens[row, place] - first
    where = np.full((len(tokens), D), tokens.shape[1])
    np.minimum.at(where, (row, variable), place)
    used = where < tokens.shape[1]
    many = used.sum(1) > ORDERS
    rank = used.cumsum(1) - 1
    rank[many] = where[many].argsort(1, kind="stable").argsort(1)
    tokens = tokens.copy()
    tokens[row, place] = first + rank[row, variable]
    return tokens


def _without_constants(tokens):
    """Drop numbers, binary operators with a number as operand, mult, div, neg; c / x becomes inv x, - becomes +."""
    arity = EVERY.arity[tokens]
    size, _ = structure(arity)
    N, L = tokens.shape
    varies, rows = np.zeros((N, L + 1), bool), np.arange(N)
    varies[:, :L] = tokens >= EVERY.first_variable
    keep = varies[:, :L].copy()
    scales = [EVERY.ids[name] for name in OPERATORS if name.startswith(("mult", "div", "neg"))]
    scale, tokens = np.isin(tokens, scales), np.where(tokens == EVERY.ids["-"], EVERY.ids["+"], tokens)
    for p in range(L - 1, -1, -1):
        left, other = varies[:, p + 1], varies[rows, np.minimum(p + 1 + size[:, p + 1], L)]
        two = arity[:, p] == 2
        varies[:, p] |= (arity[:, p] > 0) & (left | two & other)
        inverse = two & (tokens[:, p] == EVERY.ids["/"]) & ~left & other
        keep[:, p] |= (arity[:, p] > 0) & left & ~scale[:, p] & (other | ~two) | inverse
        tokens[inverse, p] = EVERY.ids["inv"]
    order = (~keep).argsort(1, kind="stable")
    return np.where(np.arange(L) < keep.sum(1)[:, None], np.take_along_axis(tokens, order, 1), 0).astype(np.uint8)


def _images(tokens):
    """128-bit hashes of the values on MATRIX to 6 digits, what is not finite included."""
    hashes = []
    for a in range(0, len(tokens), 2048):
        program = Program(EVERY, tokens[a : a + 2048])
        y = program(np.full((program.N, tokens.shape[1]), VALUE), MATRIX[program.uses[1]])
        finite = np.isfinite(y)
        y = np.where(finite, y, 0)
        with np.errstate(divide="ignore"):
            power = np.where(y, np.floor(np.log10(np.abs(y))), 0).clip(-300, 300)
        digits = np.rint(y * 10.0 ** (5 - power))
        over = np.abs(digits) >= 10**6
        code = np.where(over, np.sign(digits) * 10**5, digits).astype(np.int64) * 1024 + (power + over).astype(np.int64)
        code[~finite] = np.iinfo(np.int64).min
        enough = finite.sum(1) >= FEWEST
        hashes += [hashlib.blake2b(c.tobytes(), digest_size=16).digest() if good else b""
                   for c, good in zip(code, enough.tolist(), strict=True)]  # fmt: skip
    return hashes


def hold_out(pool, excluded=()):
    """Return the HoldOut of a PoolConfig's holdout_pools and of `excluded`, token lists."""
    prefixes = list(excluded)
    for path in _paths(pool):
        if path.endswith(".csv"):
            for formula in read_formulas(path):
                prefixes += [formula.prefix, _folded(formula)]
        else:
            saved, alphabet = load_pool(path)
            prefixes += [alphabet.decode(row) for row in saved.tokens]
    return HoldOut(prefixes)


def _paths(pool):
    return [path.replace("{{ROOT}}", str(root())) for path in pool.holdout_pools if path != "none"]


def _folded(formula):
    try:
        return simplify(formula.prefix, formula.values)[0]
    except NotReal:
        return formula.prefix


def fitting(pool, alphabet):
    """Return fits(rows (N, L)) -> (N,) bool: can constants be found that make a skeleton a held-out formula?

    Those of at most two variables are compared, under both orders, by a fit to 20 points of each.
    """
    from data_utils.expressions import evaluate
    from data_utils.refine import fit

    problems = []
    for formula in itertools.chain(*(read_formulas(path) for path in _paths(pool) if path.endswith(".csv"))):
        if len(formula.variables) <= 2:
            rng = np.random.default_rng(271828)
            low, high = np.array([end.split(":") for end in formula.row["ranges"].split()], float).T
            X = np.zeros((20, len(EVERY.variables)))
            X[:, : len(low)] = rng.uniform(low, high, (20, len(low)))
            y = evaluate(EVERY, np.array([EVERY.encode(formula.prefix)], np.uint8), np.array([formula.values]), X[None])
            if np.isfinite(y).all() and np.ptp(y) > 0:
                problems.append((X, y[0], len(low)))

    def fits(rows):
        table = np.array([EVERY.ids.get(token, 0) for token in alphabet.tokens], np.uint8)
        rows = _renamed(table[rows])
        used = (rows.max(1) - EVERY.first_variable).astype(int) + 1
        found = np.zeros(len(rows), bool)
        for X, y, k in problems:
            for order in itertools.permutations(range(k)):
                turned = X.copy()
                turned[:, :k] = X[:, order]
                left = np.flatnonzero(~found & (used <= k))
                if len(left):
                    fvu = fit(EVERY, rows[left], turned, y, restarts=4, rng=np.random.default_rng(0))[1]
                    found[left[fvu < 1e-10]] = True
        return found

    return fits


# files

Formula = namedtuple("Formula", "name prefix values variables row")
COLUMNS = ("name", "formula", "variables", "ranges")


def read_formulas(path, skip_bad_lines=False, warn=lambda message: None, columns=COLUMNS):
    """Read a test set (csv with a header) -> list of Formula(name, prefix, values, variables, row as a dict).

    Raises DataError with file:line and the reason; with skip_bad_lines these lines are only passed to `warn`.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{path}:1: no column {', '.join(missing)}: expected {','.join(columns)}")
            found = []
            for row in reader:
                try:
                    found.append(_formula(row))
                except DataError as e:
                    message = f"{path}:{reader.line_num}: {e}"
                    if not skip_bad_lines:
                        raise DataError(message) from e
                    warn(message)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: {e.strerror if isinstance(e, OSError) else e}\n{IMPORT}") from e
    if not found:
        raise DataError(f"{path}: no formula in it\n{IMPORT}")
    return found


IMPORT = "try: ./scripts/import_test_sets.sh, or the right path in holdout_pools"


def _formula(row):
    if None in row or None in row.values():
        raise DataError(f"{len([v for v in row.values() if v is not None])} cells, not as many as the header has")
    variables = row["variables"].split()
    if len(row["ranges"].split()) != len(variables):
        raise DataError(f"{len(variables)} variables, {len(row['ranges'].split())} ranges")
    prefix, values = from_text(row["formula"], variables)
    return Formula(row["name"], prefix, values, variables, row)


def save_pool(folder, found, alphabet, pool, **about):
    """Write skeletons.npz (tokens, lengths, counts) and skeleton_pool.yaml: whole files or none."""
    import yaml

    from data_utils.checkpoint import write_atomic

    tokens = found.tokens[:, : max(1, int((found.tokens > 0).sum(1).max(initial=0)))]
    lengths = (tokens > 0).sum(1).astype(np.uint8)
    arrays = dict(tokens=tokens, lengths=lengths, counts=found.counts.astype(np.int64))
    write_atomic(Path(folder, "skeletons.npz"), lambda file: np.savez_compressed(file, **arrays))
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(pool).items()}
    settings |= dict(variables=alphabet.variables, operators=alphabet.operators, size=len(tokens), **about)
    text = yaml.safe_dump(settings, sort_keys=False, width=110)
    write_atomic(Path(folder, "skeleton_pool.yaml"), lambda file: file.write(text.encode("utf-8")))


def load_pool(folder):
    """Return (Pool, Alphabet) of a saved pool; DataError for what is missing, damaged or no pool."""
    import yaml

    folder = Path(str(folder).replace("{{ROOT}}", str(root())))
    path = folder / "skeleton_pool.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        alphabet = Alphabet(settings["operators"], settings["variables"])
        path = folder / "skeletons.npz"
        with zipfile.ZipFile(path) as archive:  # a small file can hold arrays that fill the memory
            if sum(entry.file_size for entry in archive.infolist()) > 2**32:
                raise ValueError("more than 4 GiB unpacked")
        with np.load(path, allow_pickle=False) as file:
            tokens, lengths, counts = (file[name] for name in ("tokens", "lengths", "counts"))
        if tokens.dtype != np.uint8 or tokens.ndim != 2 or lengths.shape != counts.shape or len(tokens) != len(lengths):
            raise ValueError(f"tokens {tokens.dtype} {tokens.shape}, lengths {lengths.shape}, counts {counts.shape}")
        if not len(tokens) or (counts < 1).any() or (tokens.max(initial=0) >= len(alphabet.tokens)):
            raise ValueError("no skeletons, counts below 1, or tokens beyond its alphabet")
        if ((tokens > 0).sum(1) != lengths).any():
            raise ValueError("lengths are not those of the tokens")
        structure(alphabet.arity[tokens])
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, UsageError, zipfile.BadZipFile,
            zlib.error, yaml.YAMLError) as e:  # fmt: skip
        reason = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(f"{path}: {reason}\n{IMPORT}, or python prepare_data.py generate-skeleton-pool") from e
    return Pool(tokens, counts), alphabet


def translate(found, old, new):
    """Return the Pool `found` of alphabet `old` with the ids of `new`; UsageError where tokens of it are missing."""
    table = np.array([new.ids.get(token, 0) for token in old.tokens], np.uint8)
    missing = [old.tokens[i] for i in np.unique(found.tokens).tolist() if i and not table[i]]
    if missing:
        raise UsageError(f"the saved pool has {' '.join(missing)}, which the alphabet lacks: {' '.join(new.tokens)}")
    return Pool(table[found.tokens], found.counts)


# sub-commands of prepare_data.py


def generate(cfg):
    """Write a pool of exactly cfg.size skeletons, as cfg.config describes it, to cfg.output_dir."""
    _check_output(cfg)
    if cfg.size < 1:
        raise UsageError(f"--size {cfg.size}: expected 1 or more")
    pool = build(PoolConfig, load_config(cfg.config), cfg.config)
    alphabet = check_pool(pool)
    fits = fitting(pool, alphabet) if cfg.strict else None
    held = hold_out(pool)
    with tqdm(total=cfg.size, disable=not cfg.verbose, unit="skeletons") as bar:
        found = draw_pool(cfg.size, alphabet, pool, held, seed=cfg.seed, split=1, fits=fits,
                          report=lambda n: bar.update(n - bar.n))  # fmt: skip
    save_pool(cfg.output_dir, found, alphabet, pool)
    mean = (found.tokens > 0).sum(1).mean()
    print(f"{cfg.output_dir}: {cfg.size} skeletons of {mean:.1f} tokens on average")
    return {}


def import_data(cfg):
    """Write the skeletons of a csv of formulas, cfg.input, as a pool to cfg.output_dir."""
    _check_output(cfg)
    pool = build(PoolConfig, load_config(cfg.base_skeleton_pool), cfg.base_skeleton_pool)
    bad = []
    columns = (*COLUMNS, "difficulty", "sampling") if cfg.parser == "fastsrb" else COLUMNS
    formulas = read_formulas(cfg.input, cfg.skip_bad_lines, bad.append, columns)
    for message in bad:
        print(f"skipped: {message}", file=sys.stderr)
    prefixes = [_folded(formula) for formula in formulas]
    present = set(itertools.chain(*prefixes))
    operators = [*pool.operators, *(name for name in OPERATORS if name in present and name not in pool.operators)]
    D = max(len(pool.variables), *(len(formula.variables) for formula in formulas))
    alphabet = Alphabet(operators, EVERY.variables[:D])
    tokens = np.zeros((len(prefixes), max(map(len, prefixes))), np.uint8)
    for row, prefix in zip(tokens, prefixes, strict=True):
        row[: len(prefix)] = alphabet.encode(prefix)
    found = Pool(*distinct(tokens))
    more = [*operators[len(pool.operators) :], *alphabet.variables[len(pool.variables) :]]
    save_pool(cfg.output_dir, found, alphabet, pool)
    beyond = f"; {' '.join(more)} are beyond the base pool" if more and cfg.verbose else ""
    print(f"{cfg.output_dir}: {len(found.tokens)} skeletons of {len(formulas)} formulas{beyond}")
    return {}


def _check_output(cfg):
    flags = ("config", "output_dir", "input", "base_skeleton_pool")
    missing = [f"--{name}" for name in flags if getattr(cfg, name, "given") == ""]
    if missing:
        raise UsageError(f"{' '.join(missing)}: not given")
    if Path(cfg.output_dir, "skeletons.npz").exists() and not cfg.fresh:
        raise UsageError(f"{cfg.output_dir} holds a skeleton pool\ntry: --fresh, which overwrites it")
