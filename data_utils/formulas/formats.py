"""Formulas as text, Python, LaTeX and sympy, with as many digits as their constants need.

C constants, M points, D variables. A formula is prefix tokens whose i-th "<constant>" is the i-th number.
"""

import keyword
import math
import operator
import re

import numpy as np

from data_utils.formulas.expressions import OPERATORS, evaluate, padded_columns

FORMATS = "text", "python", "latex", "sympy"
GROWTH = 0.01  # share by which rounded constants may increase the root mean square of the residuals
PRECISION = 1e-12  # of y, below which residuals count as none
LIKELIHOOD = 0.02  # increase of the sum of squares, in variances: a seventh of a standard error of a constant
ROWS, CHECKED = 1000, 1_000_000  # rows on which digits are chosen, and that confirm the choice
DIGITS = 17  # which tell any two float64 apart

# token: (template, its precedence, the least precedence of each operand), as in expressions.OPERATORS
TEXT = {token: operator.infix for token, operator in OPERATORS.items()} | {"pow1_3": ("cbrt({})", 5, (0,))}
FUNCTIONS = "abs sin cos tan sinh cosh tanh exp log".split()
INVERSE = {f"a{name}": f"arc{name}" for name in "sin cos tan sinh cosh tanh".split()}
PYTHON = TEXT | {token: (f"np.{INVERSE.get(token, token)}({{}})", 5, (0,)) for token in (*FUNCTIONS, *INVERSE)}
PYTHON |= {
    "pow1_2": ("np.sqrt({})", 5, (0,)),
    "pow1_3": ("np.cbrt({})", 5, (0,)),
    "pow1_4": ("{}**0.25", 4, (5,)),
    "pow1_5": ("np.sign({0})*np.abs({0})**0.2", 2, (0,)),
}
SYMPY = TEXT | {token: (f"sp.{token}({{}})", 5, (0,)) for token in (*FUNCTIONS, *INVERSE)}
SYMPY |= {
    "abs": ("sp.Abs({})", 5, (0,)),
    "pow1_2": ("sp.sqrt({})", 5, (0,)),
    "pow1_3": ("sp.real_root({}, 3)", 5, (0,)),
    "pow1_4": ("sp.root({}, 4)", 5, (0,)),
    "pow1_5": ("sp.real_root({}, 5)", 5, (0,)),
}
# a function, a fraction and a power are put in brackets before they are raised to a power
LATEX = {f"pow{k}": (f"{{}}^{{{{{k}}}}}", 4, (5,)) for k in (2, 3, 4, 5)}
LATEX |= {f"pow1_{k}": (f"\\sqrt[{k}]{{{{{{}}}}}}", 5, (0,)) for k in (3, 4, 5)}
LATEX |= {f"mult{k}": (f"{k} \\cdot {{}}", 2, (2,)) for k in (2, 3, 4, 5)}
LATEX |= {f"div{k}": (f"\\frac{{{{{{}}}}}}{{{{{k}}}}}", 3, (0,)) for k in (2, 3, 4, 5)}
LATEX |= {name: (f"\\{name}\\left({{}}\\right)", 4, (0,)) for name in FUNCTIONS}
LATEX |= {token: (f"\\{name}\\left({{}}\\right)", 4, (0,)) for token, name in INVERSE.items()}
LATEX |= {
    f"a{name}": (f"\\operatorname{{{{ar{name}}}}}\\left({{}}\\right)", 4, (0,)) for name in ("sinh", "cosh", "tanh")
}
LATEX |= {
    "+": TEXT["+"],
    "-": TEXT["-"],
    "*": ("{} \\, {}", 2, (2, 2)),
    "/": ("\\frac{{{}}}{{{}}}", 3, (0, 0)),
    "pow": ("{}^{{{}}}", 4, (5, 0)),
    "abs": ("\\left|{}\\right|", 5, (0,)),
    "inv": ("\\frac{{1}}{{{}}}", 3, (0,)),
    "neg": ("-{}", 2, (2,)),
    "pow1_2": ("\\sqrt{{{}}}", 5, (0,)),
    "exp": ("e^{{{}}}", 4, (0,)),
    "log": ("\\ln\\left({}\\right)", 4, (0,)),
}
STYLES = {
    "text": (TEXT, {"(-1)": "-1", "np.pi": "pi", "np.e": "e"}),
    "python": (PYTHON, {"(-1)": "-1"}),
    "latex": (LATEX, {"(-1)": "-1", "np.pi": "\\pi", "np.e": "e"}),
    "sympy": (SYMPY, {"(-1)": "-1", "np.pi": "sp.pi", "np.e": "sp.E"}),
}
GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi
omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega""".split()
ESCAPED = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "#$%&_{}"
}


# ---- digits of constants


def round_constants(alphabet, formula, data, digits=0):
    """Return the constants of a score.Ranked as texts: as few digits as the fit to score.Data needs, or `digits`.

    Residuals of the formula with rounded constants have a root mean square at most GROWTH larger. They also grow by
    less than the data can tell, which matters where points are many.
    """
    constants = np.asarray(formula.constants, float)
    if digits or not len(constants):
        return [number_text(value, digits) for value in constants.tolist()]
    row = np.array([alphabet.encode(formula.prefix)], np.uint8)
    few = np.unique(np.linspace(0, data.n - 1, ROWS).astype(int))
    fits = _judge(alphabet, row, constants, data, formula.relative, few)
    ladder = np.array([[_rounded(value, d) for value in constants] for d in range(1, DIGITS + 1)])  # (DIGITS, C)
    chosen = np.full(len(constants), _first(fits(ladder)))
    for i in np.argsort(-np.abs(constants), kind="stable"):
        trials = np.repeat(ladder[chosen, np.arange(len(constants))][None], chosen[i] + 1, 0)
        trials[:, i] = ladder[: chosen[i] + 1, i]
        chosen[i] = _first(fits(trials))
    if data.n > len(few):
        fits = _judge(alphabet, row, constants, data, formula.relative, np.arange(data.n)[:CHECKED])
        while chosen.min() < DIGITS - 1 and not fits(ladder[chosen, np.arange(len(constants))][None])[0]:
            chosen = np.minimum(chosen + 1, DIGITS - 1)
    return [number_text(value, d + 1) for value, d in zip(constants.tolist(), chosen.tolist(), strict=True)]


def _rounded(value, digits):
    return float(f"{value:.{digits - 1}e}")


def _first(good):
    """Return the first True of (N,), which the last one counts as."""
    return int(np.argmax([*good[:-1], True]))


def _judge(alphabet, row, constants, data, relative, rows):
    """Return fits(trials (N, C)) -> (N,) bool: whether a formula with these constants still fits rows of the data."""
    X, y = data.X[rows], data.y[rows]
    columns = padded_columns(alphabet, X)
    size = np.abs(y).max() or 1.0  # by which residuals are divided, since squares may leave the range of floats
    limits = []
    for kind in {False, relative}:
        weights = data.weights[kind][rows]
        same_kind = kind == relative
        growth = min((1 + GROWTH) ** 2 - 1, LIKELIHOOD / data.n) if same_kind else (1 + GROWTH) ** 2 - 1
        least = np.mean((weights * PRECISION * (y / size)) ** 2)
        limits.append((weights, growth, least))

    def squares(trials, weights):
        values = evaluate(alphabet, np.repeat(row, len(trials), 0), trials, np.repeat(columns[None], len(trials), 0))
        with np.errstate(all="ignore"):
            return np.mean(((values - y) / size * weights) ** 2, 1)

    before = [squares(constants[None], weights)[0] for weights, _, _ in limits]

    def fits(trials):
        good = np.ones(len(trials), bool)
        for (weights, growth, least), start in zip(limits, before, strict=True):
            good &= squares(trials, weights) <= start * (1 + growth) + least
        return good

    return fits


def number_text(value, digits=0):
    """Return a number with so many significant digits, 0 = all that it has, as Python reads it.

    Numbers from 1e-4 to 1e7 are written without an exponent, others with one: 2455000.37, 6.626e-34.
    """
    value = _rounded(value, digits) if digits else float(value)
    if not math.isfinite(value):
        return repr(value)
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        text = np.format_float_positional(value, trim="-")
        return "0" if text == "-0" else text
    mantissa, _, exponent = np.format_float_scientific(value, trim="-").partition("e")
    return f"{mantissa}e{int(exponent)}"


# ---- writers


def write_formula(prefix, numbers, names, style="text"):
    """Return the right-hand side of a formula in one of FORMATS.

    numbers: texts of the constants, as round_constants gives them; names[i]: of the variable x<i + 1>, already as the
    format wants it (see identifiers and latex_name).
    """
    templates, literals = STYLES[style]
    prefix = _joined(prefix)
    known = literals | {f"x{i + 1}": name for i, name in enumerate(names)}
    tokens, constants = iter(prefix), iter(numbers)
    left, right = ("\\left(", "\\right)") if style == "latex" else ("(", ")")

    def number(text):
        mantissa, _, exponent = text.partition("e")
        if style == "latex" and exponent:
            return f"{mantissa} \\times 10^{{{exponent}}}", 2
        return text, 2 if text.startswith("-") else 5

    def read():
        token = next(tokens)
        if token == "<constant>":
            return number(next(constants))
        power = re.fullmatch(r"pow(\d\d+)", token)
        if token not in OPERATORS and not power:
            text = known.get(token, token)
            return text, 2 if token == "(-1)" else 5
        template, precedence, least = templates["pow2" if power else token]
        template = template.replace("2", power[1]) if power else template
        operands = [read() for _ in least]
        if token == "pow" and style == "python":  # an array of integers has no negative powers
            text, strength = operands[1]
            operands[1] = f"{text}.0" if re.fullmatch(r"-\d+", text) else text, strength
        parts = []
        for place, ((text, strength), low) in enumerate(zip(operands, least, strict=True)):
            signed = text.startswith("-") and precedence in (2, 4) and low and (place or template[0] != "{")
            parts.append(f"{left}{text}{right}" if strength < low or signed else text)
        if style == "latex" and token == "*" and re.match(r"[\d.]", parts[1]):
            template = "{} \\cdot {}"
        text = template.format(*parts)
        if token in ("+", "-"):
            text = text.replace(" + -", " - ").replace(" - -", " + ")
        if token.startswith("mult"):
            text = re.sub(r"^(\d)\*1/", r"\1/", text)  # 3/x, not 3*1/x
        return text, precedence

    return read()[0]


def _joined(prefix):
    """Return prefix tokens with powers of powers as one, such as pow12, and 1/a/2 as 1/(2 a)."""
    joined = []
    for token in prefix:
        outer = joined[-1] if joined else ""
        if re.fullmatch(r"pow\d+", token) and re.fullmatch(r"pow\d+", outer):
            joined[-1] = f"pow{int(outer[3:]) * int(token[3:])}"
        elif token == "inv" and outer.startswith("div"):
            joined[-1:] = ["inv", outer.replace("div", "mult")]
        else:
            joined.append(token)
    return joined


def identifiers(names, taken=("np", "sp")):
    """Return a valid, distinct Python name for each column name."""
    unique = []
    for name in names:
        name = "".join(c if f"a{c}".isidentifier() else " " for c in name)  # \w has signs such as ² as well
        name = re.sub(r"\W+", "_", name).strip("_") or "x"
        if not name.isidentifier():
            name = f"x{name}"
        while keyword.iskeyword(name) or name in taken or name in unique:
            name += "_"
        unique.append(name)
    return unique


def latex_name(name):
    """Return a column's name for LaTeX: v, \\lambda, T_{\\mathrm{max}} or \\mathrm{period\\_s}."""
    base, _, index = name.partition("_")
    match = re.fullmatch(r"([A-Za-z])(\d+)", name)
    if match:
        base, index = match.groups()
    if base in GREEK or re.fullmatch("[A-Za-z]", base):
        base = f"\\{base}" if base in GREEK else base
        if not index and "_" not in name:
            return base
        if re.fullmatch(r"[A-Za-z0-9]+", index):
            return f"{base}_{{{index}}}" if len(index) == 1 or index.isdigit() else f"{base}_{{\\mathrm{{{index}}}}}"
    return "\\mathrm{" + "".join(ESCAPED.get(c, c) for c in name).replace(" ", "\\ ") + "}"


def used_variables(prefix):
    """Return the numbers of the variables that occur in prefix tokens, from 0, in their order."""
    return sorted({int(token[1:]) - 1 for token in prefix if token not in OPERATORS and re.fullmatch(r"x\d+", token)})


def write_equation(prefix, numbers, names, target, style="text"):
    """Return a formula of the columns `names` for the column `target`, ready to be pasted, in one of FORMATS.

    text: target = formula. python: a function of numpy. latex: an equation. sympy: Python that makes the expression.
    """
    if style == "text":
        return f"{target} = {write_formula(prefix, numbers, names)}"
    if style == "latex":
        right = write_formula(prefix, numbers, [latex_name(name) for name in names], "latex")
        return f"{latex_name(target)} = {right}"
    places = used_variables(prefix)
    used = identifiers([names[i] for i in places])
    valid = ["" for _ in names]
    for i, name in zip(places, used, strict=True):
        valid[i] = name
    right = write_formula(prefix, numbers, valid, style)
    if style == "sympy":
        (result,) = identifiers([target], ("np", "sp", *used))
        symbols = [f"{name} = sp.Symbol({names[i]!r}, real=True)" for i, name in zip(places, used, strict=True)]
        return "\n".join(["import sympy as sp", "", *symbols, f"{result} = {right}"])
    (result,) = identifiers([target])
    lines = ["import numpy as np", "", "", f"def {result}({', '.join(used)}):"]
    pairs = [(result, target), *((name, names[i]) for i, name in zip(places, used, strict=True))]
    renamed = [f"{name} is {original}" for name, original in pairs if name != original]
    if renamed:
        lines.append(f"    # {', '.join(renamed)}")
    for name in used:  # integers would overflow in powers
        lines.append(f"    {name} = np.asarray({name}, float)")
    return "\n".join([*lines, f"    return {right}"])


def to_sympy(prefix, constants, names):
    """Return the sympy expression of a formula, constants as they are. Raises ImportError where sympy is missing."""
    try:
        import sympy
    except ImportError as e:
        raise ImportError("sympy is missing, which expressions need\ntry: pip install sympy") from e
    whole_numbers = {str(k): sympy.Integer(k) for k in (0, 1)} | {"(-1)": sympy.Integer(-1)}
    literals = whole_numbers | {"np.pi": sympy.pi, "np.e": sympy.E}
    named = dict(abs=sympy.Abs, pow1_2=sympy.sqrt, inv=lambda a: 1 / a, neg=lambda a: -a)
    binary = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "pow": operator.pow}
    tokens, numbers = iter(prefix), iter(constants)

    def read():
        token = next(tokens)
        if token == "<constant>":
            return sympy.Float(next(numbers))
        if token in literals:
            return literals[token]
        if token not in OPERATORS:
            return sympy.Symbol(names[int(token[1:]) - 1], real=True)
        operands = [read() for _ in range(OPERATORS[token].arity)]
        if token in binary:
            return binary[token](*operands)
        (a,) = operands
        if token in named:
            return named[token](a)
        k = int(token[-1]) if token[-1].isdigit() else 0
        if token.startswith("pow1_"):
            return sympy.real_root(a, k)
        if k:
            return a**k if token.startswith("pow") else a * k if token.startswith("mult") else a / k
        return getattr(sympy, token)(a)

    return read()
