"""Figures of symbolic regression: the pipeline beside the plain way, in turn in one process, one thread.

    python benchmarks/sr.py                                   # all rows; those of test sets take hours
    python benchmarks/sr.py --rows data,simplify --times 3
    python benchmarks/sr.py --rows nguyen,skeletons --model models/ansr-models/sr-cpu --seconds 10
    python benchmarks/sr.py --rows "" --readme                # only write the table into README.md

The control of the test sets is the same search without the network. Peers: pip install sympy scipy gplearn pyoperon;
without them their side is left out.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import command_line, figure, measure
from data_utils.formulas.dataset import CHUNK, DataConfig, FlashANSRDataset
from data_utils.formulas.expressions import LITERALS, OPERATORS, evaluate
from data_utils.formulas.fit import fit
from data_utils.formulas.model_files import load_model
from data_utils.formulas.problems import problems, score
from data_utils.formulas.search import SOLVED, Network, find_formula, fvu
from data_utils.formulas.simplify import NotReal, simplify
from data_utils.formulas.skeletons import PoolConfig, check_pool, sample_trees

HERE = Path(__file__).resolve().parent
LIMIT = 5  # seconds that sympy has for a formula
NAMES = dict(nguyen="nguyen", feynman="feynman <= 3 variables", fastsrb="fastsrb <= 3 variables")
HELD_OUT = "held-out skeletons"


def spent(run):
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def walk(prefix, constants, X):
    """Values of one formula at X (M, D), node by node."""
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
    drawn = PoolConfig(simplify=False, n_support_prior="constant(512)")
    arms = (
        ("512 points, fresh trees, no simplifier", drawn, ">= 20000"),
        ("16 to 64 points, the whole chain", PoolConfig(), ">= 10000"),
    )
    for name, pool, target in arms:
        rounds = []
        for k in range(min(3, args.times)):  # each a whole chunk of skeletons
            stream = FlashANSRDataset(check_pool(pool), pool, DataConfig(), seed=k, split="train", batch_size=64)
            rounds.append([CHUNK * 64 / spent(lambda stream=stream: [stream.arrays(i) for i in range(CHUNK)])])
        yield figure(f"samples per CPU second, {name}", target, rounds)
    pool = PoolConfig(simplify=False)
    alphabet, rng = check_pool(pool), np.random.default_rng(0)
    rows = sample_trees(rng, 512, alphabet, pool)
    constants, X = rng.standard_normal((512, 24)), rng.uniform(0.1, 3, (512, 512, 3)).astype(np.float32)
    prefixes = [alphabet.decode(row[row > 0]) for row in rows]

    def one_by_one():
        with np.errstate(all="ignore"):
            for prefix, c, x in zip(prefixes, constants, X, strict=True):
                walk(prefix, c, x)

    rounds = []
    for _ in range(args.times):
        rounds.append([512 / spent(lambda: evaluate(alphabet, rows, constants, X)), 512 / spent(one_by_one)])
    yield figure("evaluations per CPU second, 512 points, against a formula at a time", "", rounds)


def symbolic(sympy, prefix, numbers):
    """The same formula of sympy's own objects, built from its tree."""
    tokens, numbers = iter(prefix), iter(numbers)
    two = {"+": sympy.Add, "*": sympy.Mul, "pow": sympy.Pow}
    two |= {"-": lambda a, b: a - b, "/": lambda a, b: a / b}
    one = dict(neg=lambda a: -a, inv=lambda a: 1 / a, abs=sympy.Abs)
    leaves = {
        "0": sympy.Integer(0),
        "1": sympy.Integer(1),
        "(-1)": sympy.Integer(-1),
        "np.pi": sympy.pi,
        "np.e": sympy.E,
    }

    def build():
        token = next(tokens)
        if token in two:
            return two[token](build(), build())
        if token in one:
            return one[token](build())
        if token in OPERATORS:
            name, _, k = token.partition("_")
            number = sympy.Rational(1, int(k)) if k else sympy.Integer(int(token[-1])) if token[-1].isdigit() else None
            if number is None:
                return getattr(sympy, token)(build())
            return (
                build() ** number if name.startswith("pow") else build() * (number if token[0] == "m" else 1 / number)
            )
        if token == "<constant>":
            return sympy.Float(next(numbers))
        return leaves.get(token, sympy.Symbol(token))

    return build()


def simpler(args):
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
    yield figure("tokens of a formula, simplified against drawn", "", [(after, before)])
    try:
        import sympy
    except ImportError:
        yield figure("microseconds of a normal form, mean", "", [(1e6 * statistics.mean(ours),)], "pip install sympy")
        return

    def late(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
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
        found = [(1e6 * middle(ours), 1e6 * middle(theirs))]
        yield figure(f"microseconds of a normal form, {middle.__name__}, against sympy.simplify", "<= 0.002", found)


def finite(values):
    """Values that are not finite as large ones: scipy would end a fit at the first."""
    return np.where(np.isfinite(values), values, 1e3)


def fits(args):
    """Fits per CPU second, 96 candidates x 4 restarts, against scipy one at a time, and how many of its we find."""
    pool = PoolConfig()
    alphabet, rng = check_pool(pool), np.random.default_rng(2)
    rows = sample_trees(rng, 400, alphabet, pool)
    rows = rows[(rows == alphabet.constant).sum(1) > 0][:96]
    prefixes = [alphabet.decode(row) for row in rows]
    for M, target in ((20, ">= 15"), (512, ">= 5")):
        X = rng.uniform(0.5, 2, (M, 3))
        y = np.sin(1.3 * X[:, 0]) * 2 + 0.5 * X[:, 1]
        found = np.empty(len(rows)), np.empty(len(rows))  # FVU of ours, of scipy's converged fits

        def batched(X=X, y=y, found=found):
            found[0][:] = fit(alphabet, rows, X, y, 4, np.random.default_rng(0))[1]

        try:
            from scipy.optimize import curve_fit
        except ImportError:
            rounds = [[96 * 4 / spent(batched)] for _ in range(args.times)]
            yield figure(f"fits per CPU second, {M} points", target, rounds, "pip install scipy")
            continue

        def singly(X=X, y=y, best_of=found[1], seed=0):
            draw = np.random.default_rng(seed)
            best_of[:] = np.inf
            for i, prefix in enumerate(prefixes):
                count = prefix.count("<constant>")
                for start in [np.ones(count), *draw.normal(0, 5, (3, count))]:
                    try:
                        with warnings.catch_warnings(), np.errstate(all="ignore"):
                            warnings.simplefilter("ignore")
                            best, _ = curve_fit(lambda x, *c, prefix=prefix: finite(walk(prefix, c, x)), X, y, start,
                                                method="lm", maxfev=200)  # fmt: skip
                            best_of[i] = np.fmin(best_of[i], fvu(y, walk(prefix, best, X)))
                    except (RuntimeError, ValueError, TypeError):  # not converged, no finite values, more constants
                        continue

        rounds = [[96 * 4 / spent(run) for run in (batched, singly)] for _ in range(args.times)]
        yield figure(f"fits per CPU second, {M} points, against scipy.optimize.curve_fit", target, rounds)
        other = np.empty(len(rows))
        singly(best_of=other, seed=1)
        ours, theirs, other = (part[np.isfinite(found[1])] for part in (*found, other))
        ours, other = (100 * (part <= 1.01 * theirs + 1e-10).mean() for part in (ours, other))
        name = f"% within 1 % of scipy's FVU, of the {len(theirs)} candidates that it fits to {M} points"
        yield figure(f"{name}, against scipy's own from other starts", "ours >= 98", [(ours, other)])


def of_gplearn(X, y, seed, seconds):
    """A function of X found by gplearn in so many seconds."""
    import gplearn.functions
    from gplearn.genetic import SymbolicRegressor

    exp = gplearn.functions.make_function(function=lambda a: np.exp(np.clip(a, -50, 20)), name="exp", arity=1)
    names = ("add", "sub", "mul", "div", "sqrt", "log", "sin", "cos", exp)
    found = SymbolicRegressor(
        population_size=1000, generations=1, warm_start=True, metric="rmse", tournament_size=20, function_set=names,
        const_range=(-5, 5), parsimony_coefficient=0.0005, p_crossover=0.7, p_subtree_mutation=0.1,
        p_hoist_mutation=0.05, p_point_mutation=0.1, stopping_criteria=1e-8, random_state=seed,
    )  # fmt: skip
    start, generations = time.monotonic(), 0
    while time.monotonic() - start < seconds and (not generations or found._program.raw_fitness_ > 1e-8):
        generations += 1
        found.set_params(generations=generations)
        found.fit(X, y)
    return found.predict


def of_pyoperon(X, y, seed, seconds):
    """A function of X found by pyoperon in so many seconds."""
    from pyoperon.sklearn import SymbolicRegressor

    found = SymbolicRegressor(
        allowed_symbols="add,sub,mul,div,sin,cos,exp,log,sqrt,square,constant,variable", max_length=30,
        optimizer_iterations=5, population_size=1000, generations=100_000, max_evaluations=10**9, max_time=seconds,
        n_threads=1, random_state=seed, epsilon=1e-10, tournament_size=3,
    )  # fmt: skip
    found.fit(X, y)
    return found.predict


def peers(args):
    """Shares of Nguyen's problems, and of held-out skeletons, that public packages find in --seconds each."""
    arms = (("nguyen", args.seeds, "gplearn", of_gplearn), ("nguyen", args.seeds, "pyoperon", of_pyoperon),
            (str(held_out(args)), 1, "pyoperon", of_pyoperon))  # fmt: skip
    for suite, seeds, name, search in arms:
        rows = []
        try:
            for seed in range(seeds):
                for problem in problems(suite, seed, 0.0):
                    start = time.process_time()
                    with warnings.catch_warnings(), np.errstate(all="ignore"):
                        warnings.simplefilter("ignore")
                        predict = search(problem.X, problem.y, seed, args.seconds)
                        val, wide = (fvu(y, predict(X)) for X, y in ((problem.X_val, problem.y_val),
                                                                     (problem.X_wide, problem.y_wide)))  # fmt: skip
                    rows.append(dict(vnrr=val <= SOLVED, recovered=val <= SOLVED and wide <= SOLVED, r2=1 - val,
                                     cpu_seconds=time.process_time() - start))  # fmt: skip
        except ImportError:
            yield dict(figure=f"{NAMES.get(suite, HELD_OUT)}, {name}", peer=f"pip install {name}", target="")
            continue
        yield shares(args, suite, rows, name, "")


def shares(args, suite, rows, arm, target):
    """A figure of runs: dicts with recovered, vnrr, r2, cpu_seconds."""
    share = {key: 100 * statistics.mean(bool(row.get(key)) for row in rows) for key in ("recovered", "vnrr")}
    close = 100 * statistics.mean((row.get("r2") or 0) > 0.999 for row in rows)
    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    spread = f"vNRR {share['vnrr']:.1f} %, R2 > 0.999 {close:.1f} %, median {seconds:.1f} CPU s"
    name = f"{NAMES.get(suite, HELD_OUT)}, {len(rows)} runs of {args.seconds} s, % recovered, {arm}"
    return dict(figure=name, ours=round(share["recovered"], 1), target=target, spread=spread)


def held_out(args):
    """Folder of 100 skeletons that training never draws."""
    pool = args.out.parent / "work" / "sr-pool"
    if not (pool / "skeletons.npz").exists():
        words = f"prepare_data.py generate-skeleton-pool -c configs/sr-cpu/skeleton_pool_val.yaml -o {pool} -s 100"
        subprocess.run([sys.executable, *words.split()], check=True, cwd=HERE.parent, stdout=subprocess.DEVNULL)
    return pool


def solved(args, suite, name, flags):
    """Rows of `generate.py formula --suite`."""
    out = args.out.parent / "work" / f"sr-{name}.jsonl"
    words = f"generate.py formula {flags} --suite {suite} --out {out}"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, *words.split()], check=True, cwd=HERE.parent, **quiet)
    return [json.loads(line) for line in out.read_text().splitlines()]


def suite(args, name, more, seeds, target):
    """Shares of problems found in --seconds each: by the search without a network, and with the one of --model."""
    arms = {"without the network": "--method prior"} | ({"network": f"--model {args.model}"} if args.model else {})
    for arm, flags in arms.items():
        flags = f"{flags} {more} --seeds {seeds} --max_seconds {args.seconds}"
        rows = solved(args, name, f"{Path(str(name)).name}-{arm.split()[0]}", flags)
        yield shares(args, name, rows, arm, target)


def nguyen(args):
    return suite(args, "nguyen", "", args.seeds, ">= 75")


def feynman(args):
    return suite(args, "feynman", "--max_variables 3", min(3, args.seeds), ">= 60")


def fastsrb(args):
    return suite(args, "fastsrb", "--max_variables 3", min(3, args.seeds), ">= 25")


def skeletons(args):
    return suite(args, held_out(args), "", 1, ">= 75")


def noisy(args):
    """Nguyen with noise on the points that are fitted: found as exactly as the noise allows (nNRR)."""
    arm, flags = ("network", f"--model {args.model}") if args.model else ("without the network", "--method prior")
    for noise in (0.001, 0.01, 0.1):
        more = f"{flags} --noise {noise} --seeds {args.seeds} --max_seconds {args.seconds}"
        rows = solved(args, "nguyen", f"noise-{arm.split()[0]}-{noise}", more)
        share = {key: 100 * statistics.mean(bool(row.get(key)) for row in rows) for key in ("nnrr", "vnrr")}
        yield dict(figure=f"nguyen, noise {noise:g}, {len(rows)} runs of {args.seconds} s, nNRR %, {arm}",
                   ours=round(share["nnrr"], 1), target="", spread=f"vNRR {share['vnrr']:.1f} %")  # fmt: skip


def candidates(args):
    """Held-out skeletons by candidates alone, nothing bred or summed: what the network reads off the points."""
    arms = [("prior", "--method prior", n) for n in (128, 512, 1024, 5000)]
    arms += [("network", f"--model {args.model}", n) for n in (128, 512)] if args.model else []
    for arm, flags, choices in arms:
        words = f"{flags} --evolve 0 --max_seconds 0 --choices {choices}"
        rows = solved(args, held_out(args), f"pool-{arm}-{choices}", words)
        found = shares(args, "pool", rows, "", "")
        yield found | dict(figure=f"{len(rows)} held-out skeletons, % recovered, {choices} candidates of {arm} alone")


def swapped(args):
    """What the network reads off the points: its encoder is given those of the problem, or those of the next one."""
    if not args.model:
        return
    model = load_model(args.model)
    pool = PoolConfig(operators=tuple(model.alphabet.operators), variables=tuple(model.alphabet.variables))
    alike = {}  # problems of as many variables: the others' formulas could not be written
    for problem in problems(str(held_out(args)), 0, 0.0):
        alike.setdefault(problem.X.shape[1], []).append(problem)
    recovered = []
    for turn in (0, 1):
        pairs = [(part[i], part[(i + turn) % len(part)]) for part in alike.values() for i in range(len(part))]
        found = []
        for problem, shown in pairs:
            torch.manual_seed(0)
            network = Network(model, shown.X, shown.y, max_points=64, temperature=1.0, top_k=0, top_p=1.0, max_len=64)
            best, _ = find_formula(network, problem.X, problem.y, alphabet=model.alphabet, pool=pool,
                                   rng=np.random.default_rng((0, 0)), evolve=0)  # fmt: skip
            with np.errstate(over="ignore"):
                found.append(bool(best) and score(model.alphabet, best[0], problem)["recovered"])
        recovered.append(100 * statistics.mean(found))
    name = f"{len(found)} held-out skeletons, % recovered, 512 candidates of the network off points of another"
    yield figure(f"{name} problem, against their own", "<= 0.2", [recovered[::-1]])


ROWS = dict(data=data, simplify=simpler, refine=fits, nguyen=nguyen, skeletons=skeletons, feynman=feynman,
            fastsrb=fastsrb, noise=noisy, candidates=candidates, swapped=swapped,
            peers=peers)  # fmt: skip
WITH_MODEL = ("nguyen", "skeletons", "feynman", "fastsrb", "noise", "candidates", "swapped")


def main(argv=None):
    parser = command_line(__doc__, ROWS, "sr")
    add = parser.add_argument
    add("--model", default="", help="folder of a model of train_sr.py")
    for name, default in dict(times=7, formulas=200, seeds=3, seconds=10).items():
        add(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    args.threads = 1
    torch.set_num_threads(1)
    measure(args, ROWS, lambda row: f" --model {args.model}" * bool(args.model and row in WITH_MODEL))


if __name__ == "__main__":
    main()
