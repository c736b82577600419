"""Formulas as rows of prefix tokens: operators and their ids, batched values and derivatives, text in and out.

N rows, L tokens, M points, D variables, C constants. A row is uint8, right-padded with 0. The value of its i-th
"<constant>" is constants[n, i]. Nothing is protected: even roots, log and fractional powers of negative numbers
are nan.
"""

import ast
import difflib
import itertools
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
CACHE = 2**18  # results per chunk: smaller chunks spend their time on calls, larger ones on memory
OVER_CONSTANT = 2**24  # added to the sort key of an operator that has a constant below it

# Limits of a formula that a person types.
MAX_CHARACTERS = 2000
MAX_PARTS = 300
MAX_DEPTH = 50
MAX_NUMBER = 1e12
MAX_EXPONENT = 64

# function(operands..., out) writes its values into `out`.
# derivative: for each operand a function(operands..., value).
# infix: template, its precedence (1 sum, 2 product, 4 power, 5 call), the least precedence of each operand.
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
    """Tokens and their ids: `special` (the padding first), then `operators`, then `variables`, each a list of names.

    arity: (V,) int8. Operators have 2 or 1; variables, "<constant>" and the literals 0 1 (-1) np.pi np.e have 0; tokens
    that can't stand in a formula have -1. Raises UsageError for unknown operators, repeated tokens and more than 256
    tokens.
    """

    def __init__(self, operators: list[str], variables: list[str], special: list[str] = SPECIAL):
        self.operators = list(operators)
        self.variables = list(variables)
        self.tokens = [*special, *self.operators, *self.variables]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        for name in self.operators:
            if name not in OPERATORS:
                near = ", ".join(difflib.get_close_matches(name, OPERATORS, 3, 0.3))
                raise UsageError(f"operator {name!r} is unknown\nnearest: {near or ' '.join(OPERATORS)}")
        if len(self.ids) < len(self.tokens):
            repeated = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise UsageError(
                f"the alphabet has {' '.join(repeated)} more than once: every token needs a name of its own"
            )
        if len(self.tokens) > 256 or self.tokens[:1] != ["<pad>"] or not self.variables:
            raise UsageError(
                f"an alphabet of {len(self.tokens)} tokens, {len(self.variables)} variables, first {self.tokens[:1]}: "
                "expected at most 256 tokens, at least 1 variable, and <pad> first"
            )
        self.constant = self.ids.get("<constant>", -1)
        self.first_variable = self.ids[self.variables[0]]
        self.arity = np.full(len(self.tokens), -1, np.int8)
        for token in ("<constant>", *LITERALS, *self.variables, *self.operators):
            if token in self.ids:
                self.arity[self.ids[token]] = OPERATORS[token].arity if token in OPERATORS else 0

    def encode(self, tokens: list[str]) -> list[int]:
        """Return the ids of a list of tokens. Raises DataError for a token that isn't in the alphabet."""
        unknown = [token for token in tokens if token not in self.ids]
        if unknown:
            raise DataError(f"token {unknown[0]!r} is not in this alphabet: {' '.join(self.tokens[1:])}")
        return [self.ids[token] for token in tokens]

    def decode(self, ids) -> list[str]:
        """Return the tokens of a row of ids, without its padding."""
        return [self.tokens[i] for i in map(int, ids) if i]


def padded(rows):
    """Id lists -> (N, L) uint8."""
    tokens = np.zeros((len(rows), max(map(len, rows), default=1)), np.uint8)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def padded_columns(alphabet, X):
    """Return X (M, D) with columns of zeros for the variables that the data lack."""
    columns = np.zeros((len(X), len(alphabet.variables)))
    columns[:, : X.shape[1]] = X
    return columns


_buffers = threading.local()


def _buffer(name, rows, columns, dtype):
    """Return an uninitialised (rows, columns) array, reused: a fresh one costs more than the arithmetic in it."""
    array = _buffers.__dict__.get((name, dtype))
    if array is None or array.size < rows * columns:
        array = _buffers.__dict__[name, dtype] = np.empty(rows * columns * 5 // 4, dtype)
    return array[: rows * columns].reshape(rows, columns)


def structure(arity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return size (tokens) and height of the subtree at each prefix position: two (N, L + 2) arrays.

    arity: (N, L), -1 for padding. Raises ValueError where a row is not exactly one formula.
    """
    N, L = arity.shape
    arity = np.ascontiguousarray(arity.T)  # by place, so that the sums below run over contiguous memory
    size = np.zeros((L + 2, N), np.intp)
    height = np.zeros((L + 2, N), np.int16)
    rows = np.arange(N)
    for p in range(L - 1, -1, -1):
        is_operator = arity[p] > 0
        is_binary = arity[p] == 2
        right = np.minimum(p + 1 + size[p + 1], L) * N + rows
        size[p] = (arity[p] >= 0) + is_operator * size[p + 1] + is_binary * size.take(right)
        height[p] = is_operator * (1 + np.maximum(height[p + 1], is_binary * height.take(right)))
    bad = ((arity >= 0).sum(0) != size[0]) | (np.where(arity >= 0, arity - 1, 0).sum(0) != -1)
    if bad.any():
        raise ValueError(f"row {bad.argmax()} is not one formula: arities {arity[:, bad.argmax()].tolist()}")
    return size.T, height.T


def _runs(keys):
    """Return the (begin, end) of each run of equal numbers in sorted `keys`."""
    return list(itertools.pairwise([*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(keys)]))


class Program:
    """Rows compiled for evaluation: one numpy call per (height, operator) that occurs.

    A work array (slots, M) has one row ("slot") for each pair (formula, variable), each constant, each literal and
    each operator, in this order. Operators are sorted by (height, operator): the results of a call are then contiguous,
    and only its operands are gathered.

    tokens: (N, L) ids. X: points (M, D) for all rows, or (N, M, D). With X, parts without a constant are computed once,
    in float64, and calls take constants alone. shape: the result of `structure` for these rows, where it is at hand.
    uses: (rows, variables), the pairs that occur, in the order in which calls without X expect their `values`.
    """

    def __init__(self, alphabet, tokens, X=None, shape=None):
        tokens = np.asarray(tokens)
        N, L = tokens.shape
        arity = alphabet.arity[tokens]
        misplaced = (arity < 0) & (tokens > 0)
        if misplaced.any():
            raise ValueError(f"{alphabet.tokens[tokens[misplaced][0]]!r} can't stand in a formula")
        size, height = shape or structure(arity)

        # Operators in the order of evaluation.
        row, place = np.nonzero(arity > 0)
        token = tokens[row, place]
        constants_before = np.zeros((N, L + 1), np.intp)
        constants_before[:, 1:] = np.cumsum(tokens == alphabet.constant, 1)
        key = height[row, place].astype(np.int32) * 256 + token
        if X is not None:
            end = place + size[row, place]
            key += (constants_before[row, end] > constants_before[row, place]) * OVER_CONSTANT
        order = key.argsort(kind="stable")
        row, place, token, key = (x[order] for x in (row, place, token, key))

        # A slot for each leaf and operator.
        leaf = np.nonzero(tokens >= alphabet.first_variable)
        variable = tokens[leaf] - np.intp(alphabet.first_variable)
        used = np.zeros((N, len(alphabet.variables)), bool)
        used[leaf[0], variable] = True
        constant = np.nonzero(tokens == alphabet.constant)
        literals = [name for name in LITERALS if name in alphabet.ids]
        self.N = N
        self.uses = np.nonzero(used)
        self.constants = constant[0], constants_before[constant]
        self.literals = np.array([[LITERALS[name]] for name in literals]).reshape(-1, 1)
        # Where the slots of variables, constants, literals and operators begin, and where they end.
        self.starts = np.cumsum([0, len(self.uses[0]), len(constant[0]), len(literals), len(row)]).tolist()
        slot = np.zeros((N, L + 1), np.intp)
        slot[leaf] = (used.ravel().cumsum() - 1).reshape(used.shape)[leaf[0], variable]
        slot[constant] = self.starts[1] + np.arange(len(constant[0]))
        for i, name in enumerate(literals):
            slot[:, :L][tokens == alphabet.ids[name]] = self.starts[2] + i
        slot[row, place] = self.starts[3] + np.arange(len(row))
        self.root = slot[:, 0]
        self.left = slot[row, place + 1]
        self.right = slot[row, np.minimum(place + 1 + size[row, place + 1], L)]

        self.groups = [(a, b, OPERATORS[alphabet.tokens[token[a]]]) for a, b in _runs(key)]
        self.widest = max((b - a for a, b, _ in self.groups), default=0)
        self.slots = None
        if X is not None:
            slots = np.empty((self.starts[4], X.shape[-2]))
            slots[: self.starts[1]] = X.T[self.uses[1]] if X.ndim == 2 else X[self.uses[0], :, self.uses[1]]
            slots[self.starts[2] : self.starts[3]] = self.literals
            self._run(slots, [group for group in self.groups if key[group[0]] < OVER_CONSTANT])
            self.slots = slots
            self.groups = [group for group in self.groups if key[group[0]] >= OVER_CONSTANT]
            self._trace(alphabet, token)

    def _run(self, slots, groups):
        """Compute the slots of the operators in `groups` from those of their operands."""
        kind = slots.dtype.str
        M = slots.shape[1]
        first = self.starts[3]
        left = _buffer("left", self.widest, M, kind)
        right = _buffer("right", self.widest, M, kind)
        with np.errstate(all="ignore"):
            for a, b, (arity, function, _, _) in groups:
                out = slots[first + a : first + b]
                operand = slots.take(self.left[a:b], 0, left[: b - a], "clip")
                if arity == 1:
                    function(operand, out)
                else:
                    function(operand, slots.take(self.right[a:b], 0, right[: b - a], "clip"), out)

    def __call__(self, constants, values=None, out=None):
        """Return y (N, M) for constants (N, C), written into `out` where given.

        values: (len(uses[0]), M), only without X; y has their dtype.
        """
        slots = self.slots
        _, a, b, c, total = self.starts
        if values is not None:
            slots = _buffer("slots", total, values.shape[1], values.dtype.str)
            slots[:a] = values
            slots[b:c] = self.literals
        slots[a:b] = np.asarray(constants)[self.constants][:, None]
        self._run(slots, self.groups)
        return slots.take(self.root, 0, out, "clip")

    def _trace(self, alphabet, token):
        """List the edges from operators to operands that are or contain a constant: derivatives flow along these.

        The edges of one (operator, operand) are contiguous, so that one call computes their derivatives. Then, from the
        root down, each is multiplied by that of the edge above it.
        """
        first, total = self.starts[3:]
        parent = np.concatenate([np.arange(len(token)), np.flatnonzero(alphabet.arity[token] == 2)])
        side = (np.arange(len(parent)) >= len(token)).astype(np.intp)  # 0 left, 1 right
        child = np.where(side, self.right[parent], self.left[parent])
        has_constant = np.zeros(total, bool)
        has_constant[self.starts[1] : self.starts[2]] = True
        for a, b, _ in self.groups:
            has_constant[first + a : first + b] = True
        parent, side, child = (x[has_constant[child]] for x in (parent, side, child))
        kind = token[parent] * np.intp(2) + side
        order = kind.argsort(kind="stable")
        parent, child, kind = (x[order] for x in (parent, child, kind))
        self.kinds = [
            (a, b, OPERATORS[alphabet.tokens[kind[a] // 2]], kind[a] % 2, first + parent[a:b]) for a, b in _runs(kind)
        ]
        edge = np.full(total, len(kind))  # the edge above a slot; the root has a last one, of derivative 1
        edge[child] = np.arange(len(kind))
        above = edge[first + parent]
        self.ends = edge[self.starts[1] : self.starts[2]]
        self.levels = []
        level = np.flatnonzero(above == len(kind))
        while len(level):
            level = np.flatnonzero(np.isin(above, level))
            self.levels.append((level, above[level]))

    def gradient(self, constants) -> tuple[np.ndarray, np.ndarray]:
        """Return y (N, M) and dy / dconstants (N, C, M) for constants (N, C), in float64. Only with X.

        In a tree the derivative by a constant is the product along the one path to it: all cost as much as one. It is
        0 for columns beyond the constants of a row.
        """
        y = self(constants)
        first = self.starts[3]
        slots = self.slots
        slopes = np.ones(((self.kinds[-1][1] if self.kinds else 0) + 1, slots.shape[1]))
        with np.errstate(all="ignore"):
            for a, b, kind, side, parents in self.kinds:
                operands = [slots[x[parents - first]] for x in (self.left, self.right)[: kind.arity]]
                slopes[a:b] = kind.derivative[side](*operands, slots[parents])
            for edges, above in self.levels:
                slopes[edges] *= slopes[above]
        jacobian = np.zeros((self.N, np.shape(constants)[1], slots.shape[1]))
        jacobian[self.constants] = slopes[self.ends]
        return y, jacobian


def evaluate(alphabet, tokens, constants, X) -> np.ndarray:
    """Return the values y (N, M) of N formulas, each on its own points, in the dtype of X: float32 or float64.

    tokens (N, L), constants (N, C), X (N, M, D). Values that aren't finite stay so, without a warning. Raises
    ValueError for a row that is not exactly one formula.
    """
    y = np.empty(X.shape[:2], X.dtype)
    rows = max(1, CACHE // max(1, X.shape[1]))
    for a in range(0, len(tokens), rows):
        program = Program(alphabet, tokens[a : a + rows])
        row, variable = program.uses
        program(constants[a : a + rows], X[a : a + rows][row, :, variable], y[a : a + rows])
    return y


def parse_formula(text: str, variables: list[str]) -> tuple[list[str], list[float]]:
    """Return (prefix tokens, values of its "<constant>"s) of a formula as people type it. None of it is executed.

    variables: the names that may occur; the i-th becomes the token x<i + 1>. Numbers become "<constant>", pi and e
    become literals. Powers 2 to 5, 1/2 and 1/4 become the operators of that name; x**(1/3) stays `pow`, which is nan
    below 0. Raises DataError for all but + - * / **, functions of the table, declared names and numbers, and for
    formulas that are too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"a formula of {len(text)} characters: at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise DataError(f"not a formula: {text.strip()[:60]!r}: {e.args[0] if e.args else 'too deep'}") from e
    names = {"pi": "np.pi", "e": "np.e"} | {name: f"x{i + 1}" for i, name in enumerate(variables)}
    values = []
    count = 0

    def number(x):
        if not abs(x) < MAX_NUMBER:
            raise DataError(f"number {str(x)[:20]}: below 1e12 is allowed")
        values.append(float(x))
        return ["<constant>"]

    def convert(node, depth):
        nonlocal count
        count += 1
        if count > MAX_PARTS or depth > MAX_DEPTH:
            raise DataError(f"a formula of more than {MAX_PARTS} parts, or more than {MAX_DEPTH} deep")
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
        source = ast.get_source_segment(text.strip(), node) or type(node).__name__
        allowed = [*variables, "pi, e, numbers, + - * / ** and functions such as sin, exp, log, sqrt, pow1_3"]
        raise DataError(f"{source[:60]!r} is not allowed in a formula: allowed are {', '.join(allowed)}")

    return convert(tree, 1), values


def _power(base, tree, convert, number):
    """Return base ** tree as tokens. An exponent of numbers is folded, so that x**(1/2) and x**-2 become operators."""
    exponent = _fold(tree)
    if exponent is None:
        return ["pow", *base, *convert(tree)]
    if not abs(exponent) <= MAX_EXPONENT:
        raise DataError(f"exponent {exponent:.6g}: at most {MAX_EXPONENT} is allowed")
    inverse = ["inv"] if exponent < 0 else []
    size = abs(exponent)
    if size in (0.5, 0.25):
        return [*inverse, f"pow1_{1 / size:.0f}", *base]
    if size == int(size) > 0:
        rest = int(size)
        powers = []
        for k in (5, 4, 3, 2):
            while rest % k == 0:
                rest //= k
                powers.append(f"pow{k}")
        if rest == 1:
            return [*inverse, *powers, *base]
    return ["pow", *base, *number(exponent)]


def _fold(tree):
    """Return the value of a tree of numbers and + - * / **; None for other trees, inf where the value is no number."""
    match tree:
        case ast.Constant(value=value) if type(value) in (int, float):
            return float(value) if abs(value) < MAX_NUMBER else math.inf
        case ast.UnaryOp(op=ast.USub()):
            value = _fold(tree.operand)
            return value if value is None else -value
        case ast.BinOp() if type(tree.op) in FOLDS:
            a, b = _fold(tree.left), _fold(tree.right)
            try:
                return None if a is None or b is None else float(FOLDS[type(tree.op)](a, b))
            except (ArithmeticError, TypeError):  # TypeError: a complex power
                return math.inf
    return None


def format_formula(prefix: list[str], values=None, names=None, precision=0) -> str:
    """Return prefix tokens as infix text that `parse_formula` reads back, with few brackets.

    values: of the "<constant>"s (None: c1, c2, ...); names[i]: of variable x<i + 1>; precision: digits, 0 = exact.
    """
    if values is None:
        constants = iter([f"c{i + 1}" for i in range(prefix.count("<constant>"))])
    else:
        constants = iter([_digits(x, precision) for x in values])
    words = {"(-1)": "-1", "np.pi": "pi", "np.e": "e"} | {f"x{i + 1}": name for i, name in enumerate(names or [])}
    tokens = iter(prefix)

    def read():
        token = next(tokens)
        if token not in OPERATORS:
            text = next(constants) if token == "<constant>" else words.get(token, token)
            return text, 2 if text.startswith("-") else 5
        template, precedence, least = OPERATORS[token].infix
        parts = []
        for i, low in enumerate(least):
            text, inner = read()
            # A sign that would follow * / ** or another sign.
            second = (i > 0 or template[0] != "{") and precedence < 5 and token not in ("+", "-")
            if inner < low or (second and text.startswith("-")):
                text = f"({text})"
            parts.append(text)
        text = template.format(*parts)
        if token in ("+", "-"):
            text = text.replace(" + -", " - ").replace(" - -", " + ")
        return text, precedence

    return read()[0]


def _digits(value, precision):
    text = f"{value:.{precision}g}" if precision else repr(float(value))
    return text.removesuffix(".0")
