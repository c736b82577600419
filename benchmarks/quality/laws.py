"""Figures of `generate.py formula` on tables of known laws, as a scientist would have them: units, noise, few digits.

    python -m benchmarks.quality.laws                                     # all rows, hours
    python -m benchmarks.quality.laws --rows laws --arms ours --seeds 1   # 30 tables, 8 minutes
    python -m benchmarks.quality.laws --rows scales,rows,deadline,tables

benchmarks/laws.csv holds the laws: name, formula, variables (name:low:high[:log];...), rows, noise (share of y, or of
its standard deviation where y changes sign), digits written. `verdict` says when an answer is accepted.

One thread. Baselines, with the same seconds each: pip install pyoperon gplearn; without them their side is left out.
Answers are kept in benchmarks/work/laws; a run that was measured is only read again, until the search changes.
"""

import ast
import csv
import json
import os
import resource
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks import peers
from benchmarks.report import HERE, ROOT, WORK, changed_flags, command_line, figure, mean_and_each, measure, save
from data_utils.errors import DataError, UsageError
from data_utils.files import write_atomic
from data_utils.formulas.answers import search_formulas, to_answers
from data_utils.formulas.formats import write_formula
from data_utils.formulas.model_files import PRETRAINED, load_model, model_folder, suited
from data_utils.formulas.regressor import NETWORK
from data_utils.formulas.score import Data
from data_utils.formulas.tables import read_table

CASES = ROOT.parent / "shared" / "cases" / "formulas"  # that only developers have; COPIES are like them
POINTS = 2000  # on which an answer is judged
NOISES = 0.0, 0.01, 0.05
DECADES = -9, 9
LENGTHS = 4, 6, 10, 20, 100  # rows of a table
SIZES = 25, 1000, 100_000  # rows of a table on which the deadline is measured
DEADLINE = 5  # seconds
STARVED = 0.8  # CPU seconds per wall second below which a run had too little of its core
ARMS = dict(  # name: title
    ours="first answer accepted",
    ours_front="any answer of the front accepted",
    pyoperon="pyoperon, its own choice accepted",
    pyoperon_front="pyoperon, any of its front accepted",
    gplearn="gplearn accepted",
    logs="linear regression of logarithms accepted",
)


# --- laws -------------------------------------------------------------------------------------
@dataclass
class Law:
    name: str
    formula: str
    ranges: dict  # name -> (low, high, log or linear)
    rows: int
    noise: float
    digits: int


def read_laws(path=HERE / "laws.csv"):
    """Read the laws of a file."""
    laws = []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        ranges = {}
        for variable in row["variables"].split(";"):
            name, low, high, *kind = variable.split(":")
            ranges[name] = float(low), float(high), bool(kind)
        numbers = int(row["rows"]), float(row["noise"]), int(row["digits"])
        laws.append(Law(row["name"], row["formula"], ranges, *numbers))
    return laws


def draw_columns(law, n, rng, widen=0.0, grid=False):
    """Draw n points of the ranges -> name -> (n,). widen: share of a range by which it grows at either end.

    A range that begins at 0 or above stays on its side of zero. grid: evenly, where there is one variable.
    """
    columns = {}
    for name, (low, high, logarithmic) in law.ranges.items():
        a, b = np.log([low, high]) if logarithmic else (low, high)
        a, b = a - widen * (b - a), b + widen * (b - a)
        if not logarithmic and low >= 0:
            a = max(a, low / 2)
        x = np.linspace(a, b, n) if grid and len(law.ranges) == 1 else rng.uniform(a, b, n)
        columns[name] = np.exp(x) if logarithmic else x
    return columns


def one_sign(y):
    return bool((y > 0).all() or (y < 0).all())


def make_table(law, seed):
    """Draw the measurements of a law -> names and cells, y last, with as many digits as a scientist writes."""
    rng = np.random.default_rng((seed, sum(map(ord, law.name))))
    columns = draw_columns(law, law.rows, rng, grid=True)
    y = value(law.formula, columns)
    scale = np.abs(y) if one_sign(y) else y.std()
    y = y + law.noise * scale * rng.standard_normal(len(y))
    cells = [[f"{v:.{law.digits}g}" for v in row] for row in zip(*columns.values(), y, strict=True)]
    return [*columns, "y"], cells


# --- judge ------------------------------------------------------------------------------------
FUNCTIONS = {
    name: getattr(np, name) for name in "exp log sqrt sin cos tan sinh cosh tanh abs log10 log2 cbrt sign".split()
}
FUNCTIONS |= {f"a{name}": getattr(np, f"arc{name}") for name in "sin cos tan sinh cosh tanh".split()}
BINARY = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide, ast.Pow: np.power}
NUMBERS = dict(pi=np.pi, e=np.e)


def value(text, columns):
    """Return the values (n,) of a formula at columns: name -> (n,). Raises ValueError for what is no formula."""

    def walk(node):
        match node:
            case ast.Constant(value=number) if type(number) in (int, float):
                return np.float64(number)
            case ast.Name(id=name) if name in columns:
                return columns[name]
            case ast.Name(id=name) if name in NUMBERS:
                return np.float64(NUMBERS[name])
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return walk(operand)
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in BINARY:
                return BINARY[type(operator)](walk(left), walk(right))
            case ast.Call(func=ast.Name(id=name), args=[operand], keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](walk(operand))
        raise ValueError(f"not a formula of {', '.join(columns)}: {text[:60]}")

    with np.errstate(all="ignore"):
        y = walk(parsed(text))
    return np.broadcast_to(np.asarray(y, float), len(next(iter(columns.values()))))


def parsed(text):
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as e:
        raise ValueError(f"not a formula: {text[:60]}") from e


def size(text):
    """Count the operators, functions and constants of a formula."""
    return sum(isinstance(node, (ast.BinOp, ast.Call, ast.Constant)) for node in ast.walk(parsed(text)))


def relative_error(law, predict, columns):
    """Return the RMS of predict(columns) / law - 1; where the law changes sign, RMS error over standard deviation.

    Points at which the law is not finite don't count; inf where the prediction is not finite at another.
    """
    y, predicted = value(law.formula, columns), predict(columns)
    finite = np.isfinite(y)
    y, predicted = y[finite], predicted[finite]
    if not np.isfinite(predicted).all():
        return float("inf")
    errors = predicted / y - 1 if one_sign(y) else (predicted - y) / y.std()
    return float(np.sqrt(np.mean(errors**2)))


def verdict(law, text, predict=None):
    """Judge an answer -> dict(accepted, why, inside, outside). predict: its function of columns, if not that of `text`.

    inside: relative RMS error against the noise-free law on the ranges of the table, at most 1 % or twice the noise.
    outside: the same on ranges that are half wider at either end, at most 5 %, or 10 % from 1 % of noise on.
    short: at most 1.5 times as many operators and constants as the law, plus 3.
    """
    text = text.split("=", 1)[-1].strip()
    predict = predict or partial(value, text)
    rng = np.random.default_rng(1)
    try:
        inside = relative_error(law, predict, draw_columns(law, POINTS, rng))
        outside = relative_error(law, predict, draw_columns(law, POINTS, rng, widen=0.5))
        short = size(text) <= 1.5 * size(law.formula) + 3
    except ValueError as e:
        return dict(accepted=False, why=str(e)[:60])
    rules = dict(inside=inside <= max(0.01, 2 * law.noise), outside=outside <= (0.1 if law.noise >= 0.01 else 0.05),
                 short=short)  # fmt: skip
    why = ", ".join(name for name, obeyed in rules.items() if not obeyed)
    return dict(accepted=not why, why=why, inside=float(f"{inside:.3g}"), outside=float(f"{outside:.3g}"))


# --- runs -------------------------------------------------------------------------------------
def children_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def command(args, path, seconds):
    """Run `generate.py formula` on a table in a new process -> its answers, best first, seconds and CPU seconds."""
    out = args.work / "front.jsonl"
    out.unlink(missing_ok=True)
    words = [sys.executable, "generate.py", "formula", "--data", path, "--max_seconds", seconds, "--out", out]
    one_thread = os.environ | dict(OMP_NUM_THREADS="1")
    start, cpu = time.monotonic(), children_seconds()
    subprocess.run(list(map(str, words)), check=True, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)  # fmt: skip
    spent = dict(seconds=round(time.monotonic() - start, 2), cpu_seconds=round(children_seconds() - cpu, 2))
    answers = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return answers, spent


def columns_of(cells):
    table = np.array(cells, float)
    return table[:, :-1], table[:, -1]


def answers_of(args, arm, law, seed):
    """Let one arm search one table -> ([(text, function of columns or None)], best first; seconds spent)."""
    names, cells = make_table(law, seed)
    if arm == "ours":
        path = args.work / f"{law.name}.csv"
        path.write_text("\n".join(map(",".join, [names, *cells])) + "\n", encoding="utf-8")
        answers, spent = command(args, path, args.seconds)
        listed = [answer for i, answer in enumerate(answers) if i == 0 or answer["front"]]
        return [(answer["formula"], None) for answer in listed], spent
    X, y = columns_of(cells)
    start, cpu = time.monotonic(), time.process_time()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        formulas = PACKAGES[arm](X, y, seed, args.seconds)
    spent = dict(seconds=round(time.monotonic() - start, 2), cpu_seconds=round(time.process_time() - cpu, 2))

    def of_columns(predict):
        return lambda columns: np.asarray(predict(np.stack(list(columns.values()), 1)), float)

    return [(text, of_columns(predict)) for text, predict in formulas], spent


def log_regression(X, y, seed, seconds):
    """Fit |y| = c * product of |x|^p, the linear regression of logarithms."""
    if (X == 0).any() or not one_sign(y):
        return []
    columns = np.column_stack([np.ones(len(y)), np.log(np.abs(X))])
    offset, *exponents = np.linalg.lstsq(columns, np.log(np.abs(y)), rcond=None)[0]
    factor = float(np.sign(y[0]) * np.exp(offset))
    text = " * ".join([repr(factor), *(f"x{j} ** {p:.17g}" for j, p in enumerate(exponents))])
    return [(text, lambda X: factor * (np.abs(X) ** exponents).prod(1))]


PACKAGES = dict(pyoperon=peers.pyoperon_front, gplearn=peers.gplearn_program, logs=log_regression)


def search_digest():
    """Return a number that changes with the code of the search and with the network that comes with the repo."""
    paths = sorted([*(ROOT / "data_utils/formulas").glob("*.py"), *model_folder(PRETRAINED).glob("*.pt")])
    return zlib.crc32(b"".join(path.read_bytes() for path in paths))


def judged(args, row, arm, law, seed):
    """Return the judged answers of one run: dict(law, arm, seed, formula, verdict's parts, front, seconds).

    It is read from the file of runs if it is there; front: whether any of the listed answers is accepted.
    """
    key = dict(arm=arm, law=law.name, seed=seed, noise=law.noise, max_seconds=args.seconds)
    if arm == "ours":
        key["search"] = search_digest()
    for run in args.runs:
        if run | key == run:
            return run
    answers, spent = answers_of(args, arm, law, seed)
    verdicts = [verdict(law, text, predict) for text, predict in answers]
    run = key | dict(formula=answers[0][0] if answers else "", accepted=False, why="no answer")
    if verdicts:
        run |= verdicts[0]
    run |= dict(front=any(v["accepted"] for v in verdicts)) | spent
    args.runs.append(run)
    write_atomic(args.runs_file, lambda file: file.write("".join(json.dumps(r) + "\n" for r in args.runs).encode()))
    mark = "accepted" if run["accepted"] else f"NO ({run['why']})"
    print(f"{row} {arm:9} {law.name:22} seed {seed} {mark:24} {spent['cpu_seconds']:5.1f} CPU s {run['formula'][:80]}",
          file=sys.stderr, flush=True)  # fmt: skip
    return run


def share(runs, key="accepted"):
    """Return 'mean (each seed)' in percent."""
    seeds = sorted({run["seed"] for run in runs})
    return mean_and_each([np.mean([run[key] for run in runs if run["seed"] == seed]) for seed in seeds])


def spent_words(runs):
    """Say what runs took, and how many of them had too little of their core."""
    seconds, cpu = (np.median([run[name] for run in runs]) for name in ("seconds", "cpu_seconds"))
    starved = sum(run["cpu_seconds"] < STARVED * run["seconds"] for run in runs)
    return [f"median {seconds:.1f} s, {cpu:.1f} CPU s", f"{starved} of {len(runs)} runs starved" if starved else ""]


# --- rows -------------------------------------------------------------------------------------
def laws(args):
    """Shares of the tables whose answer is accepted, beside other packages with the same seconds."""
    tables, runs = read_laws()[: args.laws], {}
    for arm in filter(None, args.arms.split(",")):
        try:
            runs[arm] = [judged(args, "laws", arm, law, seed) for seed in range(args.seeds) for law in tables]
        except ImportError:
            title = f"{len(tables)} laws, {args.seconds} s, {ARMS[arm]}"
            yield figure(arm, title, None, baseline=peers.GET[arm])
    for name, title in ARMS.items():
        arm, _, front = name.partition("_")
        if arm not in runs:
            continue
        ours = share(runs[arm], "front" if front else "accepted")
        target = ">= 90" if name == "ours" else ""
        title = f"{len(tables)} laws, {args.seconds} s, {title}"
        yield figure(name, title, ours, target, unit="%", seeds=args.seeds, spread=spent_words(runs[arm]))
    if "ours" in runs:
        counts = {law.name: sum(run["accepted"] for run in runs["ours"] if run["law"] == law.name) for law in tables}
        missed = [f"{name} {count} of {args.seeds}" for name, count in counts.items() if count < args.seeds]
        yield figure("never", f"of {len(tables)} laws, accepted for no seed", sum(not c for c in counts.values()), "0",
                     unit="laws", seeds=args.seeds, spread=", ".join(missed))  # fmt: skip
    save(args, "laws", misses=misses(runs))
    text = misses_page(tables, runs, args)
    write_atomic(args.out.with_name("laws.md"), lambda file: file.write(text.encode()))


def misses(runs):
    """Return the runs of ours that were not accepted."""
    keys = "law", "seed", "formula", "why", "inside", "outside", "front", "seconds", "cpu_seconds"
    return [{key: run[key] for key in keys if key in run} for run in runs.get("ours", ()) if not run["accepted"]]


def misses_page(tables, runs, args):
    """Render accepted seeds of each law by each arm, and the answers that were refused, as Markdown."""
    columns = [name for name in ARMS if name.partition("_")[0] in runs]
    lines = ["# Laws", "", f"Seeds of {args.seeds} whose answer was accepted after {args.seconds} s, by "
             "`python -m benchmarks.quality.laws --rows laws`.", "", f"| law | {' | '.join(columns)} |",
             "| --- " * (len(columns) + 1) + "|"]  # fmt: skip
    for law in tables:
        counts = []
        for name in columns:
            arm, _, front = name.partition("_")
            key = "front" if front else "accepted"
            counts.append(str(sum(run[key] for run in runs[arm] if run["law"] == law.name)))
        lines.append(f"| {law.name} | {' | '.join(counts)} |")
    lines += ["", "## Refused", "", "| law | seed | answer | refused for | error inside | outside |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for run in misses(runs):
        parts = [run["law"], run["seed"], f"`{run['formula']}`", run["why"], run.get("inside"), run.get("outside")]
        lines.append(f"| {' | '.join(map(str, parts))} |")
    return "\n".join(lines) + "\n"


def noise(args):
    """The same laws with other noise."""
    for level, target in zip(NOISES, (95, 90, 60), strict=True):
        tables = [replace(law, noise=level) for law in read_laws()[: args.laws]]
        runs = [judged(args, "noise", "ours", law, seed) for seed in range(args.seeds) for law in tables]
        title = f"{len(tables)} laws, noise {100 * level:g} %, {args.seconds} s, first answer accepted"
        yield figure(f"{level:g}", title, share(runs), f">= {target}", unit="%", seeds=args.seeds,
                     spread=spent_words(runs))  # fmt: skip


def search_table(args, names, cells):
    """Search a table as the command does, but without a clock: equal tables get equal answers -> first formula."""
    path = args.work / "table.csv"
    path.write_text("\n".join(map(",".join, [names, *cells])) + "\n", encoding="utf-8")
    table = read_table(str(path))
    model = load_model(model_folder(PRETRAINED))
    network = dict(model=suited(model, PRETRAINED, len(table.names)), network=NETWORK | dict(max_len=model.max_seq_len))
    alphabet, formulas, _ = search_formulas(table.X, table.y, table.names, np.random.default_rng(0),
                                            half=table.digits_y, choices=args.choices, **network)  # fmt: skip
    best = to_answers(alphabet, formulas, Data(table.X, table.y, None, table.digits_y))[0]
    return write_formula(best.prefix, best.numbers, table.names)


def scales(args):
    """Multiply columns by powers of ten: the same formula up to its constants."""
    same, changed, total = 0, [], 0
    for i, law in enumerate(read_laws()[: args.laws]):
        names, cells = make_table(law, 0)
        plain = skeleton(search_table(args, names, cells))
        rng = np.random.default_rng(i)
        for variant in range(args.variants):
            powers = rng.choice(DECADES, len(names))
            if variant % 2:  # one column alone
                powers[np.arange(len(names)) != rng.integers(len(names))] = 0
            shifted = [[shift(cell, power) for cell, power in zip(row, powers, strict=True)] for row in cells]
            formula = search_table(args, names, shifted)
            total += 1
            same += skeleton(formula) == plain
            if skeleton(formula) != plain:
                changed.append(law.name)
                print(f"scales {law.name} {powers}: {formula} is {skeleton(formula)}, was {plain}", file=sys.stderr)
    title = f"{total} tables with columns times 10^-9 or 10^9, the same formula up to its constants"
    yield figure("same", title, round(100 * same / total, 1), "100", unit="%", spread=", ".join(changed))


def shift(cell, power):
    """Return a decimal number times 10^power, exactly."""
    mantissa, _, exponent = cell.partition("e")
    return f"{mantissa}e{int(exponent or 0) + power}"


def skeleton(text):
    """Return a formula without its constants, as text that equal forms share.

    Factors and divisors that are numbers are dropped, and terms that are numbers become one `c`. Exponents that are no
    whole numbers become `p`. Terms and factors are sorted. log(c*x) is log(x) + c; exp(c + x), exp(x),
    1/exp(x) and c**x are equal up to constants.
    """

    def power(base, exponent):
        """Raise factors {text: exponent} to a power."""
        return {key: e * exponent for key, e in base.items()}

    def written(factors):
        parts = []
        for key, e in sorted(factors.items()):
            e = 1 if e and key.startswith("exp(") else e
            is_whole = abs(e - round(e)) < 1e-9
            if is_whole and round(e) == 0:
                continue
            exponent = "" if is_whole and round(e) == 1 else f"^{round(e)}" if is_whole else "^p"
            parts.append(key + exponent)
        return "*".join(parts) or "c"

    def terms(node):
        match node:
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
                return [*terms(left), *terms(right)]
            case ast.UnaryOp(operand=operand):
                return terms(operand)
            case ast.BinOp(left=left, op=ast.Mult(), right=right) if not factors(left):
                return terms(right)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right) if not factors(right):
                return terms(left)
        return [written(factors(node))]

    def summed(node):
        unique = set(terms(node))
        if len(unique) > 1 and any(map(is_log, unique)):
            unique -= {"c"}
        return "+".join(sorted(unique))

    def factors(node):
        match node:
            case ast.Constant():
                return {}
            case ast.Name(id=name):
                return {} if name in NUMBERS else {name: 1}
            case ast.UnaryOp(operand=operand):
                return factors(operand)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as operator, right=right):
                product = dict(factors(left))
                for key, e in factors(right).items():
                    product[key] = product.get(key, 0) + (e if isinstance(operator, ast.Mult) else -e)
                return product
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                if not factors(right):
                    columns = dict(c=np.ones(1))
                    return power(factors(left), float(value(ast.unparse(right), columns)[0]))
                if not factors(left):
                    return {f"exp({without_number(summed(right))})": 1}
                return {f"({summed(left)})^({summed(right)})": 1}
            case ast.BinOp():
                inner = summed(node)
                return {} if inner == "c" else {f"({inner})" if "+" in inner else inner: 1}
            case ast.Call(func=ast.Name(id="sqrt"), args=[operand]):
                return power(factors(operand), 0.5)
            case ast.Call(func=ast.Name(id="cbrt"), args=[operand]):
                return power(factors(operand), 1 / 3)
            case ast.Call(func=ast.Name(id=name), args=[operand]):
                inner = summed(operand)
                if inner == "c":
                    return {}
                return {f"{name}({without_number(inner) if name == 'exp' else inner})": 1}
        raise ValueError(f"not a formula: {text[:60]}")

    def is_log(term):
        depths = np.cumsum([(c == "(") - (c == ")") for c in term])
        return term.startswith("log(") and (depths[3:-1] > 0).all() and depths[-1] == 0

    def without_number(inner):
        return "+".join(part for part in inner.split("+") if part != "c") or "c"

    return summed(parsed(text))


FORMS = (  # name, formula, low and high of x
    Law("line", "1.7 * x + 3", dict(x=(1.0, 10.0, False)), 0, 0.005, 4),
    Law("power law", "2.4 * x**1.6", dict(x=(1.0, 10.0, False)), 0, 0.005, 4),
    Law("exponential", "5 * exp(-0.4 * x)", dict(x=(0.0, 8.0, False)), 0, 0.005, 4),
)


def rows(args):
    """Tables of few rows of plain forms, which must be the answer."""
    for law in FORMS:
        answers = []
        for n in LENGTHS[: args.lengths]:
            for seed in range(args.seeds):
                answers.append((n, search_table(args, *make_table(replace(law, rows=n), seed))))
        plain = skeleton(law.formula)
        wrong = [f"{n} rows: {formula}" for n, formula in answers if skeleton(formula) != plain]
        title = f"{law.name}, {', '.join(map(str, LENGTHS[: args.lengths]))} rows, the plain form"
        yield figure(law.name.replace(" ", "_"), title, round(100 * (1 - len(wrong) / len(answers)), 1), "100",
                     unit="%", seeds=args.seeds, spread=wrong)  # fmt: skip


def deadline(args):
    """Seconds that the command takes beyond --max_seconds, start of Python and reading of the table included."""
    law = Law("deadline", "2 * a * exp(-b / 3) + c", {name: (0.5, 5.0, False) for name in "abc"}, 0, 0.01, 6)
    for n in SIZES[: args.lengths]:
        names, cells = make_table(replace(law, rows=n), 0)
        path = args.work / f"rows-{n}.csv"
        path.write_text("\n".join(map(",".join, [names, *cells])) + "\n", encoding="utf-8")
        seconds = min(DEADLINE, args.seconds)
        overs, cpu = [], []
        for _ in range(args.seeds):
            _, spent = command(args, path, seconds)
            overs.append(spent["seconds"] - seconds)
            cpu.append(spent["cpu_seconds"])
        yield figure(f"{n}", f"{n} rows, --max_seconds {seconds}, seconds beyond it", round(float(np.median(overs)), 2),
                     "<= 1", unit="s", spread=[f"{min(overs):.2f} to {max(overs):.2f}",
                     f"{np.median(cpu):.1f} CPU s of {seconds + np.median(overs):.1f} s"])  # fmt: skip


COPIES = {  # small tables in the shapes in which people's files come
    "comma.csv": b"V,I\n1,0.1\n2,0.2\n3,0.3\n",
    "semicolon.csv": b"V;I\n1,5;0,1\n2,5;0,2\n3,5;0,3\n",
    "tab.tsv": b"V\tI\n1\t0.1\n2\t0.2\n3\t0.3\n",
    "comment.csv": b"# made in spring\nV,I\n1,0.1\n2,0.2\n3,0.3\n",
    "units.csv": b"V,I\nvolt,ampere\n1,0.1\n2,0.2\n3,0.3\n",
    "index.csv": b",V,I\n0,1,0.1\n1,2,0.2\n2,3,0.3\n",
    "missing.csv": b"V,I\n1,0.1\nNA,0.2\n3,0.3\n4,0.4\n",
    "utf16.csv": "\ufeffV,I\n1,0.1\n2,0.2\n3,0.3\n".encode("utf-16-le"),
    "twice.csv": b"V,V\n1,0.1\n2,0.2\n3,0.3\n",
    "headless.csv": b"1,0.1\n2,0.2\n3,0.3\n",
    "empty.csv": b"",
}


def tables(args):
    """Tables in odd shapes: each is read, or refused with a `try:`."""
    paths = sorted(CASES.iterdir()) if CASES.is_dir() else []
    if not paths:
        folder = args.work / "tables"
        folder.mkdir(exist_ok=True)
        for name, content in COPIES.items():
            (folder / name).write_bytes(content)
        paths = sorted(folder.iterdir())
    good, refused, faults = 0, 0, []
    for path in paths:
        try:
            read_table(str(path))
            good += 1
        except (DataError, UsageError) as e:
            if "try:" in str(e) or "fix:" in str(e):
                refused += 1
            else:
                faults.append(path.name)
        except Exception as e:  # of any kind: it is what is counted
            faults.append(f"{path.name}: {type(e).__name__}")
    yield figure("read", f"{len(paths)} tables, read or refused with a remedy",
                 round(100 * (good + refused) / len(paths), 1), "100", unit="%",
                 spread=[f"{good} read, {refused} refused", *faults])  # fmt: skip


ROWS = dict(laws=laws, noise=noise, scales=scales, rows=rows, deadline=deadline, tables=tables)

FLAGS = dict(  # that belong to the command of a row
    laws="laws seeds seconds arms",
    noise="laws seeds seconds",
    scales="laws variants choices",
    rows="seeds choices",
    deadline="seeds",
    tables="",
)


def main(argv=None):
    numbers = dict(laws=30, seeds=3, seconds=15, choices=1, variants=2)
    parser = command_line(__doc__, ROWS, "quality.laws", **numbers, arms="ours,pyoperon,gplearn,logs")
    args = parser.parse_args(argv)
    args.threads, args.lengths = 1, None
    torch.set_num_threads(1)
    args.work = WORK / "laws"
    if args.quick:
        args.work = WORK / "quick/laws"
        args.seeds, args.seconds, args.variants, args.laws, args.lengths = 1, 1, 1, 1, 1
    args.work.mkdir(parents=True, exist_ok=True)
    args.runs_file = args.work / "runs.jsonl"
    args.runs = []
    if args.runs_file.exists():
        args.runs = [json.loads(line) for line in args.runs_file.read_text().splitlines()]

    def flags(row):
        return "" if args.quick else changed_flags(parser, args, FLAGS[row].split())

    measure(args, ROWS, flags)


if __name__ == "__main__":
    main()
