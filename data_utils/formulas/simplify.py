"""Bring formulas into one short normal form, written with as few tokens as the operators allow.

A formula is parsed into the nodes of algebra.py, which bring it into normal form, and written back. A text here is a
list of tokens (str) and of numbers (float), which become constants.
"""

import math
from fractions import Fraction

from data_utils.formulas.algebra import (
    RULES,
    SCALES,
    SMALLEST_LAST,
    NotReal,
    exponent,
    node,
    nodes,
    odd_root,
    scale,
    snap,
)
from data_utils.formulas.expressions import LITERALS, OPERATORS

# {6.0: ["mult2", "mult3"], ...}: factors that two operators spell.
CHAINS = {a * b: [SCALES[a], SCALES[b]] for a in sorted(SCALES) for b in sorted(SCALES) if a * b not in SCALES}
NUMBERS = {value: name for name, value in LITERALS.items()}
ARITY = {name: operator.arity for name, operator in OPERATORS.items()}
ODD_FIRST = (5, 3, 4, 2)  # the odd root of an unknown factor would come out of an even one
# How operators are written that an alphabet may lack.
SPELLED = {"pow1_4": ["pow1_2", "pow1_2"], "pow4": ["pow2", "pow2"], "neg": ["*", "(-1)"], "inv": ["/", "1"]}
BOUND = 2**17  # nodes and results are forgotten beyond so many nodes

_results = {}  # {(operator, operands...): node}
_unknown = []  # the nan of the i-th constant without a value: nodes tell them apart by identity


# Nodes to text
def _chain(operator, parts):
    """Join texts by a binary operator."""
    text = parts[-1]
    for part in parts[-2::-1]:
        text = [operator, *part, *text]
    return text


def _raised(text, e):
    """Return the text of a text to the power e, by the operators of powers and roots where they suffice."""
    if type(e) is not float:
        operators = []
        rest = []  # factors of numerator and denominator that have no operator
        for prefix, size in (("pow", e.numerator), ("pow1_", e.denominator)):
            for k in SMALLEST_LAST if prefix == "pow" else ODD_FIRST:
                while size % k == 0:
                    size //= k
                    operators.append(f"{prefix}{k}")
            rest.append(size)
        if rest == [1, 1]:
            return [*operators, *text]
        if e.numerator <= 64:  # a prime power above 5
            first = int(e) if type(e) is Fraction and e > 1 else Fraction(1, e.denominator)
            return ["*", *_raised(text, exponent(first)), *_raised(text, exponent(e - first))]
    return ["pow", *text, float(e) if e == e else e]


def _emit_product(c, factors):
    """Return the text of c times the product of (base, exponent) pairs."""
    if len(factors) == 1 and not c < 0 and factors[0][0].a != "exp" and factors[0][1] == 1:  # most of them
        text = _emit(factors[0][0])
        if c == 1:
            return text
        return [SCALES[c], *text] if c in SCALES else ["*", c, *text]
    if len(factors) > 1 or abs(c) != 1 and abs(c) not in SCALES:  # exp(-x) y is y / exp(x)
        factors = [
            (node("f", "exp", scale(b.b, -1.0)), -e) if b.a == "exp" and b.b.kind == "s" and _negative(b.b) else (b, e)
            for b, e in factors
        ]
    if c < 0:
        turned = [i for i, (b, e) in enumerate(factors) if b.kind == "s" and type(e) is int and e % 2
                  and len(_emit(scale(b, -1.0))) <= len(_emit(b))]  # fmt: skip
        turned.sort(key=lambda i: not _subtracts(factors[i][0]))
        if turned and (c == -1 or -c in SCALES or _subtracts(factors[turned[0]][0])):
            c, i = -c, turned[0]
            factors = [*factors[:i], (scale(factors[i][0], -1.0), factors[i][1]), *factors[i + 1 :]]
    texts = [(_emit(b), e) for b, e in factors]
    if c > 0 and c != 1 and c not in SCALES:
        for i, (_, e) in enumerate(factors):
            if type(e) is Fraction and abs(e.numerator) == 1 and snap(c ** float(1 / e)) in SCALES:
                texts[i] = [SCALES[snap(c ** float(1 / e))], *texts[i][0]], e  # 1.41 sqrt(x) is sqrt(2 x)
                c = 1.0
                break
    sizes = [(b.b, e) for b, e in factors if b.a == "abs" and type(e) is int]
    if len(sizes) > 1:
        texts = [x for x, (b, e) in zip(texts, factors, strict=True) if not (b.a == "abs" and type(e) is int)]
        texts.append((["abs", *_emit_product(1.0, sizes)], 1))
    above, below = [], []  # factors of the numerator and of the denominator
    groups = {}  # {(abs(exponent), number): (bases above, bases below)}
    for text, e in texts:
        if type(e) is float:
            above.append(_raised(text, e))
        else:
            # Even roots stay apart: sqrt(x y) is real where sqrt(x) sqrt(y) is not.
            groups.setdefault((abs(e), 0 if odd_root(e) else len(groups)), ([], []))[e < 0].append(text)
    for (e, _), (up, down) in groups.items():
        if e == 1:
            above += up
            below += down
        elif up and down:
            above.append(_raised(["/", *_chain("*", up), *_chain("*", down)], e))
        else:
            (above if up else below).append(_raised(_chain("*", up or down), e))
    short = c in (1, -1) or c in SCALES or -c in SCALES and above
    if not short:
        above = [[c], *above]
    if above and below:
        text = ["/", *_chain("*", above), *_chain("*", below)]
    else:
        text = _chain("*", above) if above else ["inv", *_chain("*", below)]
    if short and abs(c) != 1:
        text = [SCALES[abs(c)], *text]
    return ["neg", *text] if short and c < 0 else text


def _negative(n):
    """Return whether all coefficients of a sum without a constant are negative."""
    return n.a == 0 and all(k < 0 for _, k in n.b)


def _subtracts(n):
    """Return whether a known coefficient of a sum, or its constant, is negative."""
    return n.a < 0 or any(k < 0 for _, k in n.b)


def _term(t, k):
    """Return the text of k * t, for a term t of a sum."""
    if t.a == "log" and t.b.a == "abs" and k in (2, 4):
        return ["log", f"pow{k:.0f}", *_emit(t.b.b)]
    return _emit_product(k, t.a if t.kind == "p" else ((t, 1),))


def _emit_sum(c, terms):
    """Return the text of c plus the sum of coefficient * term, for (term, coefficient) pairs."""
    if c == 0 and len(terms) == 1:
        return _term(*terms[0])
    sizes = {abs(k) for _, k in terms}
    if len(terms) > 1 and len(sizes) == 1 and sizes != {1.0} and c == c:  # a factor of all terms
        factor = math.copysign(sizes.pop(), terms[0][1])
        ratio = snap(c / factor)
        inner = node("s", ratio if ratio in (1, -1) else 0.0, tuple((t, k / factor) for t, k in terms))
        text = _term(inner, factor)
        return text if c == 0 or ratio in (1, -1) else ["+", *text, c]
    above, below = [], []  # what is added and what is subtracted
    for t, k in terms:
        if t.a == "log" and c == c and c != 0 and abs(k) == 1 and abs(c) < 2 and snap(math.exp(c * k)) in SCALES:
            t = node("t", ("log", SCALES[snap(math.exp(c * k))], *_emit(t.b)))  # log(x) + 0.69 is log(2 x)
            c = 0.0
        if k == -1 or -k in SCALES:
            below.append(_term(t, -k))
        else:
            above.append(_term(t, k))
    if c != 0:
        above.append([c])
    if not below:
        return _chain("+", above)
    return ["-", *_chain("+", above), *_chain("+", below)] if above else ["neg", *_chain("+", below)]


def _emit(n):
    """Return the text of a node."""
    if n.text is None:
        kind, a, b = n.kind, n.a, n.b
        if kind in "cv":
            n.text = [a]
        elif kind == "t":
            n.text = list(a)
        elif kind == "f":
            n.text = [a, *_emit(b)]
        elif kind == "w":
            n.text = ["pow", *_emit(a), *_emit(b)]
        else:
            n.text = _emit_product(1.0, a) if kind == "p" else _emit_sum(a, b)
    return n.text


# Tokens to nodes, and text to tokens
def _parse(prefix, values):
    """Return the node of prefix tokens. values: of its "<constant>"s, None for unknown ones."""
    stack = []
    constants = prefix.count("<constant>")
    while len(_unknown) < constants:
        _unknown.append(float("nan"))
    for token in reversed(prefix):
        if token in ARITY:
            call = (token, stack.pop()) if ARITY[token] == 1 else (token, stack.pop(), stack.pop())
            result = _results.get(call)
            if result is None:
                result = _results[call] = RULES[token](*call[1:])
            stack.append(result)
        elif token == "<constant>":
            constants -= 1
            if values is None:
                stack.append(node("c", _unknown[constants]))
            elif math.isfinite(values[constants]):
                stack.append(node("c", snap(float(values[constants]))))
            else:
                raise NotReal("a constant that is not finite")
        else:
            stack.append(node("c", LITERALS[token]) if token in LITERALS else node("v", token))
    (root,) = stack
    return root


def _tokens_of(text, with_values):
    """Return (tokens, values of the constants) of a text. Without values short factors stay exact."""
    tokens, values = [], []
    for i, x in enumerate(text):
        if type(x) is str:
            tokens.append(x)
        elif x in NUMBERS:
            tokens.append(NUMBERS[x])
        elif not with_values and i and text[i - 1] == "*" and x in CHAINS:
            tokens[-1:] = CHAINS[x]
        else:
            tokens.append("<constant>")
            values.append(x)
    return tokens, values


def _unsettled(text):
    """Return whether a text has new unknowns, or a number before a sum: these can merge with others."""
    places = [i for i, x in enumerate(text) if type(x) is float]
    return any(text[i] == text[i] or text[i - 1 : i] == ["*"] and text[i + 1] in ("+", "-") for i in places)


def _in_order(prefix, values):
    """Return the same formula, as (tokens, values), with the operands of + and * sorted."""
    stack = []
    constants = list(values or [None] * prefix.count("<constant>"))
    for token in reversed(prefix):
        if token not in OPERATORS:
            stack.append(([token], [constants.pop()] if token == "<constant>" else []))
            continue
        operands = [stack.pop() for _ in range(OPERATORS[token].arity)]
        if token in "+*":
            operands.sort(key=lambda x: (len(x[0]), x[0]))
        stack.append(([token, *(t for x in operands for t in x[0])], [v for x in operands for v in x[1]]))
    return stack[0][0], values and stack[0][1]


def simplify(prefix: list[str], values: list[float] | None = None, operators=None):
    """Return (tokens, values or None) of the shortest known form of prefix tokens.

    values: of the "<constant>"s. With values these are numbers like any other. Without, each "<constant>" is unknown:
    whatever depends on unknown ones alone becomes one, and a sum or product keeps one. A number that no operator spells
    may become one as well.
    operators: those that may be written. Where the form needs another one, the sorted input is returned.

    The form is never longer than the input, equals it wherever the input is finite, and stays as it is when simplified
    again. Raises NotReal where no input gives a finite real number.
    """
    if len(nodes) > BOUND:
        nodes.clear()
        _results.clear()
    tokens, numbers = prefix, values
    try:
        while True:
            text = _emit(_parse(tokens, None if values is None else numbers))
            before = tokens
            tokens, numbers = _tokens_of(text, values is not None)
            if values is not None or tokens == before or not _unsettled(text):
                break
    except OverflowError as e:
        raise NotReal("a number beyond the range of floats") from e
    except RecursionError as e:  # two rules undo each other: two of 200,000 random trees
        raise NotReal("no normal form was found") from e
    if operators is not None:
        spelled = [SPELLED.get(x, [x]) if x in OPERATORS and x not in operators else [x] for x in tokens]
        tokens = [x for parts in spelled for x in parts]
        if any(x in OPERATORS and x not in operators for x in tokens):
            return _in_order(prefix, values)
    if len(tokens) > len(prefix):
        return _in_order(prefix, values)
    return tokens, None if values is None else numbers
