"""Formulas -> one short normal form, written with as few tokens as the operators allow."""

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

CHAINS = {a * b: [SCALES[a], SCALES[b]] for a in sorted(SCALES) for b in sorted(SCALES) if a * b not in SCALES}
NUMBERS = {value: name for name, value in LITERALS.items()}
ARITY = {name: operator.arity for name, operator in OPERATORS.items()}
ODD_FIRST = (5, 3, 4, 2)  # the odd root of an unknown factor would come out of an even one
SPELLED = {"pow1_4": ["pow1_2", "pow1_2"], "pow4": ["pow2", "pow2"], "neg": ["*", "(-1)"], "inv": ["/", "1"]}
BOUND = 2**17  # nodes kept

_results, _unknown = {}, []


# back to tokens: lists of str, and of float for what becomes a constant
def _fold(operator, parts):
    text = parts[-1]
    for part in parts[-2::-1]:
        text = [operator, *part, *text]
    return text


def _raised(text, e):
    if type(e) is not float:
        left, chain = [], []
        for prefix, size in (("pow", e.numerator), ("pow1_", e.denominator)):
            for k in SMALLEST_LAST if prefix == "pow" else ODD_FIRST:
                while size % k == 0:
                    size, chain = size // k, [*chain, f"{prefix}{k}"]
            left.append(size)
        if left == [1, 1]:
            return [*chain, *text]
        if e.numerator <= 64:  # a prime power above 5
            whole = int(e) if type(e) is Fraction and e > 1 else Fraction(1, e.denominator)
            return ["*", *_raised(text, exponent(whole)), *_raised(text, exponent(e - whole))]
    return ["pow", *text, float(e) if e == e else e]


def _emit_product(c, factors):
    if len(factors) == 1 and not c < 0 and factors[0][0].a != "exp" and factors[0][1] == 1:  # most of them
        text = _emit(factors[0][0])
        return text if c == 1 else [SCALES[c], *text] if c in SCALES else ["*", c, *text]
    if len(factors) > 1 or abs(c) != 1 and abs(c) not in SCALES:  # exp(-x) y is y / exp(x)
        factors = [
            (node("f", "exp", scale(b.b, -1.0)), -e) if b.a == "exp" and b.b.kind == "s" and _negative(b.b) else (b, e)
            for b, e in factors
        ]
    if c == -1 or -c in SCALES:
        for i, (b, e) in enumerate(factors):
            if b.kind == "s" and type(e) is int and e % 2 and len(_emit(scale(b, -1.0))) <= len(_emit(b)):
                c, factors = -c, [*factors[:i], (scale(b, -1.0), e), *factors[i + 1 :]]
                break
    texts = [(_emit(b), e) for b, e in factors]
    if c > 0 and c != 1 and c not in SCALES:
        for i, (_, e) in enumerate(factors):
            if type(e) is Fraction and abs(e.numerator) == 1 and snap(c ** float(1 / e)) in SCALES:
                texts[i], c = ([SCALES[snap(c ** float(1 / e))], *texts[i][0]], e), 1.0  # 1.41 sqrt(x) is sqrt(2 x)
                break
    sizes = [(b.b, e) for b, e in factors if b.a == "abs" and type(e) is int]
    if len(sizes) > 1:
        texts = [x for x, (b, e) in zip(texts, factors, strict=True) if not (b.a == "abs" and type(e) is int)]
        texts.append((["abs", *_emit_product(1.0, sizes)], 1))
    groups, above, below = {}, [], []
    for text, e in texts:
        if type(e) is float:
            above.append(_raised(text, e))
        else:
            # even roots stay apart: sqrt(x y) is real where sqrt(x) sqrt(y) is not
            groups.setdefault((abs(e), 0 if odd_root(e) else len(groups)), ([], []))[e < 0].append(text)
    for (e, _), (up, down) in groups.items():
        if e == 1:
            above, below = above + up, below + down
        elif up and down:
            above.append(_raised(["/", *_fold("*", up), *_fold("*", down)], e))
        else:
            (above if up else below).append(_raised(_fold("*", up or down), e))
    short = c in (1, -1) or c in SCALES or -c in SCALES and above
    if not short:
        above = [[c], *above]
    text = ["/", *_fold("*", above), *_fold("*", below)] if above and below else []
    text = text or (_fold("*", above) if above else ["inv", *_fold("*", below)])
    if short and abs(c) != 1:
        text = [SCALES[abs(c)], *text]
    return ["neg", *text] if short and c < 0 else text


def _negative(n):
    return n.a == 0 and all(k < 0 for _, k in n.b)


def _term(t, k):
    if t.a == "log" and t.b.a == "abs" and k in (2, 4):
        return ["log", f"pow{k:.0f}", *_emit(t.b.b)]
    return _emit_product(k, t.a if t.kind == "p" else ((t, 1),))


def _emit_sum(c, terms):
    if c == 0 and len(terms) == 1:
        return _term(*terms[0])
    sizes = {abs(k) for _, k in terms}
    if len(terms) > 1 and len(sizes) == 1 and sizes != {1.0} and c == c:  # a factor of all terms
        factor = math.copysign(sizes.pop(), terms[0][1])
        ratio = snap(c / factor)
        inner = node("s", ratio if ratio in (1, -1) else 0.0, tuple((t, k / factor) for t, k in terms))
        text = _term(inner, factor)
        return text if c == 0 or ratio in (1, -1) else ["+", *text, c]
    above, below = [], []
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
        return _fold("+", above)
    return ["-", *_fold("+", above), *_fold("+", below)] if above else ["neg", *_fold("+", below)]


def _emit(n):
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


# in and out
def _parse(prefix, values):
    stack, constants = [], prefix.count("<constant>")
    while len(_unknown) < constants:
        _unknown.append(float("nan"))
    for token in reversed(prefix):
        if token in ARITY:
            which = (token, stack.pop()) if ARITY[token] == 1 else (token, stack.pop(), stack.pop())
            found = _results.get(which)
            if found is None:
                found = _results[which] = RULES[token](*which[1:])
            stack.append(found)
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


def _written(text, known):
    """A list of tokens and numbers -> tokens, values of its constants. Without values short factors stay exact."""
    tokens, values = [], []
    for i, x in enumerate(text):
        if type(x) is str:
            tokens.append(x)
        elif x in NUMBERS:
            tokens.append(NUMBERS[x])
        elif not known and i and text[i - 1] == "*" and x in CHAINS:
            tokens[-1:] = CHAINS[x]
        else:
            tokens.append("<constant>")
            values.append(x)
    return tokens, values


def _unsettled(text):
    """Whether writing brought new unknowns, or one before a sum: they can merge with others."""
    places = [i for i, x in enumerate(text) if type(x) is float]
    return any(text[i] == text[i] or text[i - 1 : i] == ["*"] and text[i + 1] in ("+", "-") for i in places)


def _in_order(prefix, values):
    """The same formula, operands of + and * sorted."""
    stack, left = [], list(values or [None] * prefix.count("<constant>"))
    for token in reversed(prefix):
        if token not in OPERATORS:
            stack.append(([token], [left.pop()] if token == "<constant>" else []))
            continue
        operands = [stack.pop() for _ in range(OPERATORS[token].arity)]
        if token in "+*":
            operands.sort(key=lambda x: (len(x[0]), x[0]))
        stack.append(([token, *(t for x in operands for t in x[0])], [v for x in operands for v in x[1]]))
    return stack[0][0], values and stack[0][1]


def simplify(prefix, values=None, operators=None):
    """Prefix tokens (and the values of their "<constant>"s) -> (tokens, values or None) of the shortest form known.

    Never longer, equal wherever the input is finite, and itself when simplified again. With values they are numbers
    like any other; without, each "<constant>" is unknown: what depends on it alone becomes one, a sum or product keeps
    one, and a number that no operator spells may become one. operators: those that may be written; where the form needs
    another one, the sorted input is returned. Raises NotReal where no input gives a finite real number.
    """
    if len(nodes) > BOUND:
        nodes.clear(), _results.clear()
    text, found = prefix, values
    try:
        while True:
            numbers = _emit(_parse(text, None if values is None else found))
            before, (text, found) = text, _written(numbers, values is not None)
            if values is not None or text == before or not _unsettled(numbers):
                break
    except OverflowError as e:
        raise NotReal("a number beyond the range of floats") from e
    except RecursionError as e:  # two rules undo each other: two of 200,000 random trees
        raise NotReal("no normal form was found") from e
    if operators is not None:
        text = [y for x in text for y in (SPELLED.get(x, [x]) if x in OPERATORS and x not in operators else [x])]
    if len(text) > len(prefix) or operators is not None and any(x in OPERATORS and x not in operators for x in text):
        return _in_order(prefix, values)
    return text, None if values is None else found
