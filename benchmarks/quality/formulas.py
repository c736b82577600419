"""Figures of symbolic regression: test sets with and without the network, the pipeline beside the plain way.

    python -m benchmarks.quality.formulas                                   # all rows; those of test sets take hours
    python -m benchmarks.quality.formulas --rows data,simplify --times 3
    python -m benchmarks.quality.formulas --rows nguyen,skeletons --arms network --model models/ansr-models/sr-cpu

One thread. The control of the test sets is the same search without the network, the arm "prior". Baselines: pip
install sympy scipy gplearn pyoperon; without them their side is left out.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.quality.pictures import selected
from benchmarks.report import ROOT, WORK, changed_flags, command_line, compared, figure, measure
from data_utils.formulas.dataset import CHUNK, DataConfig, FlashANSRDataset
from data_utils.formulas.expressions import LITERALS, OPERATORS, evaluate
from data_utils.formulas.fit import fit
from data_utils.formulas.model_files import PRETRAINED, load_model, model_folder
from data_utils.formulas.problems import problems, score
from data_utils.formulas.search import SOLVED, Network, find_formula, fvu
from data_utils.formulas.simplify import NotReal, simplify
from data_utils.formulas.skeletons import PoolConfig, check_pool, sample_trees

LIMIT = 5  # seconds that sympy has for a formula
FEW = 3  # variables
NAMES = dict(nguyen="nguyen", feynman="feynman <= 3 variables", fastsrb="fastsrb <= 3 variables")


def cpu_seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


# --- parts ------------------------------------------------------------------------------------
def walk(prefix, constants, X):
    """Evaluate one formula at X (M, D), node by node."""
    tokens, numbers = iter(prefix), iter(constants)

    def value():
        token = next(tokens)
        if token in OPERATORS:
            operands = [value() for _ in range(OPERATORS[token].arity)]
            return OPERATORS[token].function(*operands, np.empty(len(X), X.dtype))
        if token == "<constant>":
            return np.full(len(X), next(numbers), X.dtype)
        return np.full(len(X), LITERALS[token], X.dtype) if token in LITERALS else X[:, int(token[1:]) - 1]

    return value()


def data(args):
    """Accepted samples per CPU second, and evaluation alone against one formula at a time."""
    bare = PoolConfig(simplify=False, n_support_prior="constant(512)")
    arms = (
        ("bare", "512 points, fresh trees, no simplifier", bare, ">= 20000"),
        ("chain", "16 to 64 points, the whole chain", PoolConfig(), ">= 10000"),
    )
    for id, name, pool, target in arms:
        rounds = []
        for k in range(min(3, args.times)):  # each a whole chunk of skeletons
            stream = FlashANSRDataset(check_pool(pool), pool, DataConfig(), seed=k, split="train", batch_size=64)
            spent = cpu_seconds(lambda stream=stream: [stream.arrays(i) for i in range(CHUNK)])
            rounds.append([CHUNK * 64 / spent])
        yield compared(id, f"samples, {name}", rounds, target, unit="per CPU second")
    pool = PoolConfig(simplify=False)
    alphabet, rng = check_pool(pool), np.random.default_rng(0)
    rows = sample_trees(rng, 512, alphabet, pool)
    constants, X = rng.standard_normal((512, 24)), rng.uniform(0.1, 3, (512, 512, 3)).astype(np.float32)
    prefixes = [alphabet.decode(row[row > 0]) for row in rows]

    def one_by_one():
        with np.errstate(all="ignore"):
            for prefix, c, x in zip(prefixes, constants, X, strict=True):
                walk(prefix, c, x)

    sides = (lambda: evaluate(alphabet, rows, constants, X), one_by_one)
    rounds = [[512 / cpu_seconds(side) for side in sides] for _ in range(args.times)]
    title = "evaluations, 512 points, against a formula at a time"
    yield compared("evaluation", title, rounds, unit="per CPU second")


def symbolic(sympy, prefix, numbers):
    """Build the same formula of sympy's own objects."""
    tokens, numbers = iter(prefix), iter(numbers)
    binary = {"+": sympy.Add, "*": sympy.Mul, "pow": sympy.Pow}
    binary |= {"-": lambda a, b: a - b, "/": lambda a, b: a / b}
    unary = dict(neg=lambda a: -a, inv=lambda a: 1 / a, abs=sympy.Abs)
    leaves = {"0": sympy.Integer(0), "1": sympy.Integer(1), "(-1)": sympy.Integer(-1)}
    leaves |= {"np.pi": sympy.pi, "np.e": sympy.E}

    def numbered(token):
        """pow2, pow1_3, mult3, div4 and their like: the operator has a number in its name."""
        name, _, k = token.partition("_")
        number = sympy.Rational(1, int(k)) if k else sympy.Integer(int(token[-1])) if token[-1].isdigit() else None
        if number is None:
            return getattr(sympy, token)(build())
        if name.startswith("pow"):
            return build() ** number
        return build() * (number if token[0] == "m" else 1 / number)

    def build():
        token = next(tokens)
        if token in binary:
            return binary[token](build(), build())
        if token in unary:
            return unary[token](build())
        if token in OPERATORS:
            return numbered(token)
        if token == "<constant>":
            return sympy.Float(next(numbers))
        return leaves.get(token, sympy.Symbol(token))

    return build()


def simplifier(args):
    """CPU seconds of a normal form against sympy.simplify, at most LIMIT each."""
    pool = PoolConfig()
    alphabet = check_pool(pool)
    rows = sample_trees(np.random.default_rng(1), args.formulas, alphabet, pool)
    prefixes = [alphabet.decode(row[row > 0]) for row in rows]
    ours, lengths = [], []
    for prefix in prefixes:
        start = time.process_time()
        try:
            lengths.append((len(simplify(prefix)[0]), len(prefix)))
        except NotReal:
            pass
        ours.append(time.process_time() - start)
    after, before = (statistics.mean(column) for column in zip(*lengths, strict=True))
    yield compared("length", "length of a formula, simplified against drawn", [(after, before)], unit="tokens")
    try:
        import sympy
    except ImportError:
        yield compared("mean", "normal form, mean", [(1e6 * statistics.mean(ours),)], get=peers.GET["sympy"],
                       unit="microseconds")  # fmt: skip
        return

    def expire(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, expire)
    theirs = []
    for prefix in prefixes:
        start = time.process_time()
        signal.alarm(LIMIT)
        try:
            sympy.simplify(symbolic(sympy, prefix, [1.5 + i for i in range(prefix.count("<constant>"))]))
        except Exception:  # of any kind, sympy's own included: it has had its time
            pass
        finally:
            signal.alarm(0)
        theirs.append(time.process_time() - start)
    for middle in (statistics.mean, statistics.median):
        name, sides = middle.__name__, [1e6 * middle(ours), 1e6 * middle(theirs)]
        title = f"normal form, {name}, against sympy.simplify"
        yield compared(name, title, [sides], "<= 0.002", unit="microseconds")


def finite(values):
    """Return values that are not finite as large ones: scipy would end a fit at the first."""
    return np.where(np.isfinite(values), values, 1e3)


def fit_singly(curve_fit, prefixes, X, y, seed):
    """Fit each formula from four starts by scipy -> the best FVU of each, inf where none converged."""
    draw, best = np.random.default_rng(seed), np.full(len(prefixes), np.inf)
    for i, prefix in enumerate(prefixes):
        count = prefix.count("<constant>")

        def function(x, *constants, prefix=prefix):
            return finite(walk(prefix, constants, x))

        for start in [np.ones(count), *draw.normal(0, 5, (3, count))]:
            try:
                with warnings.catch_warnings(), np.errstate(all="ignore"):
                    warnings.simplefilter("ignore")
                    constants, _ = curve_fit(function, X, y, start, method="lm", maxfev=200)
                    best[i] = np.fmin(best[i], fvu(y, walk(prefix, constants, X)))
            except (RuntimeError, ValueError, TypeError):  # not converged, no finite values, more constants
                continue
    return best


def fits(args):
    """Fits per CPU second, 96 candidates x 4 restarts, against scipy one at a time; how many of its fits we find."""
    pool = PoolConfig()
    alphabet, rng = check_pool(pool), np.random.default_rng(2)
    rows = sample_trees(rng, 400, alphabet, pool)
    rows = rows[(rows == alphabet.constant).sum(1) > 0][:96]
    prefixes = [alphabet.decode(row) for row in rows]
    try:
        from scipy.optimize import curve_fit
    except ImportError:
        curve_fit = None
    for M, target in ((20, ">= 15"), (512, ">= 5")):
        X = rng.uniform(0.5, 2, (M, 3))
        y = np.sin(1.3 * X[:, 0]) * 2 + 0.5 * X[:, 1]
        batched = partial(fit, alphabet, rows, X, y, 4)
        singly = partial(fit_singly, curve_fit, prefixes, X, y)
        sides = [lambda batched=batched: batched(np.random.default_rng(0))]
        if curve_fit:
            sides.append(lambda singly=singly: singly(0))
        rounds = [[96 * 4 / cpu_seconds(run) for run in sides] for _ in range(args.times)]
        against = ", against scipy.optimize.curve_fit" if curve_fit else ""
        yield compared(f"speed.{M}", f"fits, {M} points{against}", rounds, target, peers.GET["scipy"],
                       unit="per CPU second")  # fmt: skip
        if not curve_fit:
            continue
        ours, theirs, again = batched(np.random.default_rng(0))[1], singly(0), singly(1)
        converged = np.isfinite(theirs)
        shares = [100 * (part[converged] <= 1.01 * theirs[converged] + 1e-10).mean() for part in (ours, again)]
        title = f"candidates within 1 % of scipy's FVU, of the {converged.sum()} that it fits to {M} points"
        yield compared(f"share.{M}", f"{title}, against scipy's own from other starts", [shares], "ours >= 98",
                       unit="%")  # fmt: skip


# --- test sets --------------------------------------------------------------------------------
def packages(args):
    """Shares of Nguyen's problems, and of held-out skeletons, that public packages find in --seconds each."""
    arms = (
        ("nguyen", args.seeds, "gplearn", peers.gplearn),
        ("nguyen", args.seeds, "pyoperon", peers.pyoperon),
        (held_out(args), 1, "pyoperon", peers.pyoperon),
    )
    for suite, seeds, name, search in arms:
        try:
            rows = [searched(search, problem, seed, args.seconds)
                    for seed in range(seeds) for problem in problems(str(suite), seed, 0.0)]  # fmt: skip
        except ImportError:
            yield figure(f"{suite_id(suite)}.{name}", f"{suite_name(suite)}, {name}", None, baseline=peers.GET[name])
            continue
        yield shares(f"{suite_id(suite)}.{name}", args, suite, rows, name, seeds=seeds)


def searched(search, problem, seed, seconds):
    """Let a package search one problem -> the row that `generate.py formula --suite` would write."""
    start = time.process_time()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        predict = search(problem.X, problem.y, seed, seconds)
        val = fvu(problem.y_val, predict(problem.X_val))
        wide = fvu(problem.y_wide, predict(problem.X_wide))
    return dict(vnrr=val <= SOLVED, recovered=val <= SOLVED and wide <= SOLVED, r2=1 - val,
                cpu_seconds=time.process_time() - start)  # fmt: skip


def suite_id(suite):
    return suite if suite in NAMES else "skeletons"


def suite_name(suite):
    return NAMES.get(suite, "held-out skeletons")


def percent(rows, key):
    return 100 * statistics.mean(bool(row.get(key)) for row in rows)


def shares(id, args, suite, rows, name, target="", seeds=1):
    """Return the figure of runs: dicts with recovered, vnrr, r2, cpu_seconds."""
    close = 100 * statistics.mean((row.get("r2") or 0) > 0.999 for row in rows)
    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    spread = f"vNRR {percent(rows, 'vnrr'):.1f} %, R2 > 0.999 {close:.1f} %, median {seconds:.1f} CPU s"
    allowed = [row for row in rows if row.get("admissible", True)]
    if len(allowed) < len(rows):  # frequencies that points so far apart can't tell
        spread += f"; {percent(allowed, 'recovered'):.1f} % of the {len(allowed)} whose law the search may list"
    title = f"{suite_name(suite)}, {len(rows)} runs of {args.seconds} s, recovered, {name}"
    ours = round(percent(rows, "recovered"), 1)
    return figure(id, title, ours, target, unit="%", seeds=seeds, spread=spread)


def held_out(args):
    """Return a folder of 100 skeletons that training never draws."""
    pool = args.work / "sr-pool"
    if not (pool / "skeletons.npz").exists():
        words = f"prepare_data.py generate-skeleton-pool -c configs/sr-cpu/skeleton_pool_val.yaml -o {pool} -s 100"
        subprocess.run([sys.executable, *words.split()], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return pool


def solved(args, suite, name, flags):
    """Return the rows of `generate.py formula --suite`; what it prints goes to a log beside them."""
    out = args.work / f"sr-{name}.jsonl"
    words = f"generate.py formula {flags} --suite {suite} --out {out}"
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run([sys.executable, *words.split()], check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return [json.loads(line) for line in out.read_text().splitlines()]


def arms_of(args):
    """Return {arm: (name, flags)}: the search without a network, and with that of --model."""
    arms = dict(prior=("without the network", "--method prior"), network=("network", f"--model {args.model}"))
    return {arm: arms[arm] for arm in selected(args, arms)}


def test_set(args, suite, target, most_seeds=None):
    """Yield the shares of problems found in --seconds each, without the network and with it.

    Problems of up to FEW variables have a figure of their own: a network reads no others.
    """
    seeds = min(most_seeds or args.seeds, args.seeds)
    for arm, (name, flags) in arms_of(args).items():
        flags = f"{flags} --seeds {seeds} --max_seconds {args.seconds}"
        rows = solved(args, suite, f"{Path(str(suite)).name}-{arm}", flags)
        few = [row for row in rows if row["variables"] <= FEW]
        yield shares(arm, args, suite, few, name, target, seeds)
        if len(few) < len(rows):
            title = f"{suite}, up to {max(row['variables'] for row in rows)} variables, {len(rows)} runs of"
            yield shares(f"{arm}.all", args, suite, rows, name, seeds=seeds) | dict(
                title=f"{title} {args.seconds} s, recovered, {name}"
            )


def skeletons(args):
    return test_set(args, held_out(args), ">= 75", most_seeds=1)


def noisy(args):
    """Nguyen with noise on the points that are fitted: found as exactly as the noise allows (nNRR)."""
    arm, (name, flags) = list(arms_of(args).items())[-1]
    for noise in (0.001, 0.01, 0.1):
        more = f"{flags} --noise {noise} --seeds {args.seeds} --max_seconds {args.seconds}"
        rows = solved(args, "nguyen", f"noise-{arm}-{noise}", more)
        yield figure(f"{arm}.{noise:g}", f"nguyen, noise {noise:g}, {len(rows)} runs of {args.seconds} s, nNRR, {name}",
                     round(percent(rows, "nnrr"), 1), unit="%", seeds=args.seeds,
                     spread=f"vNRR {percent(rows, 'vnrr'):.1f} %")  # fmt: skip


def candidates(args):
    """Held-out skeletons by candidates alone, nothing bred or summed: what the network reads off the points."""
    for arm, (_, flags) in arms_of(args).items():
        for choices in (128, 512) if arm == "network" else (128, 512, 1024, 5000):
            rows = solved(
                args, held_out(args), f"pool-{arm}-{choices}", f"{flags} --evolve 0 --max_seconds 0 --choices {choices}"
            )
            title = f"{len(rows)} held-out skeletons, recovered, {choices} candidates of {arm} alone"
            yield shares(f"{arm}.{choices}", args, "pool", rows, arm) | dict(title=title)


def swapped(args):
    """What the network reads off the points: its encoder gets those of the problem, or those of the next one."""
    model = load_model(model_folder(args.model))
    pool = PoolConfig(operators=tuple(model.alphabet.operators), variables=tuple(model.alphabet.variables))
    alike = {}  # problems of as many variables: the others' formulas could not be written
    for problem in problems(str(held_out(args)), 0, 0.0):
        alike.setdefault(problem.X.shape[1], []).append(problem)
    recovered = []
    for turn in (1, 0):  # the points of another problem, then its own
        hits = []
        for part in alike.values():
            for i, problem in enumerate(part):
                shown = part[(i + turn) % len(part)]
                torch.manual_seed(0)
                network = Network(
                    model, shown.X, shown.y, max_points=64, temperature=1.0, top_k=0, top_p=1.0, max_len=64
                )
                best, _ = find_formula(network, problem.X, problem.y, alphabet=model.alphabet, pool=pool,
                                       rng=np.random.default_rng((0, 0)), evolve=0)  # fmt: skip
                with np.errstate(over="ignore"):
                    hits.append(bool(best) and score(model.alphabet, best[0], problem)["recovered"])
        recovered.append(100 * statistics.mean(hits))
    title = f"{len(hits)} held-out skeletons, recovered, 512 candidates of the network off points of another problem"
    yield compared("points", f"{title}, against their own", [recovered], "<= 0.2", unit="%")


ROWS = dict(
    data=data,
    simplify=simplifier,
    refine=fits,
    nguyen=partial(test_set, suite="nguyen", target=">= 75"),
    skeletons=skeletons,
    feynman=partial(test_set, suite="feynman", target=">= 60", most_seeds=3),
    fastsrb=partial(test_set, suite="fastsrb", target=">= 25", most_seeds=3),
    noise=noisy,
    candidates=candidates,
    swapped=swapped,
    packages=packages,
)


def main(argv=None):
    parser = command_line(__doc__, ROWS, "quality.formulas", times=7, formulas=200, seeds=3, seconds=10)
    parser.add_argument("--model", default=PRETRAINED, help="folder of a model of train_sr.py")
    parser.add_argument("--arms", default="", help="only prior, or only network")
    args = parser.parse_args(argv)
    args.threads = 1
    torch.set_num_threads(1)
    args.work = WORK
    if args.quick:
        args.work = WORK / "quick"
        args.times, args.formulas, args.seeds, args.seconds = 1, 20, 1, 1
    measure(args, ROWS, changed_flags(parser, args, ["model", "arms"]))


if __name__ == "__main__":
    main()
