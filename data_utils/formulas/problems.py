"""Problems for symbolic regression: test sets of known formulas, and how well a formula solves them.

M points, D variables. Uy et al. 2011 (Nguyen), AI Feynman (arXiv 1905.11481), FastSRB (2508.14481), SRSD (2206.10540).
"""

import math
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.files import root
from data_utils.formulas.expressions import evaluate, padded_columns
from data_utils.formulas.fit import fit
from data_utils.formulas.pools import EVERY, Formula, load_pool, read_formulas
from data_utils.formulas.samples import propose
from data_utils.formulas.search import SOLVED, fvu, predict
from data_utils.formulas.skeletons import PoolConfig

POINTS = dict(nguyen=20)  # to fit; 20 of a pool, 512 in other suites
SAMPLING = {0: "uni+", 1: "log+", 2: "log+-", -1: "log-"}  # of the kinds of intervals that distributions.py draws
MOST_TRIES = 1000  # draws of a point that is not finite

Problem = namedtuple("Problem", "name X y clean X_val y_val X_wide y_wide formula")


def problems(suite, seed, noise, max_variables=0):
    """Yield the Problems of nguyen, feynman, fastsrb, a csv file like them or a saved pool of skeletons.

    max_variables: those with more are left out, 0 = none.

    X (M, D), y (M,) with normal noise of `noise` times the standard deviation of `clean`; X_val, y_val without; X_wide
    in the intervals widened twofold about their centres, finite ones only.
    """
    path = Path(suite) if suite.endswith(".csv") else root() / "configs" / "test_set" / f"{suite}.csv"
    pool = Path(suite, "skeletons.npz").exists()
    if not pool and not path.exists():
        raise UsageError(f"--suite {suite}: expected nguyen, feynman, fastsrb, a csv file like these in "
                         "configs/test_set, or a folder of generate-skeleton-pool")  # fmt: skip
    for formula in of_pool(suite, seed) if pool else read_formulas(path):
        D = len(formula.variables)
        if max_variables and max_variables < D:
            continue
        rng = np.random.default_rng((seed, zlib.crc32(formula.name.encode())))
        tokens = np.array([EVERY.encode(formula.prefix)], np.uint8)

        def values(X, tokens=tokens, formula=formula):
            return evaluate(EVERY, tokens, np.array([formula.values or [0.0]]), padded_columns(EVERY, X)[None])[0]

        n = 20 if pool else POINTS.get(suite, 512)
        X = _finite(rng, formula, values, n)
        X_val, X_wide = _finite(rng, formula, values, 1000 if n == 20 else 512), _draw(rng, formula, 1000, 2.0)
        y_wide, clean = values(X_wide), values(X)
        finite = np.isfinite(y_wide)
        largest = np.abs(clean).max() or 1.0  # squares of large values are no floats
        y = clean + noise * (clean / largest).std() * largest * rng.standard_normal(n)
        yield Problem(formula.name, X, y, clean, X_val, values(X_val), X_wide[finite], y_wide[finite], formula)


def of_pool(folder, seed):
    """Yield the skeletons of a saved pool as Formulas, with constants and intervals as training draws them."""
    saved, alphabet = load_pool(folder)
    for i, row in enumerate(saved.tokens):
        tries = np.repeat(row[None], 8, 0)
        rows, constants, intervals, *_ = propose(np.random.default_rng((seed, i)), tries, alphabet, PoolConfig())
        if not len(rows):  # no constants with which it can be used
            continue
        prefix = alphabet.decode(row[row > 0])
        D = int(row.max()) - alphabet.first_variable + 1
        ranges = " ".join(f"{low}:{high}" for low, high, _ in intervals[0, :D].tolist())
        sampling = " ".join(SAMPLING[kind] for _, _, kind in intervals[0, :D].tolist())
        values = constants[0, : prefix.count("<constant>")].tolist()
        yield Formula(f"skeleton-{i}", prefix, values, alphabet.variables[:D], dict(ranges=ranges, sampling=sampling))


def _draw(rng, formula, n, widen=1.0):
    """n points from the intervals of a formula, (n, D)."""
    columns = []
    kinds = (formula.row.get("sampling") or "uni+ " * len(formula.variables)).split()
    for interval, kind in zip(formula.row["ranges"].split(), kinds, strict=True):
        low, high = map(float, interval.split(":"))
        name = kind.rstrip("+-")
        if name == "log":
            low, high = math.log(low), math.log(high)
        centre, half = (low + high) / 2, (high - low) / 2 * widen
        x = rng.uniform(centre - half, centre + half, n)
        x = np.exp(x) if name == "log" else np.rint(x) if name == "int" else x
        sign = rng.choice([-1.0, 1.0], n) if kind.endswith("+-") else -1.0 if kind.endswith("-") else 1.0
        columns.append(x * sign)
    return np.stack(columns, 1)


def _finite(rng, formula, values, n):
    X = _draw(rng, formula, n)
    for _ in range(MOST_TRIES):
        bad = ~np.isfinite(values(X))
        if not bad.any():
            return X
        X[bad] = _draw(rng, formula, int(bad.sum()))
    raise DataError(f"{formula.name}: no finite values in its ranges")


def attainable(problem):
    """FVU on the validation points of the true formula with constants fitted to the noisy points."""
    formula = problem.formula
    tokens, width = np.array([EVERY.encode(formula.prefix)], np.uint8), len(EVERY.variables)
    X, X_val = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (problem.X, problem.X_val))
    start = np.array([formula.values or [0.0]])
    constants, _ = fit(EVERY, tokens, X, problem.y, 1, np.random.default_rng(0), start=start)
    constants = constants if formula.values else start
    return fvu(problem.y_val, evaluate(EVERY, tokens, constants, X_val[None])[0])


def score(alphabet, formula, problem):
    """Judge a Ranked formula of a Problem -> dict of FVUs on fitted, validation and wider points, and verdicts.

    vnrr: the validation points are met; recovered: the wider ones too; nnrr: the validation points are met as well as
    the noise allows, to four times the FVU of the true formula fitted to the same points.
    """
    errors = dict(
        fvu_fit=fvu(problem.y, predict(alphabet, formula, problem.X)),
        fvu_val=fvu(problem.y_val, predict(alphabet, formula, problem.X_val)),
        fvu_ext=fvu(problem.y_wide, predict(alphabet, formula, problem.X_wide)),
    )
    solved = errors["fvu_val"] <= SOLVED
    noisy = (problem.y != problem.clean).any()
    limit = max(SOLVED, 4 * attainable(problem) if noisy else 0.0)
    return errors | dict(
        r2=1 - errors["fvu_val"],
        vnrr=solved,
        recovered=solved and errors["fvu_ext"] <= SOLVED,
        nnrr=errors["fvu_val"] <= limit,
        length=formula.length,
        length_ratio=formula.length / len(problem.formula.prefix),
    )
