"""Which skeletons are never drawn: those of the test sets, renamed and reordered ones, and those that equal them.

N rows of ids, uint8, padded with 0; L tokens.
"""

import functools
import hashlib
import itertools

import numpy as np

from data_utils.files import root
from data_utils.formulas.expressions import LITERALS, OPERATORS, Program, evaluate, structure
from data_utils.formulas.fit import fit
from data_utils.formulas.pools import EVERY, load_pool, read_formulas
from data_utils.formulas.simplify import NotReal, simplify

ORDERS = 5  # formulas of up to so many variables are registered in all orders of these
POINTS = 32  # points of an image
FEWEST = 8  # finite values below which an image says too little
VALUE = 1.2207031  # value of every constant of an image
LITERAL_IDS = [EVERY.ids[name] for name in LITERALS]
SCALE_IDS = [EVERY.ids[name] for name in OPERATORS if name.startswith(("mult", "div", "neg"))]


def _image_points():
    """Return the points of the images, (64, POINTS): one half positive, the other of either sign."""
    rng = np.random.default_rng(271828)
    points = rng.uniform(0.15, 2.9, (len(EVERY.variables), POINTS))
    points[:, POINTS // 2 :] *= rng.choice([-1.0, 1.0], (len(EVERY.variables), POINTS // 2))
    return points


IMAGE_POINTS = _image_points()


class HoldOut:
    """held(tokens (N, L), alphabet) -> (N,) bool: which skeletons must not be drawn.

    Skeletons are compared in three ways, under every order of the variables:

    1. by their normal form, with numbers as constants;
    2. by the values of that form on fixed points (its image);
    3. by the image of what remains without constants. A binary operator with a constant operand becomes the other
       operand (c / x becomes its inverse); mult, div and neg become their operand; differences become sums, because the
       sign is that of a constant.
    """

    def __init__(self, prefixes):
        """prefixes: token lists of the formulas, with variables x1 to xk and numbers as "<constant>"."""
        rows = {row for prefix in prefixes for row in _orders(tuple(prefix))}
        width = max(map(len, rows), default=1)
        tokens = np.array([list(row) + [0] * (width - len(row)) for row in sorted(rows)], np.uint8).reshape(-1, width)
        forms, images, bare_images = _keys(tokens)
        self.forms = set(forms)
        self.images = set(images) - {b""}
        self.bare_images = set(bare_images) - {b""}

    def __call__(self, tokens, alphabet):
        keys = zip(*_keys(_to_every(tokens, alphabet)), strict=True)
        return np.array([a in self.forms or b in self.images or c in self.bare_images for a, b, c in keys], bool)


def _to_every(tokens, alphabet):
    """Return rows of ids of `alphabet` as ids of EVERY."""
    return np.array([EVERY.ids.get(token, 0) for token in alphabet.tokens], np.uint8)[tokens]


@functools.cache  # a run holds the same formulas out of both splits
def _orders(prefix):
    """Return the normal forms of a formula, a tuple, under every order of its variables: set of bytes, ids in EVERY."""
    variables = sorted({token for token in prefix if token in EVERY.variables}, key=EVERY.ids.get)
    new = EVERY.variables[: len(variables)]
    rows = set()
    for order in itertools.permutations(new) if len(new) <= ORDERS else [new]:
        names = dict(zip(variables, order, strict=True))
        rows.add(bytes(EVERY.encode(_normal([names.get(token, token) for token in prefix]))))
    return rows


def _normal(prefix):
    try:
        return simplify([("<constant>" if token in LITERALS else token) for token in simplify(prefix)[0]])[0]
    except NotReal:
        return prefix


def _keys(tokens):
    """Return three lists that skeletons are compared by: form, image and bare image, each bytes.

    tokens: (N, L) ids of EVERY. An image that says too little is b"". Variables are renamed x1 to xk in their order;
    above ORDERS of them, in the order of their first occurrence.
    """
    tokens = _renamed(np.where(np.isin(tokens, LITERAL_IDS), EVERY.constant, tokens).astype(np.uint8))
    forms = [row.tobytes().rstrip(b"\0") for row in tokens]
    return forms, _images(tokens), _images(_renamed(_without_constants(tokens)))


def _renamed(tokens):
    """Return the rows with their variables renamed as `_keys` says."""
    first = EVERY.first_variable
    row, place = np.nonzero(tokens >= first)
    variable = tokens[row, place] - first
    occurs_at = np.full((len(tokens), len(EVERY.variables)), tokens.shape[1])
    np.minimum.at(occurs_at, (row, variable), place)
    used = occurs_at < tokens.shape[1]
    rank = used.cumsum(1) - 1
    many = used.sum(1) > ORDERS
    rank[many] = occurs_at[many].argsort(1, kind="stable").argsort(1)
    tokens = tokens.copy()
    tokens[row, place] = first + rank[row, variable]
    return tokens


def _without_constants(tokens):
    """Return the rows without what depends on constants alone, as the third comparison of HoldOut says."""
    arity = EVERY.arity[tokens]
    size, _ = structure(arity)
    N, L = tokens.shape
    rows = np.arange(N)
    varies = np.zeros((N, L + 1), bool)  # whether the subtree at a place has a variable
    varies[:, :L] = tokens >= EVERY.first_variable
    keep = varies[:, :L].copy()
    is_scale = np.isin(tokens, SCALE_IDS)
    tokens = np.where(tokens == EVERY.ids["-"], EVERY.ids["+"], tokens)
    for p in range(L - 1, -1, -1):
        left = varies[:, p + 1]
        right = varies[rows, np.minimum(p + 1 + size[:, p + 1], L)]
        binary = arity[:, p] == 2
        varies[:, p] |= (arity[:, p] > 0) & (left | binary & right)
        inverse = binary & (tokens[:, p] == EVERY.ids["/"]) & ~left & right
        keep[:, p] |= (arity[:, p] > 0) & left & ~is_scale[:, p] & (right | ~binary) | inverse
        tokens[inverse, p] = EVERY.ids["inv"]
    order = (~keep).argsort(1, kind="stable")
    return np.where(np.arange(L) < keep.sum(1)[:, None], np.take_along_axis(tokens, order, 1), 0).astype(np.uint8)


def _images(tokens):
    """Return 128-bit hashes of the values on IMAGE_POINTS to 6 digits; places that are not finite count as well."""
    hashes = []
    for a in range(0, len(tokens), 2048):
        program = Program(EVERY, tokens[a : a + 2048])
        y = program(np.full((program.N, tokens.shape[1]), VALUE), IMAGE_POINTS[program.uses[1]])
        finite = np.isfinite(y)
        y = np.where(finite, y, 0)
        with np.errstate(divide="ignore"):
            power = np.where(y, np.floor(np.log10(np.abs(y))), 0).clip(-300, 300)
        digits = np.rint(y * 10.0 ** (5 - power))
        over = np.abs(digits) >= 10**6  # 9.999999 is rounded to 10
        code = np.where(over, np.sign(digits) * 10**5, digits).astype(np.int64) * 1024 + (power + over).astype(np.int64)
        code[~finite] = np.iinfo(np.int64).min
        for row, count in zip(code, finite.sum(1), strict=True):
            hashes.append(hashlib.blake2b(row.tobytes(), digest_size=16).digest() if count >= FEWEST else b"")
    return hashes


def hold_out(pool, excluded=()) -> HoldOut:
    """Return the HoldOut of the holdout_pools of a PoolConfig, and of `excluded`, token lists."""
    prefixes = list(excluded)
    for path in _paths(pool):
        if path.endswith(".csv"):
            for formula in read_formulas(path):
                prefixes += [formula.prefix, skeleton_of(formula)]
        else:
            saved, alphabet = load_pool(path)
            prefixes += [alphabet.decode(row) for row in saved.tokens]
    return HoldOut(prefixes)


def _paths(pool):
    return [path.replace("{{ROOT}}", str(root())) for path in pool.holdout_pools if path != "none"]


def skeleton_of(formula) -> list[str]:
    """Return the prefix of a Formula, simplified with the values of its constants."""
    try:
        return simplify(formula.prefix, formula.values)[0]
    except NotReal:
        return formula.prefix


def fitting(pool, alphabet):
    """Return fits(rows (N, L)) -> (N,) bool: which skeletons some constants turn into a held-out formula.

    Held-out formulas of at most two variables are compared, under both orders, by a fit to 20 points of each.
    """
    problems = []  # points X (20, 64), values y (20,), number of variables
    for formula in itertools.chain(*(read_formulas(path) for path in _paths(pool) if path.endswith(".csv"))):
        if len(formula.variables) <= 2:
            rng = np.random.default_rng(271828)
            low, high = np.array([end.split(":") for end in formula.row["ranges"].split()], float).T
            X = np.zeros((20, len(EVERY.variables)))
            X[:, : len(low)] = rng.uniform(low, high, (20, len(low)))
            tokens = np.array([EVERY.encode(formula.prefix)], np.uint8)
            y = evaluate(EVERY, tokens, np.array([formula.values]), X[None])[0]
            if np.isfinite(y).all() and np.ptp(y) > 0:
                problems.append((X, y, len(low)))

    def fits(rows):
        rows = _renamed(_to_every(rows, alphabet))
        variables = (rows.max(1) - EVERY.first_variable).astype(int) + 1
        solved = np.zeros(len(rows), bool)
        for X, y, D in problems:
            for order in itertools.permutations(range(D)):
                permuted = X.copy()
                permuted[:, :D] = X[:, order]
                candidates = np.flatnonzero(~solved & (variables <= D))
                if len(candidates):
                    rng = np.random.default_rng(0)
                    fvu = fit(EVERY, rows[candidates], permuted, y, restarts=4, rng=rng)[1]
                    solved[candidates[fvu < 1e-10]] = True
        return solved

    return fits
