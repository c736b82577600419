"""Distributions, uniform trees, hold-outs, pools, bundles: each against a naive reference."""

import dataclasses
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from data_utils.errors import DataError, UsageError
from data_utils.formulas import holdout, pools, prepare, skeletons
from data_utils.formulas.bundles import build_settings, load_config, save_config
from data_utils.formulas.distributions import parse_distribution
from data_utils.formulas.expressions import OPERATORS, Alphabet
from data_utils.formulas.simplify import simplify
from data_utils.formulas.skeletons import PoolConfig, check_pool, make_chunk, sample_arities, sample_trees
from tests.helpers import ROOT

NEAR_MISSES = """cos x1|+ x1 pow4 x1|+ pow2 x1 pow4 x1|+ x1 exp x1|+ sin x1 cos x1|* sin x1 cos pow2 x1|tan + x1 x2
+ x1 + pow3 x1 pow4 x1|+ sin x1 cos pow2 x2|* cos x1 cos x2|pow x1 + x1 x2|+ log x1 log + x1 pow2 x1|sin log x1
+ pow2 x1 pow3 x2|exp inv x1|pow1_2 + x1 pow3 x2|- exp x1 x2|* x1 tanh x2|+ sin x1 sin pow3 x2|* pow2 x1 log x2"""


@pytest.fixture(scope="module")
def held():
    return holdout.hold_out(PoolConfig())


def arity(token):
    return OPERATORS[token].arity if token in OPERATORS else 0


def tree(prefix):
    """Nested lists [token, operand, ...] of a prefix token list, which must be one formula."""
    tokens = iter(prefix)

    def read():
        token = next(tokens)
        return [token, *(read() for _ in range(arity(token)))]

    nested = read()
    assert next(tokens, None) is None
    return nested


def flat(t):
    return [t[0], *(token for operand in t[1:] for token in flat(operand))]


def test_distributions_against_what_they_say():
    rng = np.random.default_rng(0)
    cases = [("constant(2)", 2, 2, 2), ("-3", -3, -3, -3), ("uniform(1,3)", 1, 3, 2), ("int(1,4)", 1, 4, 2.5),
             ("triangular(1,4,10)", 1, 10, 5), ("log(1,100)", 1, 100, 99 / np.log(100)), ("log_int(3,3)", 3, 3, 3),
             ("0.5*int(0,0)|1.5*constant(4)", 0, 4, 3)]  # fmt: skip
    for text, low, high, mean in cases:
        y = parse_distribution(text)(rng, (100, 200))
        assert y.shape == (100, 200) and y.min() >= low and y.max() <= high and abs(y.mean() - mean) < 0.3, text
    y = parse_distribution("normal(1,2)")(rng, 20000)
    assert abs(y.mean() - 1) < 0.1 and abs(y.std() - 2) < 0.1
    assert abs(np.median(parse_distribution("cauchy(5,1)")(rng, 20000)) - 5) < 0.1
    y = parse_distribution("signed_log(1e-2,1e2)")(rng, 20000)
    assert 0.48 < (y > 0).mean() < 0.52 and abs(np.median(np.abs(y)) - 1) < 0.1
    assert Counter(parse_distribution("log_int(1,3)")(rng, 20000).tolist()).keys() == {1.0, 2.0, 3.0}
    ends = parse_distribution("interval(normal(0,50),constant(2))", support=True)(rng, (50, 40)).reshape(-1, 3)
    assert (ends[:, 0] <= ends[:, 1]).all() and np.abs(ends).max() == 30 and (ends[:, 2] == 0).all()
    low, high, _ = parse_distribution("textbook(constant(2))", support=True)(rng, 900).T
    assert {*zip(low.tolist(), high.tolist(), strict=True)} == {(0, 2), (-2, 2), (2, 10)}
    low, high, kind = parse_distribution("decade(-6,6)", support=True)(rng, 900).T
    assert low.min() >= 1e-6 and high.max() <= 1e6 and {*kind} == {-1, 1, 2}
    assert {*np.rint(np.log10(high / low)).tolist()} == {1, 2}


@pytest.mark.parametrize(
    "text, column, word, support",
    [
        ("", 1, "terms like", False),
        ("normal(0", 7, "terms like", False),
        ("nomal(0,1)", 1, "normal", False),
        ("normal(0,1,2)", 1, "2 arguments", False),
        ("0*normal(0,1)", 1, "weights", False),
        ("int(1.5,2)", 1, "integers", False),
        ("log(0,1)", 1, "low", False),
        ("normal(0,1) x", 13, "terms like", False),
        ("1e999", 1, "number", False),
        ("decade(1,2)", 1, "one of", False),
        ("normal(0,1)", 1, "one of", True),
        ("interval(decade(1,2),1)", 10, "one of", True),
        ("normal(__import__('os'),1)", 8, "number", False),
    ],
)
def test_bad_distributions_name_the_column(text, column, word, support):
    with pytest.raises(UsageError, match=rf"column {column}: .*{word}"):
        parse_distribution(text, support)
    with pytest.raises(UsageError, match="characters"):
        parse_distribution("1|" * 600)


@cache
def count(empty, n):
    """D(e, n) of Lample and Charton: ways to fill e empty nodes with n operators."""
    if not empty:
        return 0
    return 1 if not n else count(empty - 1, n) + count(empty, n - 1) + count(empty + 1, n - 1)


@pytest.mark.parametrize("n, shapes", [(2, 6), (3, 22), (4, 90)])
def test_trees_are_uniform(n, shapes):
    assert count(1, n) == shapes
    rows = sample_arities(np.random.default_rng(n), np.full(40000, n))
    counts = Counter(tuple(a for a in row if a >= 0) for row in rows.tolist())
    assert len(counts) == shapes and all(sum(a - 1 for a in shape) == -1 for shape in counts)
    expected = len(rows) / shapes
    chi = sum((times - expected) ** 2 / expected for times in counts.values())
    assert chi < shapes - 1 + 5 * (2 * (shapes - 1)) ** 0.5
    assert (sample_arities(np.random.default_rng(0), np.full(50, n), unary=False) != 1).all()
    assert (sample_arities(np.random.default_rng(0), np.full(50, n), binary=False) != 2).all()


def test_every_token_occurs_and_every_tree_parses():
    pool = PoolConfig(operators=tuple(OPERATORS), variables=("x1", "x2", "x3", "x4"), min_operators=0)
    alphabet = check_pool(pool)
    rows = sample_trees(np.random.default_rng(0), 10000, alphabet, pool)
    tokens, leaves, sizes = Counter(), Counter(), Counter()
    for row in rows:
        prefix = alphabet.decode(row)
        tree(prefix)
        tokens.update(prefix)
        sizes[sum(token in OPERATORS for token in prefix)] += 1
        leaves[len({token for token in prefix if token in pool.variables})] += 1
    assert tokens.keys() == {*pool.operators, *pool.variables, "<constant>"} and not leaves[0]
    assert sizes.keys() == set(range(10)) and max(sizes.values()) < 1200 > 800 < min(sizes.values())
    assert 9 < tokens["+"] / tokens["pow"] < 11 and 3.5 < tokens["sin"] / tokens["tan"] < 4.6
    assert 0.1 < tokens["<constant>"] / sum(tokens[x] for x in pool.variables) < 0.25
    distinct = dataclasses.replace(pool, leaf_prior="distinct", n_operator_distribution="length_exponential", power=1)
    rows = sample_trees(np.random.default_rng(0), 4000, alphabet, distinct)
    assert all({*alphabet.decode(row)} & {*pool.variables} for row in rows)
    n = (alphabet.arity[rows] > 0).sum(1)
    assert 2.3 < (n == 9).sum() / (n == 8).sum() < 3.2  # e


def swapped(t, draw):
    """The same formula with the operands of sums and products in random order."""
    operands = [swapped(operand, draw) for operand in t[1:]]
    if t[0] in "+*" and draw.random() < 0.5:
        operands.reverse()
    return [t[0], *operands]


def with_constant(t, draw):
    """The formula with a constant added to one part of it, or that part scaled."""
    if len(t) > 1 and draw.random() < 0.6:
        i = draw.randrange(1, len(t))
        return [*t[:i], with_constant(t[i], draw), *t[i + 1 :]]
    operator = draw.choice(["+", "*", "mult2", "neg"])
    return [operator, t] + [["<constant>"]] * (operator in "+*")


def row_of(prefix, alphabet):
    return np.array([alphabet.encode(prefix)], np.uint8)


def test_test_sets_are_recognised_renamed_reordered_and_with_constants(held):
    draw, alphabet = random.Random(0), Alphabet(OPERATORS, [f"x{i + 1}" for i in range(9)])
    missed = []
    for name in ("nguyen", "feynman", "fastsrb"):
        for formula in pools.read_formulas(ROOT / f"configs/test_set/{name}.csv"):
            assert len(tree(formula.prefix)) > 1
            k = len(formula.variables)
            if k > 5:
                continue
            names = draw.sample(alphabet.variables, k)
            renamed = [dict(zip(alphabet.variables, names, strict=False)).get(token, token) for token in formula.prefix]
            reordered = swapped(tree(renamed), draw)
            for changed in (reordered, with_constant(reordered, draw)):
                prefix = simplify(flat(changed))[0]
                if not held(row_of(prefix, alphabet), alphabet)[0]:
                    missed.append((formula.name, " ".join(flat(changed)), " ".join(prefix)))
    assert not missed, "\n".join(map(str, missed))


def test_near_misses_pass(held):
    alphabet = check_pool(PoolConfig())
    prefixes = [text.split() for text in NEAR_MISSES.replace("\n", "|").split("|")]
    assert len(prefixes) == 20
    passed = [not held(row_of(simplify(prefix)[0], alphabet), alphabet)[0] for prefix in prefixes]
    assert all(passed), [prefix for prefix, good in zip(prefixes, passed, strict=True) if not good]


def values(t, x, c):
    """Values of a tree on points x (D, M), every number c."""
    if len(t) > 1:
        operands = [values(operand, x, c) for operand in t[1:]]
        return OPERATORS[t[0]].function(*operands, np.empty(x.shape[1]))
    return x[int(t[0][1:]) - 1] if t[0].startswith("x") else np.full(x.shape[1], c)


def bare(t):
    """The tree without numbers, or None where only numbers are left."""
    operands = [bare(operand) for operand in t[1:]]
    if not operands:
        return t if t[0].startswith("x") else None
    remaining = [operand for operand in operands if operand]
    if t[0] == "/" and remaining == operands[1:]:
        return ["inv", *remaining]
    if len(remaining) < 2 and (len(operands) == 2 or t[0][:3] in ("mul", "div", "neg")) or not remaining:
        return remaining[0] if remaining else None
    return ["+" if t[0] == "-" else t[0], *remaining]


def signature(t, x):
    """The values to 7 digits; None where few are finite, or all are the same and so say little."""
    y = values(t, x, 0.7)
    good = y[np.isfinite(y)]
    return tuple(np.char.mod("%.7g", np.where(np.isfinite(y), y, np.nan))) if len({*good.round(9)}) > 4 else None


def test_no_test_set_skeleton_in_many_draws(held):
    """With the chunks of a run: no formula of a test set, and none that differs from one by constants alone."""
    pool = PoolConfig(max_operators=5)
    alphabet = check_pool(pool)
    chunk, rejected = make_chunk(np.random.default_rng(5), 60_000, alphabet, pool, held)
    assert rejected["held out"] > 6_000 and chunk.counts.sum() + sum(rejected.values()) == 60_000
    x = np.random.default_rng(1).uniform(0.3, 2.2, (3, 16))
    x[:, 10:] *= [[-1, -1, -1, 1, 1, -1], [1, -1, 1, -1, -1, 1], [-1, 1, 1, -1, 1, -1]]
    tests, bare_tests = set(), set()
    with np.errstate(all="ignore"):
        for name in ("nguyen", "feynman", "fastsrb"):
            for formula in pools.read_formulas(ROOT / f"configs/test_set/{name}.csv"):
                orders = [*itertools.permutations(range(3))] if len(formula.variables) <= 3 else []
                normal = tree(simplify(formula.prefix)[0])
                tests |= {signature(tree(formula.prefix), x[list(order)]) for order in orders}
                bare_tests |= {signature(bare(normal), x[list(order)]) for order in orders}
        for row in chunk.tokens[:6000]:  # the most frequent are among the first
            t = tree(alphabet.decode(row))
            assert signature(t, x) not in tests - {None}, flat(t)
            assert signature(bare(t), x) not in bare_tests - {None}, flat(t)


@pytest.mark.slow
def test_processes_agree_on_chunks():
    code = (
        "import hashlib, numpy as np; from data_utils.formulas import holdout, skeletons as s;"
        "p = s.PoolConfig(max_operators=5);"
        "import sys; s.make_chunk(np.random.default_rng(4), int(sys.argv[1]), s.check_pool(p), p);"
        "c, r = s.make_chunk(np.random.default_rng(3), 1500, s.check_pool(p), p, holdout.hold_out(p));"
        "print(hashlib.sha256(c.tokens.tobytes() + c.counts.tobytes()).hexdigest(), sorted(r.items()))"
    )
    outputs = set()
    for seed in (1, 2):
        command = [sys.executable, "-c", code, str(1000 * seed)]
        env = os.environ | {"PYTHONHASHSEED": str(seed)}
        outputs.add(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, check=True).stdout)
    assert len(outputs) == 1 and "held out" in outputs.pop()


def test_chunks_hold_distinct_normal_forms(held):
    pool = PoolConfig(max_length=12)
    alphabet = check_pool(pool)
    chunk, _ = make_chunk(np.random.default_rng(0), 3000, alphabet, pool, held)
    assert len({bytes(row) for row in chunk.tokens}) == len(chunk.tokens) and chunk.tokens.shape[1] == 12
    for row in chunk.tokens[:300]:
        prefix = alphabet.decode(row)
        assert simplify(prefix)[0] == prefix and {*prefix} & {*pool.variables}


def small(**changes):
    return PoolConfig(**(dict(max_operators=3, holdout_pools=()) | changes))


def test_saved_pools(tmp_path):
    pool = small()
    alphabet = check_pool(pool)
    drawn = skeletons.draw_pool(300, alphabet, pool, None, seed=1, split=1)
    assert len({bytes(row) for row in drawn.tokens}) == 300
    pools.save_pool(tmp_path / "a", drawn, alphabet, pool)
    pools.save_pool(tmp_path / "b", drawn, alphabet, pool)
    for name in ("skeletons.npz", "skeleton_pool.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded, old = pools.load_pool(tmp_path / "a")
    new = Alphabet(list(pool.operators)[::-1], [*pool.variables, "x4"])
    moved = pools.translate(loaded, old, new)
    assert [new.decode(row) for row in moved.tokens] == [alphabet.decode(row) for row in drawn.tokens]
    assert (moved.counts == drawn.counts).all()
    with pytest.raises(UsageError, match="lacks"):
        pools.translate(loaded, old, Alphabet(["+"], ["x1"]))
    closed = holdout.HoldOut([alphabet.decode(row) for row in drawn.tokens])
    assert closed(drawn.tokens, alphabet).all()
    other = dataclasses.replace(pool, holdout_pools=(str(tmp_path / "a"),))
    assert holdout.hold_out(other)(drawn.tokens, alphabet).all()
    again, _ = make_chunk(np.random.default_rng(9), 3000, alphabet, pool, closed)
    assert not {bytes(row) for row in again.tokens} & {bytes(row) for row in drawn.tokens}
    with pytest.raises(DataError, match="nothing"):
        holdout.hold_out(dataclasses.replace(pool, holdout_pools=(str(tmp_path / "nothing"),)))


def test_strict_leaves_out_what_constants_make_a_held_out_formula(tmp_path):
    """Where constants stand linearly, least squares say whether they can: --strict leaves out just these skeletons."""
    (tmp_path / "held.csv").write_text(
        "name,formula,variables,ranges\na,x**3+x**2+x,x,-1:1\nb,x*y+y,x y,1:2 1:5\nc,x+y+z,x y z,0:1 0:1 0:1\n"
    )
    settings = "operators: ['+', '*', pow2]\nmax_operators: 5\nmax_length: 11\nconstant_probability: 0.4\n"
    (tmp_path / "pool.yaml").write_text(settings + f"holdout_pools: ['{tmp_path}/held.csv']\n")
    prefixes, counts = {}, {}
    for strict in (False, True):
        out = str(tmp_path / f"strict-{strict}")
        flags = dict(config=str(tmp_path / "pool.yaml"), output_dir=out, size=400, strict=strict)
        cfg = SimpleNamespace(**flags, seed=0, fresh=False, verbose=False)
        prepare.generate_skeleton_pool(cfg)
        saved, alphabet = pools.load_pool(out)
        prefixes[strict] = [alphabet.decode(row) for row in saved.tokens]
        counts[strict] = dict(zip(map(tuple, prefixes[strict]), saved.counts.tolist(), strict=True))
        assert len(prefixes[strict]) == 400
    x = np.random.default_rng(3).uniform(1, 2, (2, 30))
    laws = {1: [x[0] ** 3 + x[0] ** 2 + x[0]], 2: [x[0] * x[1] + x[1], x[0] * x[1] + x[0]]}
    verdicts = {}
    for prefix in {*map(tuple, prefixes[False]), *map(tuple, prefixes[True])}:
        names, k = sorted({*prefix} & {"x1", "x2", "x3"}), prefix.count("<constant>")
        t = tree(dict(zip(names, ("x1", "x2", "x3"), strict=False)).get(token, token) for token in prefix)
        if k and len(names) <= 2:
            origin, *columns = (with_constants(t, x, c) for c in [np.zeros(k), *np.eye(k)])
            columns = np.stack(columns, 1) - origin[:, None]
            if np.allclose(with_constants(t, x, np.arange(2.0, 2 + k)), origin + columns @ np.arange(2.0, 2 + k)):
                targets = [y - origin for y in laws[1] * (len(names) == 1) + laws[2]]
                residuals = [y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0] for y in targets]
                verdicts[prefix] = min(map(np.std, residuals)) < 1e-8
    dropped = counts[False].keys() - counts[True].keys()
    assert sum(verdicts.values()) > 5 and len(verdicts) > 150
    assert not any(verdicts.get(prefix) for prefix in counts[True])
    assert dropped and all(verdicts.get(prefix, True) for prefix in dropped)
    assert not any({*pools.EVERY.variables[:3]} <= {*prefix} for prefix in dropped)  # nor is c, of three, fitted


def with_constants(t, x, constants):
    """Values of a tree at x (2, M) with these numbers for its constants, in order."""
    numbers = iter(constants)

    def value(t):
        token, operands = t[0], [value(operand) for operand in t[1:]]
        if token == "<constant>":
            return np.full(x.shape[1], next(numbers))
        return OPERATORS[token].function(*operands, np.empty(x.shape[1])) if operands else x[int(token[1:]) - 1]

    return value(t)


def test_damaged_pools_are_refused(tmp_path):
    pool = small()
    alphabet = check_pool(pool)
    pools.save_pool(tmp_path, skeletons.draw_pool(50, alphabet, pool, None, seed=1, split=1), alphabet, pool)
    npz = (tmp_path / "skeletons.npz").read_bytes()
    good = dict(np.load(tmp_path / "skeletons.npz"))
    for damage in (npz[:-30], npz[:100], b"", npz[:90] + bytes([npz[90] ^ 255]) + npz[91:]):
        (tmp_path / "skeletons.npz").write_bytes(damage)
        with pytest.raises(DataError, match="skeletons.npz"):
            pools.load_pool(tmp_path)
    hostile = [dict(tokens=np.array([{}], object)), dict(tokens=good["tokens"].astype(int)), dict(counts=np.zeros(50)),
               dict(tokens=good["tokens"] + np.uint8(200)), dict(tokens=good["tokens"][:, ::-1])]  # fmt: skip
    for change in hostile:
        np.savez(tmp_path / "skeletons.npz", **(good | change))
        with pytest.raises(DataError, match="skeletons.npz"):
            pools.load_pool(tmp_path)
    np.savez(tmp_path / "skeletons.npz", **good)
    for text in ("!!python/object/apply:os.system [ls]", "operators: [", "operators: 5", "[" * 4000):
        (tmp_path / "skeleton_pool.yaml").write_text(text)
        with pytest.raises(DataError, match="skeleton_pool.yaml"):
            pools.load_pool(tmp_path)


def test_exhausted_pool_says_how_many_exist(monkeypatch):
    monkeypatch.setattr(skeletons, "PARTS", 64)
    monkeypatch.setattr(skeletons, "PATIENCE", 20)
    pool = small(operators=("sin",), operator_weights="", variables=("x1",), max_operators=3, constant_probability=0)
    with pytest.raises(DataError, match="only 3 exist"):
        skeletons.draw_pool(10, check_pool(pool), pool, None, seed=0, split=1)


@pytest.mark.parametrize("changes, words", [
    (dict(min_operators=5, max_operators=4), ["5", "4"]), (dict(variables=()), ["variables"]),
    (dict(variables=("a",)), ["x1"]), (dict(operator_weights="+:0", operators=("+",)), ["weight 0"]),
    (dict(operator_weights="sni:2"), ["sni", "sin"]), (dict(n_support_prior="constant(1)"), ["1 points"]),
    (dict(operators=("sni",)), ["sni", "sin"]), (dict(support_prior="normal(0,1)"), ["column 1"]),
    (dict(literal_prior="normal(0;1)"), ["column 9"])])  # fmt: skip
def test_impossible_pools(changes, words):
    with pytest.raises(UsageError) as e:
        check_pool(PoolConfig(**changes))
    assert all(word in str(e.value) for word in words), e.value


def test_bad_csv_names_the_line(tmp_path):
    path, head = tmp_path / "a.csv", "name,formula,variables,ranges\n"
    for text, word in [("", ":1: no column"), ("x1+x2,a\n", ":1: no column"), (head, "no formula"),
                       (head + "a,x+1,x,0:1\nb,__import__('os'),x,0:1\n", "a.csv:3: "),
                       (head + "a,x+1,x\n", "a.csv:2: "), (head + "a,x+y,x,0:1\n", "a.csv:2: "),
                       (head + "a,x+1,x,0:1 0:1\n", "1 variables, 2 ranges")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError) as e:
            pools.read_formulas(str(path))
        assert word in str(e.value), e.value
    with pytest.raises(DataError, match="import_test_sets"):
        pools.read_formulas(str(tmp_path / "none.csv"))


def run(*arguments):
    command = [sys.executable, "prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_commands(tmp_path):
    (tmp_path / "pool.yaml").write_text("max_operators: 3\nholdout_pools: ['{{ROOT}}/configs/test_set/nguyen.csv']\n")
    first = run("generate-skeleton-pool", "-c", tmp_path / "pool.yaml", "-o", tmp_path / "out", "-s", 40, "-v")
    assert first.returncode == 0 and "40 skeletons" in first.stdout, first.stderr
    assert len(pools.load_pool(tmp_path / "out")[0].tokens) == 40
    assert run("generate-skeleton-pool", "-c", tmp_path / "pool.yaml", "-o", tmp_path / "out").returncode == 2
    (tmp_path / "pool.yaml").write_text("max_operator: 3\n")
    typo = run("generate-skeleton-pool", "-c", tmp_path / "pool.yaml", "-o", tmp_path / "new")
    assert typo.returncode == 2 and "max_operators" in typo.stderr and "pool.yaml" in typo.stderr
    for name, number in (("nguyen", 12), ("fastsrb", 120)):
        cfg = SimpleNamespace(
            input=str(ROOT / f"configs/test_set/{name}.csv"),
            base_skeleton_pool=str(ROOT / "configs/test/skeleton_pool_val.yaml"),
            output_dir=str(tmp_path / name),
            parser=name,
            skip_bad_lines=False,
            verbose=True,
            fresh=False,
        )
        prepare.import_data(cfg)
        assert pools.load_pool(tmp_path / name)[0].counts.sum() == number


def test_bundles_load_build_and_save(tmp_path):
    for name in ("test", "sr-cpu", "v23.0-3M"):
        config = load_config(ROOT / "configs" / name / "train.yaml")
        pool = build_settings(PoolConfig, config["train_dataset"]["skeleton_pool"], name)
        tokenizer = config["train_dataset"]["tokenizer"]
        alphabet = Alphabet(tokenizer["operators"], tokenizer["variables"], tokenizer["special_tokens"])
        assert alphabet.tokens == check_pool(pool).tokens
        assert pool.holdout_pools == tuple(path.replace("{{ROOT}}", str(ROOT)) for path in PoolConfig().holdout_pools)
        save_config(config, tmp_path / name)
        assert len(list((tmp_path / name).iterdir())) == 7 and load_config(tmp_path / name / "train.yaml") == config
        assert "{{ROOT}}" in (tmp_path / name / "skeleton_pool_val.yaml").read_text()
    cpu = load_config(ROOT / "configs/sr-cpu/skeleton_pool_train.yaml", resolve_paths=False)
    given = build_settings(PoolConfig, cpu, "sr-cpu")
    assert given == PoolConfig()


def test_bad_bundles(tmp_path):
    path = tmp_path / "train.yaml"
    cases = [("model: ./none.yaml", "none.yaml"), ("model: ./train.yaml", "refers to itself"), ("- 1", "list"),
             ("optimizer: {kwargs: {lr: 1}}", "optimizer.kwargs.lr: keys are flat here: write lr"),
             ("a: 1\na: 2", "a appears 2 times"), ("a: !!python/name:os.system", "python"),
             ("a: [[1]]", "plain values")]  # fmt: skip
    for text, word in cases:
        path.write_text(text)
        with pytest.raises(UsageError) as e:
            load_config(path)
        assert word in str(e.value) and "train.yaml" in str(e.value), e.value
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("pool: ../saved\nroot: '{{ROOT}}/x'\nplain: data/x\n")
    path.write_text("b: ./sub/b.yaml")
    bundle = load_config(path)["b"]
    assert bundle == dict(pool=str(tmp_path / "saved"), root=f"{ROOT}/x", plain="data/x")
    assert load_config(path, resolve_paths=False) == dict(b="./sub/b.yaml")
    for values, word in [(dict(max_opertors=3), "max_operators"), (dict(max_operators="many"), "int"),
                         (dict(simplify=1), "bool"), (dict(leaf_prior="x"), "counted or distinct")]:  # fmt: skip
        with pytest.raises(UsageError, match=word):
            build_settings(PoolConfig, values, "pool.yaml")
    assert build_settings(PoolConfig, dict(y_limit="1e30", holdout_pools="none"), "").holdout_pools == ("none",)
