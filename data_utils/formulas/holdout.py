"""Which skeletons are never drawn: those of the test sets, their renamed and reordered forms, and what equals them.

N rows of ids, uint8, padded with 0.
"""

import hashlib
import itertools

import numpy as np

from data_utils.files import root
from data_utils.formulas.expressions import LITERALS, OPERATORS, Program, structure
from data_utils.formulas.pools import EVERY, load_pool, read_formulas
from data_utils.formulas.simplify import NotReal, simplify

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
                prefixes += [formula.prefix, folded(formula)]
        else:
            saved, alphabet = load_pool(path)
            prefixes += [alphabet.decode(row) for row in saved.tokens]
    return HoldOut(prefixes)


def _paths(pool):
    return [path.replace("{{ROOT}}", str(root())) for path in pool.holdout_pools if path != "none"]


def folded(formula):
    try:
        return simplify(formula.prefix, formula.values)[0]
    except NotReal:
        return formula.prefix


def fitting(pool, alphabet):
    """Return fits(rows (N, L)) -> (N,) bool: can constants be found that make a skeleton a held-out formula?

    Those of at most two variables are compared, under both orders, by a fit to 20 points of each.
    """
    from data_utils.formulas.expressions import evaluate
    from data_utils.formulas.fit import fit

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
