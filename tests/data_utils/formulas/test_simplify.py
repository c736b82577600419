"""The contract of the simplifier on random trees, and pairs written by hand."""

import numpy as np
import pytest

from data_utils.formulas.expressions import OPERATORS, Alphabet, evaluate, parse_formula
from data_utils.formulas.simplify import NotReal, simplify

ALPHABET = Alphabet(OPERATORS, ["x1", "x2", "x3"])
LEAVES = ["x1", "x2", "x3", "<constant>", "<constant>", "0", "1", "(-1)", "np.pi", "np.e"]
SHARES = [0.24, 0.2, 0.16, 0.15, 0.15, 0.02, 0.02, 0.02, 0.02, 0.02]


def random_prefix(rng, operators, names):
    if operators == 0:
        return [str(rng.choice(LEAVES, p=SHARES))]
    name = names[int(rng.integers(len(names)))]
    in_left = operators - 1 if OPERATORS[name].arity == 1 else int(rng.integers(operators))
    right = [] if OPERATORS[name].arity == 1 else random_prefix(rng, operators - 1 - in_left, names)
    return [name, *random_prefix(rng, in_left, names), *right]


@pytest.fixture(scope="module")
def trees():
    """10,000 prefix formulas, and values of their constants: half of them whole numbers."""
    rng, names = np.random.default_rng(0), [*OPERATORS, *["+", "-", "*", "/"] * 6]
    prefixes = [random_prefix(rng, int(rng.integers(1, 9)), names) for _ in range(10_000)]
    draw = (lambda n: rng.normal(0, 2, n), lambda n: rng.integers(-5, 6, n).astype(float))
    return [(p, draw[i % 2](p.count("<constant>")).tolist()) for i, p in enumerate(prefixes)]


def values_of(formulas, X):
    """y (N, M) of (prefix, values) on X (N, M, 3)."""
    width = max(len(prefix) for prefix, _ in formulas)
    tokens = np.array([ALPHABET.encode(p) + [0] * (width - len(p)) for p, _ in formulas], np.uint8)
    constants = np.array([[*v, *[0.0] * (40 - len(v))] for _, v in formulas])
    return evaluate(ALPHABET, tokens, constants, X)


def attempt(prefix, values):
    try:
        return simplify(prefix, values)
    except NotReal:
        return None


def test_with_values_it_is_equal_never_longer_and_final(trees):
    attempts = [(tree, attempt(*tree)) for tree in trees]
    pairs = [(tree, short) for tree, short in attempts if short is not None]
    assert 0.9 < len(pairs) / len(trees)
    assert all(len(short[0]) <= len(tree[0]) for tree, short in pairs)
    assert np.mean([len(s[0]) for _, s in pairs]) < 0.8 * np.mean([len(t[0]) for t, _ in pairs])
    for _, (prefix, values) in pairs:
        again = simplify(prefix, values)
        assert again[0] == prefix and np.allclose(again[1], values, rtol=1e-9)
    rng = np.random.default_rng(1)
    X = rng.normal(size=(len(pairs), 24, 3)) * 10 ** rng.uniform(-1, 0.7, (len(pairs), 1, 1))
    X[::3], X[1::3] = abs(X[::3]), -abs(X[1::3])
    originals = [tree for tree, _ in pairs]
    y, y_short = values_of(originals, X), values_of([short for _, short in pairs], X)
    with np.errstate(all="ignore"):
        finite = np.isfinite(y) & (abs(y) < 1e10)
        size = np.maximum(abs(y), np.nanmedian(np.where(finite, abs(y), 0), 1, keepdims=True)) + 1e-9
        off = finite & ~(abs(y_short - y) < 1e-6 * size)
        doubtful = np.flatnonzero(off.any(1))  # few: cancellation, sin(1e9), 1 / infinity
        wrong = []
        for i in doubtful:
            moved = np.zeros(24)
            for _ in range(20):  # by a change of the inputs in the 13th digit
                near = X[i] * (1 + 1e-13 * rng.normal(size=X[i].shape))
                constants = [v * (1 + 1e-13 * rng.normal()) for v in originals[i][1]]
                moved = np.fmax(moved, abs(values_of([(originals[i][0], constants)], near[None])[0] - y[i]))
            if (off[i] & ~(abs(y_short[i] - y[i]) <= 1000 * moved) & all_finite(*originals[i], X[i])).any():
                wrong.append((originals[i], pairs[i][1]))
    assert np.mean(finite.any(1)) > 0.85 and len(doubtful) < 0.02 * len(pairs)
    assert wrong == []


def all_finite(prefix, values, X):
    """Where every part of a formula is finite, and no exp has sunk to 0: (M,) bool."""
    good, constants = np.ones(len(X), bool), [prefix[:i].count("<constant>") for i in range(len(prefix))]
    for i, first in enumerate(constants):
        end, open_ends = i, 1
        while open_ends:
            open_ends, end = open_ends - 1 + (OPERATORS[prefix[end]].arity if prefix[end] in OPERATORS else 0), end + 1
        y = values_of([(prefix[i:end], values[first:])], X[None])[0]
        good &= np.isfinite(y) & ((y != 0) | (prefix[i] != "exp"))
    return good


def test_nothing_finite_is_refused(trees):
    """What raises has no finite value at random points, but by way of an infinite one: 1 / (1 / 0)."""
    refused = [tree for tree in trees if attempt(*tree) is None]
    X = np.random.default_rng(2).normal(0, 2, (len(refused), 50, 3))
    finite = np.flatnonzero(np.isfinite(values_of(refused, X)).any(1))
    assert len(refused) > 300 and len(finite) < 0.1 * len(refused)
    assert sum(all_finite(*refused[i], X[i]).any() for i in finite) < 3  # atanh(x / x) where x / x rounds below 1


def test_without_values_it_is_never_longer_and_final(trees):
    for prefix, _ in trees[:10_000]:
        short = attempt(prefix, None)
        if short is not None:
            assert short[1] is None and len(short[0]) <= len(prefix)
            assert simplify(short[0]) == short
            triples = zip(short[0], short[0][1:], short[0][2:], strict=False)
            assert not any(a in "+*/" and b == c == "<constant>" for a, b, c in triples)


def test_operands_in_another_order_have_the_same_form(trees):
    rng = np.random.default_rng(3)

    def turned(tokens):
        token = next(tokens)
        operands = [turned(tokens) for _ in range(OPERATORS[token].arity if token in OPERATORS else 0)]
        if token in "+*" and rng.random() < 0.5:
            operands.reverse()
        return [token, *(x for operand in operands for x in operand)]

    for prefix, _ in trees[:4000]:
        if prefix.count("<constant>") < 2:
            assert attempt(turned(iter(prefix)), None) == attempt(prefix, None)


PAIRS = """
x1 + x1                         | mult2 x1
x1 - x1                         | 0
x1/x1                           | 1
0*x1 + x2                       | x2
x2*1 - 0                        | x2
x1 + x2 + x1 + x2               | mult2 + x1 x2
x2 + x1                         | + x1 x2
x2*x1                           | * x1 x2
x1*x1*x1                        | pow3 x1
pow2(pow3(x1))                  | pow3 pow2 x1
pow3(pow2(x1))                  | pow3 pow2 x1
pow2(x1)*pow3(x1)               | pow5 x1
x1**3/x1**2                     | x1
1/(1/x1)                        | x1
-(-x1)                          | x1
x1 - -x2                        | + x1 x2
-x1 + x2                        | - x2 x1
x1/(x2/x3)                      | / * x1 x3 x2
(x1*x2)**2/x1                   | * x1 pow2 x2
mult2(mult3(x1))/mult3(x1)      | 1 + 1 is no token
exp(log(x1))                    | x1
log(exp(x1))                    | x1
sin(asin(x1))                   | x1
tan(atan(x1))                   | x1
sinh(asinh(x1))                 | x1
acosh(cosh(x1))                 | abs x1
sqrt(x1**2)                     | abs x1
sqrt(x1)**2                     | x1
pow1_3(x1**3)                   | x1
pow1_3(x1)**3                   | x1
pow1_4(x1**4)                   | abs x1
pow1_2(pow1_2(x1))              | pow1_4 x1
pow1_5(x1**5) - x1              | 0
abs(abs(x1))                    | abs x1
abs(-x1)                        | abs x1
abs(x1)**2                      | pow2 x1
abs(x1)*abs(x2)                 | abs * x1 x2
abs(x1**2)                      | pow2 x1
abs(exp(x1))                    | exp x1
sin(-x1)                        | neg sin x1
cos(-x1)                        | cos x1
cos(x2 - x1)                    | cos - x1 x2
atan(x2 - x1) + atan(x1 - x2)   | 0
sin(x1)/cos(x1)                 | tan x1
sin(x1)**2 + cos(x1)**2         | 1
exp(x1)*exp(x2)                 | exp + x1 x2
exp(x1)/exp(x2)                 | exp - x1 x2
exp(-x1)*x2                     | / x2 exp x1
log(x1**3)                      | mult3 log x1
log(x1) + log(x1)               | mult2 log x1
exp(2*log(x1))                  | pow2 x1
(x1 + x2)*(x2 + x1)             | pow2 + x1 x2
(x1 - x2)*(x2 - x1)             | neg pow2 - x1 x2
(x1 + x2)/(2*x1 + 2*x2)         | div2 1
(x1 - x2)**3 + (x2 - x1)**3     | 0
x1**0                           | 1
pow(x1, -1)                     | inv x1
pow(x1, 0.5)                    | pow1_2 x1
pow(e, x1)                      | exp x1
pow(1, x1)                      | 1
sqrt(4*x1)                      | mult2 pow1_2 x1
sqrt(x1**2*x2)                  | * pow1_2 x2 abs x1
x1*(x2 + x2)                    | mult2 * x1 x2
x1/2 + x1/2                     | x1
x1/3 + x1/5 - 8*x1/15           | 0
(x1**2)**0.5 - abs(x1)          | 0
"""
PAIRS = [[side.strip() for side in line.split("|")] for line in PAIRS.strip().splitlines()]
UNKNOWN = """
c + c                           | c
c*c*x1                          | * c x1
c*x1 + x1                       | * c x1
c*x1 + c*x1 + c                 | + * c x1 c
c*(x1 + c)                      | + * c x1 c
c*(x1 + x2)                     | * c + x1 x2
c*(c*x1 + x2)                   | + * c x1 * c x2
sin(c)*x1                       | * c x1
x1**c*x1**2                     | pow x1 c
exp(x1 + c)                     | * c exp x1
abs(c*x1)                       | * c abs x1
sin(c*x1) + sin(c*x1)           | + sin * c x1 sin * c x1
(x1 + c)*(x1 + c)               | * + x1 c + x1 c
c/(c*x1 + c)                    | / c + x1 c
-(c*x1)                         | * c x1
-sin(c*x1)                      | sin * c x1
c*sqrt(c*x1)                    | * c pow1_2 x1
(c*x1)**3                       | * c pow3 x1
c - x1 - c                      | - c x1
log(c*x1)/c                     | * c log * c x1
"""
UNKNOWN = [[side.strip() for side in line.split("|")] for line in UNKNOWN.strip().splitlines()]


@pytest.mark.parametrize("text, expected", PAIRS)
def test_pairs(text, expected):
    prefix, values = parse_formula(text, ["x1", "x2", "x3"])
    short, numbers = simplify(prefix, values)
    if "1 + 1" in expected:
        assert (short, numbers) == (["<constant>"], [2.0])
    elif expected == "div2 1":
        assert (short, numbers) == (["<constant>"], [0.5])
    else:
        assert (" ".join(short), numbers) == (expected, [])


@pytest.mark.parametrize("text, expected", UNKNOWN)
def test_pairs_with_unknown_constants(text, expected):
    prefix, _ = parse_formula(text.replace("c", "1.5").replace("1.5os", "cos"), ["x1", "x2", "x3"])
    assert " ".join(simplify(prefix)[0]).replace("<constant>", "c") == expected


def test_a_minus_goes_into_a_sum_that_subtracts():
    prefix, values = parse_formula("-60*x1/(x2*(x1 - x2))", ["x1", "x2"])
    assert simplify(prefix, values) == ("/ * <constant> x1 * x2 - x2 x1".split(), [60.0])
    prefix, values = parse_formula("-(x1 + 343)/(x2 - 340)", ["x1", "x2"])
    assert simplify(prefix, values) == ("/ + x1 <constant> - <constant> x2".split(), [343.0, 340.0])


def test_values_follow_their_constants():
    swapped = simplify(["+", "*", "<constant>", "x2", "*", "<constant>", "x1"], [2.5, 7.0])
    assert swapped == (["+", "*", "<constant>", "x1", "*", "<constant>", "x2"], [7.0, 2.5])
    tiny = simplify(["*", "<constant>", "x1"], [1e-13])
    assert tiny == (["*", "<constant>", "x1"], [1e-13])  # not 0
    assert simplify(["*", "<constant>", "x1"], [6.62607015e-34]) == (["*", "<constant>", "x1"], [6.62607015e-34])


@pytest.mark.parametrize("text", ["log(-1)", "sqrt(-2)*x1", "1/(x1 - x1)", "asin(2)", "log(-abs(x1))", "exp(1000) + x1",
                                  "x1/0", "acosh(0) - x1", "sqrt(-exp(x1))", "pow(0, -1)"])  # fmt: skip
def test_what_has_no_finite_value_raises(text):
    prefix, values = parse_formula(text, ["x1"])
    with pytest.raises(NotReal):
        simplify(prefix, values)


def test_only_the_operators_that_may_be_written(trees):
    few = set(OPERATORS) - {"pow1_4", "neg", "abs", "mult2", "tan"}
    assert simplify(["pow1_2", "pow1_2", "x1"], None, few)[0] == ["pow1_2", "pow1_2", "x1"]
    assert simplify(["-", "0", "x1"], None, few)[0] == ["*", "(-1)", "x1"]
    assert simplify(["+", "x2", "x1"], None, few - {"mult3"})[0] == ["+", "x1", "x2"]
    assert simplify(["pow1_2", "pow2", "+", "x2", "x1"], None, few)[0] == ["pow1_2", "pow2", "+", "x1", "x2"]
    for prefix, values in trees[:3000]:
        try:
            short = simplify(prefix, values, few | set(prefix))
        except NotReal:
            continue
        assert not set(short[0]) & (set(OPERATORS) - few - set(prefix))
        assert simplify(*short, few | set(prefix))[0] == short[0]


def test_bounded_memory():
    from data_utils.formulas import simplify as module

    rng = np.random.default_rng(4)
    for _ in range(3):
        for i in range(1000):
            simplify(["+", "x1", "sin", "*", "<constant>", "x2"], [rng.normal() + i])
        assert len(module.nodes) <= module.BOUND + 100


def test_what_came_before_changes_nothing():
    """Nodes are shared between formulas: one that is equal as a key but of another type must not take a place."""
    from data_utils.formulas import simplify as module

    later = [["*", "x1", "pow1_2", "x1"], ["pow", "x1", "*", "x1", "pow1_2", "x1"], ["pow3", "pow1_2", "x1"]]

    def forms():
        return [module.simplify(prefix) for prefix in later]

    module.nodes.clear(), module._results.clear()
    fresh = forms()
    module.nodes.clear(), module._results.clear()
    for value in (1.5, 2.5, 0.5, 2.0, 3.0, 0.25):
        module.simplify(["pow", "x1", "<constant>"], [value])
    assert forms() == fresh


def test_a_known_base_takes_up_the_exponent_of_its_power():
    power = ["pow", "<constant>", "x1"]
    assert simplify(["pow2", *power], [0.3])[1] == [pytest.approx(0.09)]
    assert simplify(["pow1_2", *power], [0.09]) == (power, [pytest.approx(0.3)])
    assert simplify(["*", "x2", "pow2", "inv", *power], [0.5]) == (["*", "x2", *power], [pytest.approx(4)])
    assert simplify(["pow", "<constant>", "*", "<constant>", "x1"], [0.5, 3.0]) == (power, [pytest.approx(0.125)])
    large = simplify(["pow", "<constant>", "*", "<constant>", "x1"], [70.0, 2000.0])  # 70^2000 is no float
    assert large == (["exp", "*", "<constant>", "x1"], [pytest.approx(2000 * np.log(70))])
    assert simplify(["pow1_2", *power])[0] == ["pow1_2", *power]  # an unknown one may be negative
