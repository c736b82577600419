"""The search of a formula with the words of a user: operators, terms that may not occur, answers ready to be shown.

M points, D variables. generate.py is its command, regressor.py its estimator.
"""

import difflib
import functools
import itertools
import math
from collections import namedtuple

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.formulas import search
from data_utils.formulas.expressions import OPERATORS, SYNONYMS, evaluate, padded_columns, parse_formula
from data_utils.formulas.formats import number_text, round_constants, used_variables, write_formula
from data_utils.formulas.score import Ranked
from data_utils.formulas.search import Network, Prior, find_formula
from data_utils.formulas.simplify import NotReal, simplify
from data_utils.formulas.skeletons import RARE, WEIGHTS, PoolConfig, check_pool

LEFT_OUT = "asinh", "acosh", "atanh", "pow1_4", "pow1_5"  # of a search without a network, unless they are asked for
SELDOM = {*RARE, "abs", "tan", "pow4", "pow5", "tanh", "atan"}
SELDOM_WEIGHT = 0.3
MOST_COLUMNS = 150  # an alphabet has at most 256 tokens
MOST_ORDERS = 64  # of the operands of an excluded term
COMPARED, SAME = 1000, 1e-9  # rows on which formulas are compared; standard deviations of y that count as nothing
ALWAYS = "+", "*"  # every sum of parts needs them
MULTIPLES = tuple(f"{name}{k}" for name in ("mult", "div") for k in (2, 3, 4, 5))  # in which normal forms are written
ARITHMETIC = (*ALWAYS, "-", "/", "neg", "inv", *MULTIPLES)
FAMILIES = {  # signs that several operators are written with
    "-": ("-", "neg"),
    "/": ("/", "inv", "div2", "div3", "div4", "div5"),
    "**": tuple(name for name in OPERATORS if name.startswith("pow")),
}
FAMILIES["^"] = FAMILIES["**"]

Answer = namedtuple("Answer", "prefix constants numbers bits fvu length front")  # fvu: with the constants as `numbers`


# ---- what a user types


def operators_named(word):
    """Return the operators that a word stands for: sin, sqrt, ln, / and others; () for no operator."""
    if word in FAMILIES:
        return FAMILIES[word]
    word = SYNONYMS.get(word, word)
    return (word,) if word in OPERATORS else ()


def check_operators(words, flag="--operators"):
    """Return the operators that `words` allow beside arithmetic; all but LEFT_OUT for none."""
    if not words:
        return tuple(name for name in OPERATORS if name not in LEFT_OUT)
    allowed = set(ARITHMETIC)
    for word in words:
        operators = operators_named(word)
        if not operators:
            raise UsageError(f"{flag} {word}: no operator of that name{_nearest(word, _operator_words())}")
        allowed.update(operators)
    return tuple(name for name in OPERATORS if name in allowed)


def vocabulary(D, operators, excluded=()):
    """Return (PoolConfig, Alphabet) of a search without a network over D columns."""
    operators = tuple(name for name in operators if name not in excluded)
    seldom = [f"{name}:{SELDOM_WEIGHT}" for name in operators if name in SELDOM]
    weights = ",".join([WEIGHTS, *seldom])
    pool = PoolConfig(operators=operators, variables=tuple(f"x{i + 1}" for i in range(D)), operator_weights=weights)
    return pool, check_pool(pool)


def read_terms(texts, names, flag="--exclude_terms"):
    """Return (operators, token lists) of the terms that a user typed about columns `names`.

    A bare operator stands for all its uses. Each other term comes as it is and in normal form, with the operands of
    sums and products in either order. Raises UsageError for what is neither.
    """
    operators, terms = [], []
    for text in texts:
        named = () if text in names else operators_named(text.strip())
        if set(named) & set(ALWAYS):
            raise UsageError(f"{flag} {text}: the search adds and multiplies parts, it can't do without\n"
                             f"fix: another term, such as {flag} sin")  # fmt: skip
        if named:
            operators += named
            continue
        try:
            prefix = [f"x{list(names).index(text) + 1}"] if text in names else parse_formula(text, names)[0]
        except DataError as e:
            words = [*names, *_operator_words()]
            raise UsageError(f"{flag} {text}: neither an operator nor a formula of the columns{_nearest(text, words)}\n"
                             f"columns: {', '.join(names)}") from e  # fmt: skip
        terms += _forms(prefix)
    return tuple(dict.fromkeys(operators)), terms


def _forms(prefix):
    """Return a term as token lists: as it is and in normal form, operands of + and * in either order."""
    forms = _orders(prefix)
    try:
        forms += _orders(simplify(prefix)[0])
    except NotReal:
        pass
    return [list(form) for form in dict.fromkeys(map(tuple, forms))]


def _orders(prefix):
    tokens = iter(prefix)

    def read():
        token = next(tokens)
        operands = [read() for _ in range(OPERATORS[token].arity if token in OPERATORS else 0)]
        orders = [[token, *itertools.chain(*parts)] for parts in itertools.product(*operands)]
        if token in ALWAYS:
            orders += [[token, *right, *left] for left, right in itertools.product(*operands)]
        return orders[:MOST_ORDERS]

    return read()


def _operator_words():
    return [name for name in (*OPERATORS, *SYNONYMS, *FAMILIES) if not name.startswith(("mult", "div"))]


def _nearest(word, words):
    near = difflib.get_close_matches(word, words, 3)
    return f"\nnearest: {', '.join(near)}" if near else f"\noperators: {' '.join(_operator_words())}"


def contains(formula, operators, terms):
    """Return whether a Ranked formula has one of the operators or terms that `read_terms` returned.

    It is looked at as it is and as it is printed: there a power with the exponent 2 is a square.
    """
    forms = [list(formula.prefix)]
    numbers = [number_text(value) if abs(value) < 1e11 else "1.5" for value in formula.constants]
    names = [f"x{i + 1}" for i in range(max(used_variables(formula.prefix), default=0) + 1)]
    try:
        forms.append(parse_formula(write_formula(formula.prefix, numbers, names), names)[0])
    except DataError:  # a large exponent
        pass
    if any(set(operators) & set(form) for form in forms):
        return True
    return any(search.contains(form, terms) for form in forms)


# ---- the search


def search_formulas(
    X, y, names, rng, *, model=None, network=None, operators=(), exclude_terms=(), longest=0, held=None, watch=None,
    **settings,
):  # fmt: skip
    """Search y (M,) = f(X) (M, D) -> Alphabet, list of score.Ranked, best first, how many candidates were fitted.

    names: of the columns. model: a FormulaModel that proposes beside the prior, or None; network: the settings with
    which it does. operators, exclude_terms: words as a user types them; longest: tokens of a formula at most, 0 = no
    limit. held: HoldOut of the prior. watch(alphabet, best Candidate, seconds) is called after each round. The other
    settings are those of find_formula.
    Raises UsageError for unknown words, and for more columns than there can be.
    """
    D = X.shape[1]
    allowed = check_operators(operators)
    removed, terms = read_terms(exclude_terms, names)
    if D > MOST_COLUMNS:
        raise UsageError(f"{D} columns, expected at most {MOST_COLUMNS}\n"
                         "fix: --columns with the names of those that may matter")  # fmt: skip
    if model and D > len(model.alphabet.variables):
        raise UsageError(f"{D} columns, but the network reads at most {len(model.alphabet.variables)}; "
                         "--columns names fewer\ntry: --method prior")  # fmt: skip
    if model and not operators:
        allowed = [name for name in OPERATORS if name in allowed or name in model.alphabet.ids]
    pool, alphabet = vocabulary(D, allowed, removed)
    if np.ptp(y) == 0:
        return alphabet, [Ranked(["<constant>"], [float(y[0])], 0.0, 0.0, 1, False, [True])], 0
    prior = Prior(alphabet, pool, D, held)
    propose = Network(model, X, y, alphabet, **network) if model else prior
    ranked, tried = find_formula(
        propose, X, y, alphabet=alphabet, pool=pool, rng=rng, prior=prior, exclude=terms, longest=longest,
        watch=functools.partial(watch, alphabet) if watch else None, **settings,
    )  # fmt: skip
    formulas = [
        formula
        for formula in ranked
        if not contains(formula, removed, terms) and (not longest or formula.length <= longest)
    ]
    return alphabet, formulas, tried


# ---- what a user sees


def to_answers(alphabet, ranked, data, digits=0):
    """Return score.Ranked formulas, best first, as Answers for score.Data, with the Pareto front marked.

    On the front are formulas that fit better than all that are as short or shorter. A formula with the same values as
    a better one is left out. digits: of constants, 0 = as many as each needs.
    """
    answers, few = [], []
    rows = np.unique(np.linspace(0, data.n - 1, COMPARED).astype(int))
    size = np.abs(data.y).max() or 1.0  # by which y is divided, since squares may leave the range of floats
    variance = np.var(data.y / size)
    deviation = math.sqrt(variance)
    columns = padded_columns(alphabet, data.X)[None]
    for formula in ranked:
        if is_mean(formula):  # fitted, it may be that of residuals in proportion to y, or a plain number near it
            mean = float(np.average(data.y, weights=data.weights[False] ** 2))
            formula = formula._replace(prefix=["<constant>"], constants=[mean], length=1, relative=False)
        row = np.array([alphabet.encode(formula.prefix)], np.uint8)
        values = evaluate(alphabet, row, np.array([formula.constants or [0.0]]), columns[:, rows])[0] / size
        if any(np.abs(values - others).max() <= SAME * deviation for others in few):
            continue
        few.append(values)
        numbers = round_constants(alphabet, formula, data, digits)
        values = evaluate(alphabet, row, np.array([[float(text) for text in numbers] or [0.0]]), columns)[0]
        fvu = float(np.mean(((values - data.y) / size) ** 2) / variance) if variance else 0.0
        answers.append(Answer(formula.prefix, formula.constants, numbers, formula.bits, fvu, formula.length, False))
    least = np.inf
    for i in sorted(range(len(answers)), key=lambda i: (answers[i].length, answers[i].fvu)):
        if answers[i].fvu < least:
            least = answers[i].fvu
            answers[i] = answers[i]._replace(front=True)
    return answers


def is_mean(formula):
    """Return whether a Ranked or an Answer is a number alone."""
    return not used_variables(formula.prefix)
