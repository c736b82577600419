"""Algebra of formulas in normal form: sums and products as multisets, numbers folded, operands sorted.

A formula is a tree of nodes. Equal subtrees are one object ("interned"), so that comparing costs nothing and no
subtree is treated twice. Each node has a kind and two parts, a and b:

| kind | a | b | means |
| --- | --- | --- | --- |
| c | value | | a number |
| v | token | | a variable |
| f | name | argument | a function |
| w | base | exponent | a general power |
| s | constant | ((term, coefficient), ...) | constant + sum of coefficient * term |
| p | ((base, exponent), ...) | | product of base ** exponent |
| t | tokens | | text that is written as it stands (simplify.py) |

A product has no number of its own: the number is the coefficient of a sum of one term. Exponents are int, Fraction or
float. A constant without a value ("unknown") is a nan, and nans differ by identity. A number computed from several
unknown ones is one of them: c1 x + c2 x becomes c1 x, but sin(c1 x) + sin(c2 x) keeps its two terms. `v != v` asks
whether v is unknown.

Example: x1 * sin(-x2) / x1 + 3 sin(x2)

    sin(-x2)            sin is odd: s(0, ((sin x2, -1),))
    x1 * sin(-x2) / x1  number -1, powers x1: 1 - 1 = 0 and sin x2: 1, so s(0, ((sin x2, -1),))
    ... + 3 sin(x2)     coefficients of the same term add up: s(0, ((sin x2, 2),))

simplify.py writes this as `mult2 sin x2`. RULES maps each operator to the function that does such a step.
"""

import math
from fractions import Fraction

from data_utils.formulas.expressions import OPERATORS

INVERSES = "log exp|exp log|sin asin|cos acos|tan atan|sinh asinh|asinh sinh|cosh acosh|tanh atanh|atanh tanh"
INVERSES = {tuple(pair.split()) for pair in INVERSES.split("|")}  # (f, g) with f(g(x)) = x
ODD = {"sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh"}
EVEN = {"cos", "cosh", "abs"}
NOT_NEGATIVE = {"abs", "exp", "cosh", "acos", "acosh"}
QUOTIENTS = {"sin": ("cos", "tan"), "sinh": ("cosh", "tanh")}
SCALES = {float(k): f"mult{k}" for k in (2, 3, 4, 5)} | {1 / k: f"div{k}" for k in (2, 3, 4, 5)}
SMALLEST_LAST = (5, 4, 3, 2)  # powers and roots that are one token


class NotReal(ValueError):
    """The formula has no finite real value anywhere."""


class Node:
    """A node of kind `kind` with the parts a and b; see the table above.

    key: what operands are sorted by. text: its tokens, once written. free: whether a sign before it can move into its
    unknown constants, as in -sin(c x).
    """

    __slots__ = ("kind", "a", "b", "key", "text", "free")


nodes = {}  # {(kind, a, b): Node}


def node(kind: str, a, b=None) -> Node:
    """Return the only node of this kind and these parts."""
    identity = kind, a, b
    n = nodes.get(identity)
    if n is None:
        n = nodes[identity] = Node()
        n.kind, n.a, n.b = identity
        n.key = n.text = None
        n.free = kind == "f" and a in ODD and _all_unknown(b)
    return n


def _all_unknown(n):
    """Return whether n is a sum whose numbers are all unknown, its constant unknown or 0."""
    return n.kind == "s" and (n.a == 0 or n.a != n.a) and all(k != k for _, k in n.b)


# Numbers: those with a value are rounded to the integer or fraction beside them; unknown ones keep their identity.
def snap(v: float) -> float:
    """Return the integer, fraction, pi or e that v is up to rounding, else v. Raises NotReal for infinity."""
    if v == 1 or v == 0 or v == -1 or v != v:
        return v
    if not -math.inf < v < math.inf:
        raise NotReal("a number beyond the range of floats")
    integer = round(v) if abs(v) < 1e15 else 0
    if integer and abs(v - integer) < 1e-11 * abs(v):
        return float(integer)
    if 0.15 < abs(v) < 0.6 and abs(v * round(1 / v) - 1) < 1e-11:
        return 1 / round(1 / v)
    for number in (math.pi, math.e):
        if abs(v - number) < 1e-11:
            return number
    return v


def _plus(a, b):
    if a != a or b != b:
        return a if a != a else b
    return 0.0 if abs(a + b) < 1e-12 * abs(a) else a + b


def _times(a, b):
    if a == 0 or b == 0:
        return 0.0
    if a != a:
        return a
    return b if b != b else a * b


def _power(c, e):
    """Return c ** e, real for odd roots of negative numbers."""
    if c != c or e != e:
        if c == 1:
            return 1.0
        return c if c != c else e
    if c == 0 and e < 0:
        raise NotReal("division by 0")
    if c < 0 and odd_root(e):
        return abs(c) ** float(e) * (-1) ** e.numerator
    if c < 0:
        raise NotReal("an even root of a negative number")
    return float(c) ** float(e)


def exponent(e):
    """Return an exponent as int where it is one, or as the fraction that a root is.

    1.5 becomes a fraction too. As keys of nodes 1.5 and 3/2 are equal, so only one of them may occur.
    """
    if type(e) is float and e == e and 4 * e == int(4 * e):
        e = Fraction(e)
    if type(e) is float and e == e:
        if e and round(1 / e) in SMALLEST_LAST and 1 / round(1 / e) == e:
            e = Fraction(1, round(1 / e))
        return int(e) if e == int(e) and abs(e) < 2**53 else e
    return e.numerator if type(e) is Fraction and e.denominator == 1 else e


def odd_root(e) -> bool:
    """Return whether x ** e is real for x < 0: e is an integer, or a fraction with an odd denominator."""
    return type(e) is int or type(e) is Fraction and e.denominator % 2 == 1


def _constant(v):
    return node("c", snap(v))


# Order: by a key without numbers, so that a formula is sorted alike with and without values. Numbers break ties.
def _key(n):
    """Return (key without numbers, key of the numbers), two strings."""
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
            base, power = _key(a), _key(b)
            n.key = f"5({base[0]}^{power[0]})", f"{base[1]}^{power[1]}"
        elif kind == "p":
            pairs = [(*_key(x), e) for x, e in a]
            n.key = "2(" + " ".join(f"{x}^{e}" for x, _, e in pairs) + ")", ",".join(x for _, x, _ in pairs)
        else:
            pairs = [(*_key(x), k) for x, k in b]
            numbers = ",".join(f"{x}{k}" for _, x, k in pairs)
            n.key = "4(" + " ".join(x for x, _, _ in pairs) + ")", f"{a},{numbers}"
    return n.key


def _sorted(pairs):
    """Return the pairs of {node: number} in their order, as a tuple."""
    if len(pairs) == 1:
        return tuple(pairs.items())
    if len(pairs) == 2:  # most of the others
        first, second = pairs.items()
        if _key(first[0]) != _key(second[0]):
            return (first, second) if _key(first[0]) < _key(second[0]) else (second, first)
    return tuple(sorted(pairs.items(), key=lambda pair: (*_key(pair[0]), str(pair[1]))))


# Sums
def _number_and_rest(n):
    """Return (number, node) with n = number * node."""
    if n.kind == "c":
        return n.a, node("c", 1.0)
    return (n.b[0][1], n.b[0][0]) if n.kind == "s" and n.a == 0 and len(n.b) == 1 else (1.0, n)


def scale(n: Node, c: float) -> Node:
    """Return the node of c * n."""
    if c == 1:
        return n
    if n.kind == "c":
        return _constant(_times(n.a, c))
    if n.kind != "s" or c == 0:
        return _sum(0.0, {n: c})
    if c == c:
        return _sum(_times(n.a, c), {t: _times(k, c) for t, k in n.b})
    # An unknown factor merges with unknown coefficients. Terms of known ones stay together behind it.
    known = {t: k for t, k in n.b if k == k}
    terms = {t: k for t, k in n.b if k != k}
    constant = n.a if n.a != n.a else 0.0
    number = n.a if n.a == n.a else 0.0
    if len(known) + (number != 0) > 1:
        lead = _sum(number, known).b[0][1]
        terms[_sum(number / lead, {t: k / lead for t, k in known.items()})] = c
    elif known:
        terms[next(iter(known))] = c
    elif number:
        constant = c
    return _sum(constant, terms)


def _sum(c, coefficients):
    """Return the node of c + sum of coefficient * term, for {term: coefficient}."""
    if len(coefficients) > 1:
        for t in list(coefficients):
            if t.kind == "p" and len(t.a) == 1 and t.a[0][1] == 2 and t.a[0][0].a == "sin":
                other = node("p", ((node("f", "cos", t.a[0][0].b), 2),))
                if t in coefficients and coefficients.get(other) == coefficients[t]:  # sin^2 + cos^2 = 1
                    c += coefficients.pop(other)
                    coefficients.pop(t)
    c = snap(c)
    terms = {}
    for t, k in coefficients.items():
        if (k := snap(k)) != 0:
            terms[t] = abs(k) if t.free else k
    for t, k in terms.items():
        if k != k and t.kind == "p" and any(_is_loose(b) and e == e for b, e in t.a):
            rest = {x: y for x, y in terms.items() if x is not t}
            return _add(_sum(c, rest), _product((node("c", k), 1), (t, 1)))
    # unknown * (x + 1) + unknown = unknown * x + unknown
    for group in [t for t in terms if t.kind == "s"]:
        inner = {t: k for t, k in group.b if t not in terms or terms[t] == terms[t]}
        number = group.a if c == c else 0.0
        if len(inner) < len(group.b) or number != group.a:
            factor = terms.pop(group)
            return _add(_sum(c, terms), scale(_sum(number, inner), factor)) if inner or number else _sum(c, terms)
    if not terms:
        return node("c", c)
    if c == 0 and len(terms) == 1:
        ((t, k),) = terms.items()
        if k == 1:
            return t
    return node("s", c, _sorted(terms))


def _add(a, b, sign=1.0):
    """Return the node of a + sign * b."""
    c = 0.0
    terms = {}
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


# Products
def _not_negative(n):
    """Return whether n is certainly 0 or more."""
    if n.kind == "p":
        return all(_not_negative(b) or e == e and (not odd_root(e) or e.numerator % 2 == 0) for b, e in n.a)
    if n.kind == "s":
        return n.a >= 0 and all(k > 0 and _not_negative(t) for t, k in n.b)
    return n.a >= 0 if n.kind == "c" else n.kind == "f" and n.a in NOT_NEGATIVE


def _over_lead(n):
    """Divide a sum by its unknown first coefficient, or by the unknown one before a group of known terms."""
    i = len(n.b) - 1 if n.b[-1][0].kind == "s" else 0
    t, u = n.b[i]
    return _add(t, scale(_sum(n.a, dict(n.b[:i] + n.b[i + 1 :])), u))


def _lead(n):
    """Return the first known coefficient of a sum, else its first."""
    return next((k for _, k in n.b if k == k), n.b[0][1])


def _is_loose(n):
    """Return whether an unknown factor before powers of this sum can replace its unknown first coefficient."""
    if n.kind != "s" or n.b[0][1] == n.b[0][1]:
        return False
    unknown = sum(k != k for _, k in n.b)
    return len(n.b) - unknown + (n.a == n.a and n.a != 0) < 2


def _factors(n, e):
    """Return (number, [(base, exponent), ...]) whose product is n ** e."""
    c, r = _number_and_rest(n)
    if r.kind == "s":
        k = _lead(r)
        if k == k and k != 1:
            r, c = scale(r, 1 / k), _times(c, k)
        elif k != k and _all_unknown(r):
            r, c = _over_lead(r), k
    if r.kind == "p":
        inner = r.a
    else:
        inner = [(r, 1)] if r.kind != "c" else []
    if odd_root(e) or not inner:
        return _power(c, e), [(b, exponent(_times(x, e))) for b, x in inner]
    if c != c or e != e and (c != 1 or len(inner) > 1):
        return 1.0, [(n, e)]
    # An even root: factors that are never negative leave it, the others stay inside together.
    outside, inside = [], []
    for b, x in inner:
        if not odd_root(x) or _not_negative(b):
            outside.append((b, exponent(_times(x, e))))
        elif x.numerator % 2 == 0:
            outside.append((_function("abs", b), exponent(_times(x, e))))
        else:
            inside.append((b, x))
    if len(inside) == 1:
        b, x = inside[0]
        outside.append((scale(b, math.copysign(1.0, c)), exponent(_times(x, e))))
    elif inside:
        outside.append((scale(_product(*inside), 1.0 if c > 0 else -1.0), e))
    elif c < 0:
        raise NotReal("an even root of a negative number")
    return _power(abs(c), e), outside


def _is_composite(b, e):
    """Return whether b ** e can still be split into factors."""
    if b.kind == "f":
        return b.a == "abs" and odd_root(e) and e.numerator % 2 == 0
    if b.kind == "s":
        k = _lead(b)
        return odd_root(e) and (len(b.b) == 1 and b.a == 0 or k == k and k != 1 or k != k and _all_unknown(b))
    return b.kind == "p" and odd_root(e)


def _based(c, e, u):
    """Return c^(e u), which is (c^u)^e, as (c^e)^u or where c^e is no float as exp(e log(c) u).

    None is returned where c is no known positive number, or e is 1 or -1.
    """
    if not (c.kind == "c" and 0 < c.a < math.inf and e == e and abs(e) != 1):
        return None
    size = float(e) * math.log(c.a)
    return _general_power(_constant(math.exp(size)), u) if abs(size) < 700 else _function("exp", scale(u, size))


def _product(*parts):
    """Return the node of the product of n ** e over the parts (n, e)."""
    c = 1.0
    powers = {}
    for n, e in parts:
        k, factors = _factors(n, e)
        c = _times(c, k)
        for b, x in factors:
            powers[b] = exponent(_plus(powers[b], x)) if b in powers else x
    if c == 0:
        return node("c", 0.0)
    again = []  # factors that have changed: the product is then taken once more
    functions = [b for b in powers if b.kind == "f"]
    exponentials = [b for b in functions if b.a == "exp"]
    if len(exponentials) > 1 or exponentials and powers[exponentials[0]] != 1:
        argument = node("c", 0.0)
        for b in exponentials:
            e = powers.pop(b)
            argument = _add(argument, scale(b.b, float(e) if e == e else e))
        again.append((_function("exp", argument), 1))
    for b in [b for b in functions if b.a == "abs" and type(powers.get(b.b)) is int and powers[b.b] != 1]:
        odd = powers[b.b] % 2  # x^3 |x| is x |x|^3
        powers[b] = exponent(_plus(powers[b], powers[b.b] - odd))
        powers[b.b] = odd
    powers = {b: e for b, e in powers.items() if e != 0}
    for b, e in list(powers.items()):
        if b.a in QUOTIENTS and e == e and powers.get(other := node("f", QUOTIENTS[b.a][0], b.b), 0) == -e:
            again.append((node("f", QUOTIENTS[b.a][1], b.b), e))  # sin / cos is tan
            del powers[b], powers[other]
        elif b in powers and _is_composite(b, e):
            again.append((b.b if b.a == "abs" else b, powers.pop(b)))
        elif c != c and _is_loose(b) and e == e:
            again.append((_over_lead(b), powers.pop(b)))
        elif b.kind == "w" and (raised := _based(b.a, e, b.b)):
            again.append((raised, 1))
            del powers[b]
    if again:
        return _product((_constant(c), 1), *powers.items(), *again)
    if not powers:
        return _constant(c)
    if len(powers) == 1:
        ((b, e),) = powers.items()
        if e == 1:
            return scale(b, snap(c))
    return scale(node("p", _sorted(powers)), snap(c))


# Functions
def _function(name, a):
    """Return the node of the function `name` of a."""
    if a.kind == "c":
        try:
            return a if a.a != a.a else _constant(getattr(math, name, abs)(a.a))
        except ValueError as e:
            raise NotReal(f"{name}({a.a})") from e
    sign = 1.0
    if (name in ODD or name in EVEN) and a.kind == "s" and a.b[0][1] < 0:
        a = scale(a, -1.0)
        sign = -1.0 if name in ODD else 1.0
    if a.kind == "f" and (name, a.a) in INVERSES:
        return scale(a.b, sign)
    if name == "abs":
        return _absolute(a)
    if name == "acosh" and a.a == "cosh":
        return _absolute(a.b)
    if name == "log":
        return _logarithm(a)
    if name == "exp" and a.kind == "s":
        logs = [(t.b, exponent(k)) for t, k in a.b if t.a == "log"]
        if logs:
            return _product((_function("exp", _sum(a.a, {t: k for t, k in a.b if t.a != "log"})), 1), *logs)
        if a.a != 0 and not abs(a.a) > 50:
            return scale(node("f", "exp", _sum(0.0, dict(a.b))), a.a if a.a != a.a else math.exp(a.a))
    return scale(node("f", name, a), sign)


def _absolute(a):
    if _not_negative(a):
        return a
    c, factors = _factors(a, 1)
    size = c if c != c else abs(c)
    if len(factors) == 1 and factors[0][1] == 1:
        b = factors[0][0]
        return scale(b if _not_negative(b) else node("f", "abs", b), size)
    parts = [(_absolute(b) if odd_root(e) else b, e) for b, e in factors]
    return scale(_product(*parts), size)


def _logarithm(a):
    c, factors = _factors(a, 1)
    r = _product(*factors)
    if c < 0 and _not_negative(r):
        raise NotReal("a logarithm of a negative number")
    if abs(c) != 1 and c == c:
        return _add(_function("log", scale(r, math.copysign(1.0, c))), _constant(math.log(abs(c))))
    if c == 1 and r.kind == "p" and len(r.a) == 1:
        ((b, e),) = r.a
        b = _absolute(b) if odd_root(e) and e.numerator % 2 == 0 else b
        return scale(_function("log", b), float(e) if e == e else e)
    return node("f", "log", a)


def _general_power(a, b):
    if b.kind == "c":
        return node("c", 1.0) if b.a == 0 else _product((a, exponent(b.a)))
    if a.kind == "c" and a.a in (1, math.e):
        return a if a.a == 1 else _function("exp", b)
    if a.a == "exp":
        return _function("exp", _product((a.b, 1), (b, 1)))
    if b.kind == "s" and len(b.b) == 1 and b.a == 0 and (raised := _based(a, b.b[0][1], b.b[0][0])):
        return raised
    if b.kind == "s" and b.b[0][1] < 0:
        return _product((node("w", a, scale(b, -1.0)), -1))
    return node("w", a, b)


RULES = {  # {operator: function of the nodes of its operands}
    "+": _add,
    "-": lambda a, b: _add(a, b, -1.0),
    "*": lambda a, b: _product((a, 1), (b, 1)),
    "/": lambda a, b: _product((a, 1), (b, -1)),
    "pow": _general_power,
    "neg": lambda a: scale(a, -1.0),
    "inv": lambda a: _product((a, -1)),
}
RULES |= {f"pow{k}": lambda a, k=k: _product((a, k)) for k in SMALLEST_LAST}
RULES |= {f"pow1_{k}": lambda a, k=k: _product((a, Fraction(1, k))) for k in SMALLEST_LAST}
RULES |= {name: lambda a, k=k: scale(a, k) for k, name in SCALES.items()}
RULES |= {name: lambda a, name=name: _function(name, a) for name in OPERATORS if name not in RULES}
