"""The search of formulas: sums of parts against all subsets, whole searches."""

import itertools

import numpy as np
import pytest

from data_utils.formulas.expressions import format_formula
from data_utils.formulas.pools import save_pool
from data_utils.formulas.problems import attainable, problems
from data_utils.formulas.search import (
    Candidate,
    Prior,
    bits,
    find_formula,
    front,
    into_range,
    offspring,
    predict,
    put_back,
    subtree_end,
)
from data_utils.formulas.skeletons import PoolConfig, check_pool, draw_pool
from data_utils.formulas.sums import Library, choose, plain_pairs

POOL = PoolConfig(variables=("x1", "x2"), max_operators=4)
ALPHABET = check_pool(POOL)


def points(n=20, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 2, (n, 2))


def test_beam_over_all_sets_is_the_best_of_all_subsets():
    rng = np.random.default_rng(0)
    parts, y = rng.normal(size=(7, 12)), rng.normal(size=12)
    found = choose(parts, y, width=99, most=3)
    for size in (1, 2, 3):
        best = {}
        for rows in itertools.combinations(range(7), size):
            columns = np.column_stack([np.ones(12), *parts[list(rows)]])
            rest = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
            best[rows] = rest @ rest / (12 * np.var(y))
        share, rows = min(pair for pair in found if len(pair[1]) == size)
        assert share == pytest.approx(min(best.values()), rel=1e-9) and best[rows] == pytest.approx(share, rel=1e-9)


def test_parts_that_say_the_same_are_taken_once():
    x = np.linspace(0, 1, 9)
    found = choose(np.stack([x, 2 * x + 1, x * x]), x + x * x, most=3)
    assert all(len({0, 1} & set(rows)) < 2 for _, rows in found) and min(found)[0] < 1e-20


@pytest.mark.parametrize(
    "truth",
    [
        lambda x: 2 * x[:, 0] ** 2 + x[:, 1] - 3 * np.sin(x[:, 0]),
        lambda x: x[:, 0] ** 1.5 / x[:, 1] ** 2,
        lambda x: np.sqrt(x[:, 0] ** 2 + 4 * x[:, 1]),
        lambda x: 1 / (x[:, 0] + 3 * x[:, 1] ** 2),
        lambda x: np.log(1 + x[:, 0] + x[:, 1] ** 2),
    ],
)
def test_laws_are_found_without_a_network(truth):
    X = points()
    prior = Prior(ALPHABET, POOL, 2)
    found, tried = find_formula(prior, X, truth(X), alphabet=ALPHABET, pool=POOL, rng=np.random.default_rng(1),
                                choices=3000)  # fmt: skip
    assert found[0].fvu < 1e-20 and tried <= 3000 + 200, found[0]


@pytest.mark.parametrize("size, height", [(1e-30, 1e200), (1e25, 1e-250), (1e-30, 1.0), (1.0, 1e-40)])
def test_columns_far_from_one_are_searched_near_it_and_put_back(size, height):
    near = points()
    X = near * [size, 1.0]
    y = height * (X[:, 0] / size + X[:, 1] ** 2)
    found, _ = find_formula(Prior(ALPHABET, POOL, 2), X, y, alphabet=ALPHABET, pool=POOL, rng=np.random.default_rng(1),
                            choices=500)  # fmt: skip
    c = found[0]
    assert predict(ALPHABET, c, X) == pytest.approx(y, rel=1e-9) and c.length == len(c.prefix) <= 10
    assert c.fvu < 1e-20 and sorted(c.constants)[-1] == pytest.approx(max(height, height / size), rel=1e-9)
    assert into_range(near)[0] is not near and (into_range(near)[0] == near).all() and not into_range(near)[1].any()
    x, powers = into_range(X)
    assert (x * 2.0**powers == X).all() and ((0 < np.abs(x).max(0)) & (np.abs(x).max(0) < 2)).all()
    whole = Candidate(ALPHABET.encode(["*", "<constant>", "sin", "x1"]), [3.0], 0.0, 4, 0.0)
    back = put_back(ALPHABET, whole, np.array([-80, 0]), 2)
    assert format_formula(ALPHABET.decode(back.prefix), back.constants) == f"12*sin({2.0**80}*x1)"


def test_the_same_seed_finds_the_same():
    X = points()
    y = X[:, 0] ** X[:, 1] + np.exp(X[:, 1])

    def run():
        return find_formula(Prior(ALPHABET, POOL, 2), X, y, alphabet=ALPHABET, pool=POOL,
                            rng=np.random.default_rng(3), choices=400)[0]  # fmt: skip

    assert run() == run()


def test_offspring_are_formulas_and_a_library_needs_its_operators():
    rng = np.random.default_rng(0)
    rows = Prior(ALPHABET, POOL, 2)(rng, 100)
    for _ in range(300):
        child = offspring(rng, rows, rows, ALPHABET, POOL, 2)
        assert subtree_end(ALPHABET, child, 0) == len(child)
    alone = PoolConfig(variables=("x1",), operators=("sin", "exp"), operator_weights="", max_operators=2)
    library = Library(check_pool(alone), points()[:, :1], points()[:, 1])
    assert library(rng, 0.05) == []


def test_a_library_takes_numbers_of_any_size():
    rng, X = np.random.default_rng(0), points()
    with np.errstate(all="raise", under="ignore"):
        for y in (1e200 * X[:, 0], 600 * X[:, 0] ** 2, 1e-200 * X[:, 1], np.ones(len(X))):
            library = Library(ALPHABET, X, y)
            library.add([ALPHABET.encode(row.split()) for row in ("pow2 x1", "* x1 x2", "exp x2")])
            assert all(np.isfinite(score) for _ in range(20) for score, _ in library(rng, 0.05))


def test_a_library_skips_what_it_cannot_use():
    X = points() - 1
    library = Library(ALPHABET, X, X[:, 0])
    before = len(library.counts)
    library.add([ALPHABET.encode(row.split()) for row in ("log x1", "- x1 x1", "* <constant> x2", "+ 1 1")])
    assert len(library.counts) == before == 2
    library.add([ALPHABET.encode("sin pow2 x1".split())] * 3)
    part = tuple(ALPHABET.encode("sin pow2 x1".split()))
    assert len(library.counts) == 4 and library.counts[part] == 3
    np.testing.assert_allclose(library.values[part], np.sin(X[:, 0] ** 2), atol=1e-12)


def test_bits_prefer_plain_constants_and_what_noise_allows_is_known():
    prefix = ALPHABET.encode("* <constant> x1".split())
    plain, odd = (Candidate(prefix, [c], 1e-4, 3, 0.0) for c in (2.0, 2.0134))
    assert bits(ALPHABET, plain, 20) < bits(ALPHABET, odd, 20) < bits(ALPHABET, odd._replace(fvu=1e-3), 20)
    for noise, most in ((0.0, 1e-20), (0.1, 1e-3)):
        for problem in itertools.islice(problems("feynman", 0, noise, 2), 5):
            fitted = noise and problem.formula.values
            assert 1e-8 * bool(fitted) <= attainable(problem) <= (most if fitted else 1e-20)


def test_a_saved_pool_is_a_suite(tmp_path):
    save_pool(tmp_path, draw_pool(12, ALPHABET, POOL, None, seed=0, split=1), ALPHABET, POOL)
    found, again = (list(problems(str(tmp_path), 0, 0.0)) for _ in range(2))
    assert len(found) >= 10 and len({problem.name for problem in found}) == len(found)
    for problem, same in zip(found, again, strict=True):
        assert problem.X.shape == (20, len(problem.formula.variables)) and np.array_equal(problem.X, same.X)
        assert np.isfinite(problem.y).all() and np.isfinite(problem.y_val).all() and len(problem.y_val) == 1000
        assert attainable(problem) < 1e-20


def test_plain_pairs_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    parts, y = rng.standard_normal((6, 30)), rng.standard_normal(30)
    parts[5] = -parts[2] + 1e-9 * parts[5]  # a sum of nothing
    y += parts[1] - parts[4]
    found = plain_pairs(parts, y, most=3)
    naive = []
    for sign in (1, -1):
        for i in range(6):
            for k in range(i + 1, 6):
                g = parts[i] + sign * parts[k]
                if np.ptp(g) > 1e-6:
                    naive.append((1 - np.corrcoef(g, y)[0, 1] ** 2, i, sign, k))
    best = sorted(naive)[0]
    assert min(found)[1:] == best[1:] == (1, -1, 4) and min(found)[0] == pytest.approx(best[0])
    shares = {tuple(pair): share for share, *pair in naive}
    assert all(share == pytest.approx(shares[tuple(pair)]) for share, *pair in found)


def test_the_front_of_each_length():
    made = [Candidate([0] * n, [], error, n, 0.0) for n, error in ((3, 0.5), (3, 0.4), (5, 0.45), (7, 0.1))]
    assert [(c.length, c.fvu) for c in front(made)] == [(3, 0.4), (7, 0.1)]
