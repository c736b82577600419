"""Formulas -> one short normal form: sums and products as multisets, numbers folded, operands sorted.

Nodes are interned: equal subtrees are one object, so that comparing costs nothing and no subtree is treated twice.
Kinds (a, b): "c" value | "v" token | "f" name, argument | "w" base, exponent of a general power | "s" constant,
((term, coefficient), ...) | "p" ((base, exponent), ...). A factor c of a product is a coefficient of a sum.
Exponents are int, Fraction, or float. A constant without a value is a nan, told apart from others by identity; what is
computed from several is one of them. So sin(c1 x) + sin(c2 x) keeps its two terms, and c1 x + c2 x becomes c1 x.
"""

import math
from fractions import Fraction

from data_utils.expressions import LITERALS, OPERATORS

INVERSES = {("log", "exp"), ("exp", "log"), ("sin", "asin"), ("cos", "acos"), ("tan", "atan"), ("sinh", "asinh"),
            ("asinh", "sinh"), ("cosh", "acosh"), ("tanh", "atanh"), ("atanh", "tanh")}  # fmt: skip
ODD = {"sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh"}
EVEN = {"cos", "cosh", "abs"}
NOT_NEGATIVE = {"abs", "exp", "cosh", "acos", "acosh"}
QUOTIENTS = {"sin": ("cos", "tan"), "sinh": ("cosh", "tanh")}
SCALES = {float(k): f"mult{k}" for k in (2, 3, 4, 5)} | {1 / k: f"div{k}" for k in (2, 3, 4, 5)}
CHAINS = {a * b: [SCALES[a], SCALES[b]] for a in sorted(SCALES) for b in sorted(SCALES) if a * b not in SCALES}
NUMBERS = {value: name for name, value in LITERALS.items()}
ARITY = {name: operator.arity for name, operator in OPERATORS.items()}
SMALLEST_LAST = (5, 4, 3, 2)  # powers and roots that are one token
ODD_FIRST = (5, 3, 4, 2)  # the odd root of an unknown factor would come out of an even one
SPELLED = {"pow1_4": ["pow1_2", "pow1_2"], "pow4": ["pow2", "pow2"], "neg": ["*", "(-1)"], "inv": ["/", "1"]}
BOUND = 2**17  # nodes kept


class NotReal(ValueError):
    """The formula has no finite real value anywhere."""


class Node:
    __slots__ = ("kind", "a", "b", "key", "text", "free")


_nodes, _results, _unknown = {}, {}, []


def _node(kind, a, b=None):
    which = kind, a, b
    found = _nodes.get(which)
    if found is None:
        found = _nodes[which] = Node()
        found.kind, found.a, found.b, found.key, found.text = kind, a, b, None, None
        found.free = kind == "f" and a in ODD and _all_unknown(b)  # a sign before it is in its constants too
    return found


def _all_unknown(n):
    return n.kind == "s" and (n.a == 0 or n.a != n.a) and all(k != k for _, k in n.b)


# numbers: known ones are rounded to the integers and fractions beside them, unknown ones stay who they are
def _snap(v):
    if v == 1 or v == 0 or v == -1 or v != v:
        return v
    if not -math.inf < v < math.inf:
        raise NotReal("a number beyond the range of floats")
    whole = round(v) if abs(v) < 1e15 else 0
    if whole and abs(v - whole) < 1e-11 * abs(v):
        return float(whole)
    if 0.15 < abs(v) < 0.6 and abs(v * round(1 / v) - 1) < 1e-11:
        return 1 / round(1 / v)
    for known in (math.pi, math.e):
        if abs(v - known) < 1e-11:
            return known
    return v


def _plus(a, b):
    if a != a or b != b:
        return a if a != a else b
    return 0.0 if abs(a + b) < 1e-12 * abs(a) else a + b


def _times(a, b):
    if a == 0 or b == 0:
        return 0.0
    return a if a != a else b if b != b else a * b


def _power(c, e):
    """c ** e, real for odd roots of negative numbers."""
    if c != c or e != e:
        return 1.0 if c == 1 else c if c != c else e
    if c == 0 and e < 0:
        raise NotReal("division by 0")
    if c < 0 and _odd_root(e):
        return abs(c) ** float(e) * (-1) ** e.numerator
    if c < 0:
        raise NotReal("an even root of a negative number")
    return float(c) ** float(e)


def _exponent(e):
    """An exponent as int where it is one, or as the fraction that a root is.

    1.5 is a fraction too: as keys of nodes the two are equal, and one that behaves otherwise must not take its place.
    """
    if type(e) is float and e == e and 4 * e == int(4 * e):
        e = Fraction(e)
    if type(e) is float and e == e:
        e = Fraction(1, round(1 / e)) if e and round(1 / e) in SMALLEST_LAST and 1 / round(1 / e) == e else e
        return int(e) if e == int(e) and abs(e) < 2**53 else e
    return e.numerator if type(e) is Fraction and e.denominator == 1 else e


def _odd_root(e):
    """Whether x ** e is real for x < 0: integers, and fractions of odd denominator."""
    return type(e) is int or type(e) is Fraction and e.denominator % 2 == 1


def _constant(v):
    return _node("c", _snap(v))


# order: by the key without numbers, so that a formula with and without values is sorted alike; numbers break ties
def _key(n):
    if n.key is None:
        kind, a, b = n.kind, n.a, n.b
        if kind == "c":
            n.key = "0", repr(a)
        elif kind == "v":
            n.key = f"1{len(a)}{a}", ""
        elif kind == "f":
            inner = _key(b)
            n.key = f"3{a}({inner[0]})", inner[1]
        elif kind == "w":
            inner = _key(a), _key(b)
            n.key = f"5({inner[0][0]}^{inner[1][0]})", f"{inner[0][1]}^{inner[1][1]}"
        else:
            pairs = [(*_key(x), k) for x, k in (a if kind == "p" else b)]
            if kind == "p":
                n.key = "2(" + " ".join(f"{x}^{e}" for x, _, e in pairs) + ")", ",".join(x for _, x, _ in pairs)
            else:
                n.key = (
                    "4(" + " ".join(x for x, _, _ in pairs) + ")",
                    f"{a}," + ",".join(f"{x}{k}" for _, x, k in pairs),
                )
    return n.key


def _sorted(pairs):
    if len(pairs) == 1:
        return tuple(pairs.items())
    if len(pairs) == 2:
        a, b = pairs.items()
        if _key(a[0]) != _key(b[0]):
            return (a, b) if _key(a[0]) < _key(b[0]) else (b, a)
    return tuple(sorted(pairs.items(), key=lambda pair: (*_key(pair[0]), str(pair[1]))))


# sums
def _split(n):
    """n = number * rest."""
    if n.kind == "c":
        return n.a, _node("c", 1.0)
    return (n.b[0][1], n.b[0][0]) if n.kind == "s" and n.a == 0 and len(n.b) == 1 else (1.0, n)


def _scale(n, c):
    if c == 1:
        return n
    if n.kind == "c":
        return _constant(_times(n.a, c))
    if n.kind != "s" or c == 0:
        return _sum(0.0, {n: c})
    if c == c:
        return _sum(_times(n.a, c), {t: _times(k, c) for t, k in n.b})
    # an unknown factor merges with unknown coefficients; what has known ones stays together behind it
    known = {t: k for t, k in n.b if k == k}
    terms, constant = {t: k for t, k in n.b if k != k}, n.a if n.a != n.a else 0.0
    number = n.a if n.a == n.a else 0.0
    if len(known) + (number != 0) > 1:
        lead = _sum(number, known).b[0][1]
        terms[_sum(number / lead, {t: k / lead for t, k in known.items()})] = c
    elif known:
        terms[next(iter(known))] = c
    elif number:
        constant = c
    return _sum(constant, terms)


def _sum(c, terms):
    if len(terms) > 1:
        for t in [t for t in terms if t.kind == "p" and len(t.a) == 1 and t.a[0][1] == 2 and t.a[0][0].a == "sin"]:
            other = _node("p", ((_node("f", "cos", t.a[0][0].b), 2),))
            if t in terms and terms.get(other) == terms[t]:  # sin^2 + cos^2
                c += terms.pop(other)
                terms.pop(t)
    given, terms, c = terms, {}, _snap(c)
    for t, k in given.items():
        if (k := _snap(k)) != 0:
            terms[t] = abs(k) if t.free else k
    for t, k in terms.items():
        if k != k and t.kind == "p" and any(_loose(b) and e == e for b, e in t.a):
            return _add(_sum(c, {x: y for x, y in terms.items() if x is not t}), _product((_node("c", k), 1), (t, 1)))
    for group in [t for t in terms if t.kind == "s"]:  # unknown * (x + 1) + unknown = unknown * x + unknown
        left = {t: k for t, k in group.b if t not in terms or terms[t] == terms[t]}
        number = group.a if c == c else 0.0
        if len(left) < len(group.b) or number != group.a:
            factor = terms.pop(group)
            return _add(_sum(c, terms), _scale(_sum(number, left), factor)) if left or number else _sum(c, terms)
    if not terms:
        return _node("c", c)
    if c == 0 and len(terms) == 1:
        ((t, k),) = terms.items()
        if k == 1:
            return t
    return _node("s", c, _sorted(terms))


def _add(a, b, sign=1.0):
    c, terms = 0.0, {}
    for n, s in ((a, 1.0), (b, sign)):
        if n.kind == "c":
            c = _plus(c, _times(s, n.a))
        elif n.kind == "s":
            c = _plus(c, _times(s, n.a))
            for t, k in n.b:
                terms[t] = _plus(terms.get(t, 0.0), _times(s, k))
        else:
            terms[n] = _plus(terms.get(n, 0.0), s)
    return _sum(c, terms)


# products
def _not_negative(n):
    if n.kind == "p":
        return all(_not_negative(b) or e == e and (not _odd_root(e) or e.numerator % 2 == 0) for b, e in n.a)
    if n.kind == "s":
        return n.a >= 0 and all(k > 0 and _not_negative(t) for t, k in n.b)
    return n.a >= 0 if n.kind == "c" else n.kind == "f" and n.a in NOT_NEGATIVE


def _over_lead(n):
    """A sum of unknown first coefficient over that one, or over the one before several known terms."""
    i = len(n.b) - 1 if n.b[-1][0].kind == "s" else 0
    t, u = n.b[i]
    return _add(t, _scale(_sum(n.a, dict(n.b[:i] + n.b[i + 1 :])), u))


def _lead(n):
    """The first known coefficient of a sum, or an unknown one."""
    return next((k for _, k in n.b if k == k), n.b[0][1])


def _loose(n):
    """Whether an unknown factor before powers of this sum takes the place of its unknown first coefficient."""
    unknown = sum(k != k for _, k in n.b) if n.kind == "s" and n.b[0][1] != n.b[0][1] else 0
    return unknown and len(n.b) - unknown + (n.a == n.a and n.a != 0) < 2


def _factors(n, e):
    """n ** e = number * product of (base, exponent)."""
    c, r = _split(n)
    if r.kind == "s":
        k = _lead(r)
        if k == k and k != 1:
            r, c = _scale(r, 1 / k), _times(c, k)
        elif k != k and _all_unknown(r):
            r, c = _over_lead(r), k
    inner = r.a if r.kind == "p" else [(r, 1)] if r.kind != "c" else []
    if _odd_root(e) or not inner:
        return _power(c, e), [(b, _exponent(_times(x, e))) for b, x in inner]
    if c != c or e != e and (c != 1 or len(inner) > 1):
        return 1.0, [(n, e)]
    outside, inside = [], []  # of an even root: what is never negative, and the rest
    for b, x in inner:
        if not _odd_root(x) or _not_negative(b):
            outside.append((b, _exponent(_times(x, e))))
        elif x.numerator % 2 == 0:
            outside.append((_function("abs", b), _exponent(_times(x, e))))
        else:
            inside.append((b, x))
    if len(inside) == 1:
        outside.append((_scale(inside[0][0], math.copysign(1.0, c)), _exponent(_times(inside[0][1], e))))
    elif inside:
        outside.append((_scale(_product(*inside), 1.0 if c > 0 else -1.0), e))
    elif c < 0:
        raise NotReal("an even root of a negative number")
    return _power(abs(c), e), outside


def _open(b, e):
    """Whether b ** e isn't one factor yet."""
    if b.kind == "f":
        return b.a == "abs" and _odd_root(e) and e.numerator % 2 == 0
    if b.kind == "s":
        k = _lead(b)
        return _odd_root(e) and (len(b.b) == 1 and b.a == 0 or k == k and k != 1 or k != k and _all_unknown(b))
    return b.kind == "p" and _odd_root(e)


def _product(*parts):
    """Product of n ** e over the parts (n, e)."""
    c, powers = 1.0, {}
    for n, e in parts:
        k, factors = _factors(n, e)
        c = _times(c, k)
        for b, x in factors:
            powers[b] = _exponent(_plus(powers[b], x)) if b in powers else x
    if c == 0:
        return _node("c", 0.0)
    again = []
    functions = [b for b in powers if b.kind == "f"]
    exponentials = [b for b in functions if b.a == "exp"]
    if len(exponentials) > 1 or exponentials and powers[exponentials[0]] != 1:
        argument = _node("c", 0.0)
        for b in exponentials:
            e = powers.pop(b)
            argument = _add(argument, _scale(b.b, float(e) if e == e else e))
        again.append((_function("exp", argument), 1))
    for b in [b for b in functions if b.a == "abs" and type(powers.get(b.b)) is int and powers[b.b] != 1]:
        odd = powers[b.b] % 2  # x^3 |x| is x |x|^3
        powers[b] = _exponent(_plus(powers[b], powers[b.b] - odd))
        powers[b.b] = odd
    powers = {b: e for b, e in powers.items() if e != 0}
    for b, e in list(powers.items()):
        if b.a in QUOTIENTS and e == e and powers.get(other := _node("f", QUOTIENTS[b.a][0], b.b), 0) == -e:
            again.append((_node("f", QUOTIENTS[b.a][1], b.b), e))  # sin / cos
            del powers[b], powers[other]
        elif b in powers and _open(b, e):
            again.append((b.b if b.a == "abs" else b, powers.pop(b)))
        elif c != c and _loose(b) and e == e:
            again.append((_over_lead(b), powers.pop(b)))
    if again:
        return _product((_constant(c), 1), *powers.items(), *again)
    if not powers:
        return _constant(c)
    if len(powers) == 1:
        ((b, e),) = powers.items()
        if e == 1:
            return _scale(b, _snap(c))
    return _scale(_node("p", _sorted(powers)), _snap(c))


# functions
def _function(name, a):
    if a.kind == "c":
        try:
            return a if a.a != a.a else _constant(getattr(math, name, abs)(a.a))
        except ValueError as e:
            raise NotReal(f"{name}({a.a})") from e
    sign = 1.0
    if (name in ODD or name in EVEN) and a.kind == "s" and a.b[0][1] < 0:
        a, sign = _scale(a, -1.0), -1.0 if name in ODD else 1.0
    if a.kind == "f" and (name, a.a) in INVERSES:
        return _scale(a.b, sign)
    if name == "abs":
        return _absolute(a)
    if name == "acosh" and a.a == "cosh":
        return _absolute(a.b)
    if name == "log":
        return _logarithm(a)
    if name == "exp" and a.kind == "s":
        logs = [(t.b, _exponent(k)) for t, k in a.b if t.a == "log"]
        if logs:
            return _product((_function("exp", _sum(a.a, {t: k for t, k in a.b if t.a != "log"})), 1), *logs)
        if a.a != 0 and not abs(a.a) > 50:
            return _scale(_node("f", "exp", _sum(0.0, dict(a.b))), a.a if a.a != a.a else math.exp(a.a))
    return _scale(_node("f", name, a), sign)


def _absolute(a):
    if _not_negative(a):
        return a
    c, factors = _factors(a, 1)
    if len(factors) == 1 and factors[0][1] == 1:
        b = factors[0][0]
        return _scale(b if _not_negative(b) else _node("f", "abs", b), c if c != c else abs(c))
    parts = [(_absolute(b) if _odd_root(e) else b, e) for b, e in factors]
    return _scale(_product(*parts), c if c != c else abs(c))


def _logarithm(a):
    c, factors = _factors(a, 1)
    r = _product(*factors)
    if c < 0 and _not_negative(r):
        raise NotReal("a logarithm of a negative number")
    if abs(c) != 1 and c == c:
        return _add(_function("log", _scale(r, math.copysign(1.0, c))), _constant(math.log(abs(c))))
    if c == 1 and r.kind == "p" and len(r.a) == 1:
        ((b, e),) = r.a
        b = _absolute(b) if _odd_root(e) and e.numerator % 2 == 0 else b
        return _scale(_function("log", b), float(e) if e == e else e)
    return _node("f", "log", a)


def _general_power(a, b):
    if b.kind == "c":
        return _node("c", 1.0) if b.a == 0 else _product((a, _exponent(b.a)))
    if a.kind == "c" and a.a in (1, math.e):
        return a if a.a == 1 else _function("exp", b)
    if a.a == "exp":
        return _function("exp", _product((a.b, 1), (b, 1)))
    if b.kind == "s" and b.b[0][1] < 0:
        return _product((_node("w", a, _scale(b, -1.0)), -1))
    return _node("w", a, b)


RULES = (
    {
        "+": _add,
        "-": lambda a, b: _add(a, b, -1.0),
        "*": lambda a, b: _product((a, 1), (b, 1)),
        "/": lambda a, b: _product((a, 1), (b, -1)),
        "pow": _general_power,
        "neg": lambda a: _scale(a, -1.0),
        "inv": lambda a: _product((a, -1)),
    }
    | {f"pow{k}": lambda a, k=k: _product((a, k)) for k in SMALLEST_LAST}
    | {f"pow1_{k}": lambda a, k=k: _product((a, Fraction(1, k))) for k in SMALLEST_LAST}
    | {name: lambda a, k=k: _scale(a, k) for k, name in SCALES.items()}
)
RULES |= {name: lambda a, name=name: _function(name, a) for name in OPERATORS if name not in RULES}


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
            return ["*", *_raised(text, _exponent(whole)), *_raised(text, _exponent(e - whole))]
    return ["pow", *text, float(e) if e == e else e]


def _emit_product(c, factors):
    if len(factors) == 1 and not c < 0 and factors[0][0].a != "exp" and factors[0][1] == 1:  # most of them
        text = _emit(factors[0][0])
        return text if c == 1 else [SCALES[c], *text] if c in SCALES else ["*", c, *text]
    if len(factors) > 1 or abs(c) != 1 and abs(c) not in SCALES:  # exp(-x) y is y / exp(x)
        factors = [
            (_node("f", "exp", _scale(b.b, -1.0)), -e)
            if b.a == "exp" and b.b.kind == "s" and _negative(b.b)
            else (b, e)
            for b, e in factors
        ]
    if c == -1 or -c in SCALES:
        for i, (b, e) in enumerate(factors):
            if b.kind == "s" and type(e) is int and e % 2 and len(_emit(_scale(b, -1.0))) <= len(_emit(b)):
                c, factors = -c, [*factors[:i], (_scale(b, -1.0), e), *factors[i + 1 :]]
                break
    texts = [(_emit(b), e) for b, e in factors]
    if c > 0 and c != 1 and c not in SCALES:
        for i, (_, e) in enumerate(factors):
            if type(e) is Fraction and abs(e.numerator) == 1 and _snap(c ** float(1 / e)) in SCALES:
                texts[i], c = ([SCALES[_snap(c ** float(1 / e))], *texts[i][0]], e), 1.0  # 1.41 sqrt(x) is sqrt(2 x)
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
            groups.setdefault((abs(e), 0 if _odd_root(e) else len(groups)), ([], []))[e < 0].append(text)
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
        ratio = _snap(c / factor)
        inner = _node("s", ratio if ratio in (1, -1) else 0.0, tuple((t, k / factor) for t, k in terms))
        text = _term(inner, factor)
        return text if c == 0 or ratio in (1, -1) else ["+", *text, c]
    above, below = [], []
    for t, k in terms:
        if t.a == "log" and c == c and c != 0 and abs(k) == 1 and abs(c) < 2 and _snap(math.exp(c * k)) in SCALES:
            t = _node("t", ("log", SCALES[_snap(math.exp(c * k))], *_emit(t.b)))  # log(x) + 0.69 is log(2 x)
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
                stack.append(_node("c", _unknown[constants]))
            elif math.isfinite(values[constants]):
                stack.append(_constant(float(values[constants])))
            else:
                raise NotReal("a constant that is not finite")
        else:
            stack.append(_node("c", LITERALS[token]) if token in LITERALS else _node("v", token))
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
    if len(_nodes) > BOUND:
        _nodes.clear(), _results.clear()
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
