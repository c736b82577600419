"""Formulas as rows of prefix tokens: the operators, their ids, batched values and derivatives, text in and out.

N rows, L tokens, M points, D variables, C constants. A row is uint8, right-padded with 0; its i-th "<constant>" has the
value constants[n, i]. Nothing is protected: even roots, log and fractional powers of negative numbers are nan.
"""

import ast
import difflib
import math
import operator
import threading
from collections import namedtuple

import numpy as np

from data_utils.errors import DataError, UsageError

SPECIAL = (
    "<pad> <bos> <eos> <unk> <cls> <mask> <constant> <prompt> </prompt> <expression> </expression> <complexity> "
    "</complexity> <float> <allowed_term> </allowed_term> <include_term> </include_term> <exclude_term> "
    '</exclude_term> 0 1 (-1) np.pi np.e float("inf") float("-inf") float("nan")'
).split()
LITERALS = {"0": 0.0, "1": 1.0, "(-1)": -1.0, "np.pi": math.pi, "np.e": math.e}
CACHE = 2**18  # results of a chunk: smaller ones spend their time on calls, larger ones on memory
LENGTH, NODES, DEPTH, LARGEST, EXPONENT = 2000, 300, 50, 1e12, 64  # limits of a formula that is typed

# function(operands..., out): out is no operand. derivative: for each operand a function(operands..., value).
# infix: template, its precedence (1 sum, 2 product, 4 power, 5 call) and the least precedence of each operand.
Operator = namedtuple("Operator", "arity function derivative infix")


def _call(name):
    return name + "({})", 5, (0,)


def _unary(function, derivative, infix):
    return Operator(1, function, (derivative,), infix)


def _multiple(k):
    return _unary(lambda a, out: np.multiply(a, k, out), lambda a, y: k, (f"{k}*{{}}", 2, (2,)))


def _fraction(k):
    return _unary(lambda a, out: np.divide(a, k, out), lambda a, y: 1 / k, (f"{{}}/{k}", 2, (2,)))


OPERATORS = {
    "+": Operator(2, np.add, (lambda a, b, y: 1.0, lambda a, b, y: 1.0), ("{} + {}", 1, (1, 1))),
    "-": Operator(2, np.subtract, (lambda a, b, y: 1.0, lambda a, b, y: -1.0), ("{} - {}", 1, (1, 2))),
    "*": Operator(2, np.multiply, (lambda a, b, y: b, lambda a, b, y: a), ("{}*{}", 2, (2, 2))),
    "/": Operator(2, np.divide, (lambda a, b, y: 1 / b, lambda a, b, y: -y / b), ("{}/{}", 2, (2, 3))),
    "pow": Operator(
        2,
        np.power,
        (lambda a, b, y: b * a ** (b - 1), lambda a, b, y: np.where(y == 0, 0, y * np.log(a))),
        ("{}**{}", 4, (5, 4)),
    ),
    "abs": _unary(np.abs, lambda a, y: np.sign(a), _call("abs")),
    "inv": _unary(lambda a, out: np.divide(1.0, a, out), lambda a, y: -y * y, ("1/{}", 2, (3,))),
    "neg": _unary(np.negative, lambda a, y: -1.0, ("-{}", 2, (2,))),
    "pow2": _unary(np.square, lambda a, y: 2 * a, ("{}**2", 4, (5,))),
    "pow3": _unary(lambda a, out: np.multiply(np.square(a, out), a, out), lambda a, y: 3 * a * a, ("{}**3", 4, (5,))),
    "pow4": _unary(lambda a, out: np.square(np.square(a, out), out), lambda a, y: 4 * a * a * a, ("{}**4", 4, (5,))),
    "pow5": _unary(
        lambda a, out: np.multiply(np.square(np.square(a, out), out), a, out),
        lambda a, y: 5 * np.square(a * a),
        ("{}**5", 4, (5,)),
    ),
    "pow1_2": _unary(np.sqrt, lambda a, y: 0.5 / y, _call("sqrt")),
    "pow1_3": _unary(np.cbrt, lambda a, y: 1 / (3 * y * y), _call("pow1_3")),
    "pow1_4": _unary(lambda a, out: np.sqrt(np.sqrt(a, out), out), lambda a, y: 0.25 / (y * y * y), _call("pow1_4")),
    "pow1_5": _unary(
        lambda a, out: np.copysign(np.power(np.abs(a, out), 0.2, out), a, out),
        lambda a, y: 0.2 / np.square(y * y),
        _call("pow1_5"),
    ),
    "sin": _unary(np.sin, lambda a, y: np.cos(a), _call("sin")),
    "cos": _unary(np.cos, lambda a, y: -np.sin(a), _call("cos")),
    "tan": _unary(np.tan, lambda a, y: 1 + y * y, _call("tan")),
    "asin": _unary(np.arcsin, lambda a, y: 1 / np.sqrt(1 - a * a), _call("asin")),
    "acos": _unary(np.arccos, lambda a, y: -1 / np.sqrt(1 - a * a), _call("acos")),
    "atan": _unary(np.arctan, lambda a, y: 1 / (1 + a * a), _call("atan")),
    "sinh": _unary(np.sinh, lambda a, y: np.cosh(a), _call("sinh")),
    "cosh": _unary(np.cosh, lambda a, y: np.sinh(a), _call("cosh")),
    "tanh": _unary(np.tanh, lambda a, y: 1 - y * y, _call("tanh")),
    "asinh": _unary(np.arcsinh, lambda a, y: 1 / np.sqrt(a * a + 1), _call("asinh")),
    "acosh": _unary(np.arccosh, lambda a, y: 1 / np.sqrt(a * a - 1), _call("acosh")),
    "atanh": _unary(np.arctanh, lambda a, y: 1 / (1 - a * a), _call("atanh")),
    "exp": _unary(np.exp, lambda a, y: y, _call("exp")),
    "log": _unary(np.log, lambda a, y: 1 / a, _call("log")),
    **{f"mult{k}": _multiple(k) for k in (2, 3, 4, 5)},
    **{f"div{k}": _fraction(k) for k in (2, 3, 4, 5)},
}
FOLDS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: pow}
SYNONYMS = {"sqrt": "pow1_2", "cbrt": "pow1_3", "ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}


class Alphabet:
    """Tokens and their ids: `special` (the padding first), then `operators`, then `variables`; names in each.

    arity: int8 (V,), 2 and 1 for operators, 0 for variables, "<constant>" and the literals 0 1 (-1) np.pi np.e, -1 for
    what can't stand in a formula. Raises UsageError for unknown operators, repeated tokens and more than 256 of them.
    """

    def __init__(self, operators, variables, special=SPECIAL):
        self.operators, self.variables = list(operators), list(variables)
        self.tokens = [*special, *self.operators, *self.variables]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        for name in self.operators:
            if name not in OPERATORS:
                near = ", ".join(difflib.get_close_matches(name, OPERATORS, 3, 0.3))
                raise UsageError(f"operator {name!r} is unknown\nnearest: {near or ' '.join(OPERATORS)}")
        if len(self.ids) < len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise UsageError(f"the alphabet has {' '.join(twice)} more than once: every token needs a name of its own")
        if len(self.tokens) > 256 or self.tokens[:1] != ["<pad>"] or not self.variables:
            raise UsageError(
                f"an alphabet of {len(self.tokens)} tokens, {len(self.variables)} variables, first {self.tokens[:1]}: "
                "expected at most 256 tokens, at least 1 variable, and <pad> first"
            )
        self.arity = np.full(len(self.tokens), -1, np.int8)
        self.constant, self.first_variable = self.ids.get("<constant>", -1), self.ids[self.variables[0]]
        for token in ("<constant>", *LITERALS, *self.variables, *self.operators):
            if token in self.ids:
                self.arity[self.ids[token]] = OPERATORS[token].arity if token in OPERATORS else 0

    def encode(self, tokens):
        """Return the ids of a list of tokens; DataError for one that isn't in the alphabet."""
        unknown = [token for token in tokens if token not in self.ids]
        if unknown:
            raise DataError(f"token {unknown[0]!r} is not in this alphabet: {' '.join(self.tokens[1:])}")
        return [self.ids[token] for token in tokens]

    def decode(self, ids):
        """Return the tokens of a row of ids, without its padding."""
        return [self.tokens[i] for i in map(int, ids) if i]


_kept = threading.local()


def _buffer(name, rows, columns, dtype):
    """An uninitialised (rows, columns) array that is used again: a fresh one costs more than the arithmetic in it."""
    kept = _kept.__dict__.setdefault((name, dtype), np.empty(0, dtype))
    if kept.size < rows * columns:
        kept = _kept.__dict__[name, dtype] = np.empty(rows * columns * 5 // 4, dtype)
    return kept[: rows * columns].reshape(rows, columns)


def structure(arity):
    """Tokens and height of the subtree at each prefix position: (N, L) arities, -1 = padding -> two (N, L + 2) arrays.

    Raises ValueError where a row is not exactly one formula.
    """
    N, L = arity.shape
    arity = np.ascontiguousarray(arity.T)  # by place: what is added stands side by side
    size, height, rows = np.zeros((L + 2, N), np.intp), np.zeros((L + 2, N), np.int16), np.arange(N)
    for p in range(L - 1, -1, -1):
        inner, two = arity[p] > 0, arity[p] == 2
        right = np.minimum(p + 1 + size[p + 1], L) * N + rows
        size[p] = (arity[p] >= 0) + inner * size[p + 1] + two * size.take(right)
        height[p] = inner * (1 + np.maximum(height[p + 1], two * height.take(right)))
    bad = ((arity >= 0).sum(0) != size[0]) | (np.where(arity >= 0, arity - 1, 0).sum(0) != -1)
    if bad.any():
        raise ValueError(f"row {bad.argmax()} is not one formula: arities {arity[:, bad.argmax()].tolist()}")
    return size.T, height.T


class Program:
    """Rows compiled for evaluation: one numpy call for each (height, operator) that occurs.

    The values of a variable in a row, of each constant, literal and operator are rows of one work array ("slots"), the
    operators' sorted by (height, operator), so that results are contiguous and only operands are gathered.
    `uses` = (rows, variables), the pairs that occur, in the order in which `values` expects them. With X, (M, D) for
    all rows or (N, M, D), what depends on no constant is computed once, in float64, and calls take constants alone.
    shape: what `structure` says of the rows, where that is known.
    """

    def __init__(self, alphabet, tokens, X=None, shape=None):
        tokens = np.asarray(tokens)
        N, L = tokens.shape
        arity = alphabet.arity[tokens]
        if (arity < 0)[tokens > 0].any():
            raise ValueError(f"{alphabet.tokens[tokens[(arity < 0) & (tokens > 0)][0]]!r} can't stand in a formula")
        size, height = shape or structure(arity)
        row, place = np.nonzero(arity > 0)
        token = tokens[row, place]
        seen = np.zeros((N, L + 1), np.intp)
        seen[:, 1:] = np.cumsum(tokens == alphabet.constant, 1)
        key = height[row, place].astype(np.int32) * 256 + token
        if X is not None:
            key += (seen[row, place + size[row, place]] > seen[row, place]) * 2**24  # has a constant: comes last
        order = key.argsort(kind="stable")
        row, place, token, key = row[order], place[order], token[order], key[order]
        here, constant = np.nonzero(tokens >= alphabet.first_variable), np.nonzero(tokens == alphabet.constant)
        used = np.zeros((N, len(alphabet.variables)), bool)
        variable = tokens[here] - np.intp(alphabet.first_variable)
        used[here[0], variable] = True
        self.uses, self.constants, self.N = np.nonzero(used), (constant[0], seen[constant]), N
        literals = [name for name in LITERALS if name in alphabet.ids]
        self.literals = np.array([[LITERALS[name]] for name in literals]).reshape(-1, 1)
        self.starts = np.cumsum([0, len(self.uses[0]), len(constant[0]), len(literals), len(row)]).tolist()
        slot = np.zeros((N, L + 1), np.intp)
        slot[here] = (used.ravel().cumsum() - 1).reshape(used.shape)[here[0], variable]
        slot[constant] = self.starts[1] + np.arange(len(constant[0]))
        for i, name in enumerate(literals):
            slot[:, :L][tokens == alphabet.ids[name]] = self.starts[2] + i
        slot[row, place] = self.starts[3] + np.arange(len(row))
        self.root, self.left = slot[:, 0], slot[row, place + 1]
        self.right = slot[row, np.minimum(place + 1 + size[row, place + 1], L)]
        cuts = np.flatnonzero(np.diff(key, prepend=-1)).tolist()
        self.groups = [
            (a, b, OPERATORS[alphabet.tokens[token[a]]], key[a] < 2**24)
            for a, b in zip(cuts, [*cuts[1:], len(row)], strict=False)
        ]
        self.widest = max((b - a for a, b, _, _ in self.groups), default=0)
        self.slots = None
        if X is not None:
            slots = np.empty((self.starts[4], X.shape[-2]))
            slots[: self.starts[1]] = X.T[self.uses[1]] if X.ndim == 2 else X[self.uses[0], :, self.uses[1]]
            slots[self.starts[2] : self.starts[3]] = self.literals
            self._run(slots, [group for group in self.groups if group[3]])
            self.slots, self.groups = slots, [group for group in self.groups if not group[3]]
            self._trace(alphabet, token)

    def _run(self, slots, groups):
        kind, M, first = slots.dtype.str, slots.shape[1], self.starts[3]
        left, right = _buffer("left", self.widest, M, kind), _buffer("right", self.widest, M, kind)
        with np.errstate(all="ignore"):
            for a, b, (arity, function, _, _), _ in groups:
                out, operand = slots[first + a : first + b], slots.take(self.left[a:b], 0, left[: b - a], "clip")
                if arity == 1:
                    function(operand, out)
                else:
                    function(operand, slots.take(self.right[a:b], 0, right[: b - a], "clip"), out)

    def __call__(self, constants, values=None, out=None):
        """constants (N, C), values (len(uses[0]), M) -> y (N, M) of the dtype of `values`, into `out` where given."""
        slots, (_, a, b, c, d) = self.slots, self.starts
        if values is not None:
            slots = _buffer("slots", d, values.shape[1], values.dtype.str)
            slots[:a], slots[b:c] = values, self.literals
        slots[a:b] = np.asarray(constants)[self.constants][:, None]
        self._run(slots, self.groups)
        return slots.take(self.root, 0, out, "clip")

    def _trace(self, alphabet, token):
        """Where derivatives flow: the edges from operators to operands that are or contain a constant.

        An edge's own derivative is computed with those of all edges of its (operator, operand); then, from the root
        down, each is multiplied by that of the edge above it.
        """
        first, total = self.starts[3], self.starts[4]
        parent = np.concatenate([np.arange(len(token)), np.flatnonzero(alphabet.arity[token] == 2)])
        side = (np.arange(len(parent)) >= len(token)).astype(np.intp)
        child = np.where(side, self.right[parent], self.left[parent])
        leads = np.zeros(total, bool)
        leads[self.starts[1] : self.starts[2]] = True
        for a, b, _, _ in self.groups:
            leads[first + a : first + b] = True
        parent, side, child = (x[leads[child]] for x in (parent, side, child))
        kind = token[parent] * np.intp(2) + side
        order = kind.argsort(kind="stable")
        parent, child, kind = parent[order], child[order], kind[order]
        cuts = np.flatnonzero(np.diff(kind, prepend=-1)).tolist()
        self.kinds = [
            (a, b, OPERATORS[alphabet.tokens[kind[a] // 2]], kind[a] % 2, first + parent[a:b])
            for a, b in zip(cuts, [*cuts[1:], len(kind)], strict=False)
        ]
        edge = np.full(total, len(kind))  # of a slot: the one above it; the root has none, and the derivative 1
        edge[child] = np.arange(len(kind))
        above, self.ends, self.levels = edge[first + parent], edge[self.starts[1] : self.starts[2]], []
        level = np.flatnonzero(above == len(kind))
        while len(level):
            level = np.flatnonzero(np.isin(above, level))
            self.levels.append((level, above[level]))

    def gradient(self, constants):
        """constants (N, C) -> y (N, M), dy / dconstants (N, C, M), in float64; only with X.

        In a tree the derivative by a constant is the product along the one path to it: all cost as much as one.
        """
        y = self(constants)
        first, slots = self.starts[3], self.slots
        slopes = np.ones(((self.kinds[-1][1] if self.kinds else 0) + 1, slots.shape[1]))
        with np.errstate(all="ignore"):
            for a, b, made, side, node in self.kinds:
                operands = [slots[x[node - first]] for x in (self.left, self.right)[: made.arity]]
                slopes[a:b] = made.derivative[side](*operands, slots[node])
            for edges, above in self.levels:
                slopes[edges] *= slopes[above]
        jacobian = np.zeros((self.N, np.shape(constants)[1], slots.shape[1]))
        jacobian[self.constants] = slopes[self.ends]
        return y, jacobian


def evaluate(alphabet, tokens, constants, X):
    """Values of N formulas, each on its own points: tokens (N, L), constants (N, C), X (N, M, D) -> y (N, M).

    Of the dtype of X, float32 or float64; what isn't finite stays so, without a warning. Raises ValueError for a row
    that is not exactly one formula.
    """
    y, rows = np.empty(X.shape[:2], X.dtype), max(1, CACHE // max(1, X.shape[1]))
    for a in range(0, len(tokens), rows):
        program = Program(alphabet, tokens[a : a + rows])
        row, variable = program.uses
        program(constants[a : a + rows], X[a : a + rows][row, :, variable], y[a : a + rows])
    return y


def evaluate_grad(alphabet, tokens, constants, X):
    """As `evaluate`, in float64 -> y (N, M), dy / dconstants (N, M, C), 0 for columns beyond a row's constants."""
    y, jacobian = Program(alphabet, tokens, np.asarray(X, np.float64)).gradient(constants)
    return y, jacobian.transpose(0, 2, 1)


def from_text(text, variables):
    """A formula as people type it -> prefix tokens, values of its "<constant>"s. No part of it is ever executed.

    variables: the names that may occur; the i-th becomes the token x<i + 1>. Numbers become "<constant>", pi and e
    literals; powers 2 to 5, 1/2 and 1/4 the operators of that name; x**(1/3) stays `pow`, which is nan below 0.
    Raises DataError for all but + - * / **, functions of the table, declared names, numbers, and for what is too long.
    """
    if len(text) > LENGTH:
        raise DataError(f"a formula of {len(text)} characters: at most {LENGTH}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise DataError(f"not a formula: {text.strip()[:60]!r}: {e.args[0] if e.args else 'too deep'}") from e
    names = {"pi": "np.pi", "e": "np.e"} | {name: f"x{i + 1}" for i, name in enumerate(variables)}
    values, count = [], 0

    def number(x):
        if not abs(x) < LARGEST:
            raise DataError(f"number {str(x)[:20]}: below 1e12 is allowed")
        values.append(float(x))
        return ["<constant>"]

    def convert(node, depth):
        nonlocal count
        count += 1
        if count > NODES or depth > DEPTH:
            raise DataError(f"a formula of more than {NODES} parts, or more than {DEPTH} deep")
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                return number(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (int, float):
                return number(-value)
            case ast.UnaryOp(op=ast.USub()):
                return ["neg", *convert(node.operand, depth + 1)]
            case ast.BinOp(op=ast.Pow()):
                return _power(convert(node.left, depth + 1), node.right, lambda x: convert(x, depth + 1), number)
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
                sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
                left = convert(node.left, depth + 1)  # first: its constants come first
                return [sign, *left, *convert(node.right, depth + 1)]
            case ast.Name() if node.id in names:
                return [names[node.id]]
            case ast.Call(func=ast.Name(id=name), keywords=[]):
                name = SYNONYMS.get(name, name)
                if name in OPERATORS and OPERATORS[name].arity == len(node.args):
                    return [name, *(token for x in node.args for token in convert(x, depth + 1))]
        found = ast.get_source_segment(text.strip(), node) or type(node).__name__
        known = ", ".join([*variables, "pi, e, numbers, + - * / ** and functions such as sin, exp, log, sqrt, pow1_3"])
        raise DataError(f"{found[:60]!r} is not allowed in a formula: allowed are {known}")

    return convert(tree, 1), values


def _power(base, tree, convert, number):
    """base ** tree as tokens. An exponent of numbers is folded, so that x**(1/2) and x**-2 find their operators."""
    exponent = _folded(tree)
    if exponent is None:
        return ["pow", *base, *convert(tree)]
    if not abs(exponent) <= EXPONENT:
        raise DataError(f"exponent {exponent:.6g}: at most {EXPONENT} is allowed")
    inverse, size = ["inv"] * (exponent < 0), abs(exponent)
    if size in (0.5, 0.25):
        return [*inverse, f"pow1_{1 / size:.0f}", *base]
    if size == int(size) > 0:
        rest, powers = int(size), []
        for k in (5, 4, 3, 2):
            while rest % k == 0:
                rest, powers = rest // k, [*powers, f"pow{k}"]
        if rest == 1:
            return [*inverse, *powers, *base]
    return ["pow", *base, *number(exponent)]


def _folded(tree):
    """The value of a tree that holds only numbers and + - * / **, else None; inf for what is none of them."""
    match tree:
        case ast.Constant(value=value) if type(value) in (int, float):
            return float(value) if abs(value) < LARGEST else math.inf
        case ast.UnaryOp(op=ast.USub()):
            value = _folded(tree.operand)
            return value if value is None else -value
        case ast.BinOp() if type(tree.op) in FOLDS:
            a, b = _folded(tree.left), _folded(tree.right)
            try:
                return None if a is None or b is None else float(FOLDS[type(tree.op)](a, b))
            except (ArithmeticError, TypeError):  # TypeError: a complex power
                return math.inf
    return None


def to_text(prefix, values=None, names=None, precision=0):
    """Prefix tokens -> infix text that `from_text` reads back: as few brackets as Python's precedence allows.

    values: of the "<constant>"s (None: c1, c2, ...); names[i]: of variable x<i + 1>; precision: digits, 0 = exact.
    """
    blank = [f"c{i + 1}" for i in range(prefix.count("<constant>"))]
    constants = iter(blank if values is None else [_digits(x, precision) for x in values])
    known = {"(-1)": "-1", "np.pi": "pi", "np.e": "e"} | {f"x{i + 1}": name for i, name in enumerate(names or [])}
    tokens = iter(prefix)

    def read():
        token = next(tokens)
        if token not in OPERATORS:
            text = next(constants) if token == "<constant>" else known.get(token, token)
            return text, 2 if text.startswith("-") else 5
        template, precedence, least = OPERATORS[token].infix
        parts = [text if found >= low else f"({text})" for low in least for text, found in [read()]]
        if precedence < 5 and token not in ("+", "-"):  # no sign after another one
            parts = [f"({x})" if x.startswith("-") and (i or template[0] != "{") else x for i, x in enumerate(parts)]
        text = template.format(*parts)
        return text.replace(" + -", " - ").replace(" - -", " + ") if token in ("+", "-") else text, precedence

    return read()[0]


def _digits(value, precision):
    text = f"{value:.{precision}g}" if precision else repr(float(value))
    return text.removesuffix(".0")
