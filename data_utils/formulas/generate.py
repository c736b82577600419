"""`generate.py formula`: a formula for a user's table, or how often those of a test set are found."""

import csv
import io
import json
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from data_utils.advice import pasteable
from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.files import begins, check_replaceable, is_marked, make_room, write_atomic
from data_utils.formulas.answers import is_mean, search_formulas, to_answers
from data_utils.formulas.cells import read_new_rows
from data_utils.formulas.expressions import parse_formula
from data_utils.formulas.fit import wrap
from data_utils.formulas.formats import number_text, write_equation, write_formula
from data_utils.formulas.holdout import hold_out
from data_utils.formulas.model_files import PRETRAINED, load_model, model_folder, suited
from data_utils.formulas.problems import problems, score
from data_utils.formulas.scaling import decades, unscaled
from data_utils.formulas.score import Data, admissible
from data_utils.formulas.search import SCREENED, predict
from data_utils.formulas.skeletons import PoolConfig
from data_utils.formulas.tables import read_table
from data_utils.hardware import open_device
from models.formula_model import check_sampling

# of the files that write_rows makes: formulas of a table, runs of a suite
STARTS = b"rank,formula,prefix,constants,", b"suite,name,seed,noise,", b'{"rank": 1, "formula": ', b'{"suite": '
PROMPTS = "complexity", "allowed_terms", "include_terms"  # flags that only a network can follow
TICK = 0.5  # seconds between two looks of the bar at the clock
NO_FORMULA = "no formula explains y better than its mean"
BESIDE = 3  # formulas listed beside that
LARGE = 3.0  # residuals, in roundings of the table


def find(cfg, begin=None):
    """Answer one call of the command: cfg has the fields of generate.FormulaConfig.

    begin: time.monotonic() from which --max_seconds counts, None = now.
    """
    begin = time.monotonic() if begin is None else begin
    at_least(cfg, 1, "choices", "restarts", "top", "seeds", "max_points", "beam_width")
    at_least(cfg, 0, "parsimony", "max_seconds", "noise", "complexity", "seed", "max_variables", "evolve")
    at_least(cfg, 0, "max_length", "precision")
    if not cfg.evolve <= 1:
        raise UsageError(f"--evolve {cfg.evolve}: expected a share, 0 to 1")
    if bool(cfg.data) == bool(cfg.suite):
        raise UsageError("give --data FILE.csv, or --suite nguyen")
    if cfg.method in ("sampling", "beam") and not cfg.model:
        raise UsageError(f"--method {cfg.method}: --model FOLDER is missing\ntry: --method prior")
    inputs = [cfg.data, cfg.predict, *cfg.suite]
    check_replaceable(cfg.out, cfg.fresh, made_here, inputs=inputs)
    check_replaceable(cfg.plot, cfg.fresh, is_marked, flag="--plot", inputs=inputs)
    model = None
    if cfg.model and cfg.method != "prior":
        small = cfg.model == PRETRAINED and cfg.device == "auto"  # no GPU is worth the copies
        model = load_model(model_folder(cfg.model)).to(open_device("cpu" if small else cfg.device))
    if model and cfg.max_len > model.max_seq_len:
        raise UsageError(f"--max_len {cfg.max_len}: the model was built for at most {model.max_seq_len}")
    return solve(cfg, model, begin) if cfg.data else measure(cfg, model)


def search(cfg, model, X, y, rng, names, **settings):
    """Return what search_formulas does, with the settings of the command."""
    if model and cfg.method == "auto":
        model = suited(model, cfg.model, X.shape[1])
    prompted = [name for name in PROMPTS if getattr(cfg, name)]
    if prompted and not (model and knows_prompts(model_folder(cfg.model), model.alphabet)):
        raise UsageError(
            f"--{prompted[0]} needs a network that was trained with prompts; every method obeys --exclude_terms, "
            f"--operators and --max_length\ntry: without --{prompted[0]}"
        )
    network = network_settings(cfg, model, names) if model else {}
    return search_formulas(
        X, y, names, rng, model=model, network=network, operators=cfg.operators, exclude_terms=cfg.exclude_terms,
        longest=cfg.max_length, choices=cfg.choices, evolve=cfg.evolve, restarts=cfg.restarts, parsimony=cfg.parsimony,
        refiner=cfg.refiner, **settings,
    )  # fmt: skip


# ---- what the network is told


def network_settings(cfg, model, names):
    """Return the settings with which the network proposes. Raises UsageError, naming the flag, for impossible ones."""
    prompt, numbers = prompt_of(cfg, model.alphabet, names)
    sampling = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    width = cfg.beam_width if cfg.method == "beam" else 0
    try:
        model.room(cfg.max_len, prompt)
        if not width:
            check_sampling(**sampling)
    except ValueError as e:
        raise UsageError(f"--{e}") from e
    return dict(max_points=cfg.max_points, prompt=prompt, numbers=numbers, width=width, max_len=cfg.max_len, **sampling)


def prompt_of(cfg, alphabet, names):
    """Return the ids of the prompt that the flags ask for, and a number for each; two empty lists without one."""
    tagged = dict(allowed_term=cfg.allowed_terms, include_term=cfg.include_terms)
    tagged["exclude_term"] = cfg.exclude_terms if knows_prompts(model_folder(cfg.model), alphabet) else ()
    words = []
    if cfg.complexity:
        words += ["<complexity>", "<float>", "</complexity>"]
    for tag, texts in tagged.items():
        for text in texts:
            term = term_of(alphabet, text, names)
            if term is not None:
                words += [f"<{tag}>", *term, f"</{tag}>"]
            elif tag != "exclude_term":
                raise UsageError(f"--{tag}s {text}: not a formula of {', '.join(names)} that the model's tokens spell")
    if not words:
        return [], []
    words = ["<prompt>", *words, "</prompt>"]
    return alphabet.encode(words), [float(cfg.complexity) if word == "<float>" else 0.0 for word in words]


def term_of(alphabet, text, names):
    """Return the tokens of a term that a user typed; None for one that the alphabet can't spell."""
    try:
        prefix = parse_formula(text, names)[0]
    except DataError:
        return None
    return prefix if all(token in alphabet.ids for token in prefix) else None


def knows_prompts(folder, alphabet):
    """Return whether a network was trained with prompts: it has their tokens, and its bundle doesn't say otherwise."""
    if any(token not in alphabet.ids for token in ("<prompt>", "</prompt>", "<float>", "<complexity>")):
        return False
    try:
        bundle = yaml.safe_load(Path(folder, "dataset_train.yaml").read_text(encoding="utf-8"))
        return bool(bundle.get("prompt_probability", 0))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return True


# ---- a table


class Bar:
    """`with Bar(...) as bar:` seconds, best formula so far and its R2, on a terminal."""

    def __init__(self, X, y, names, target, seconds):
        self.powers, self.power, self.names, self.target = decades(X), int(decades(y)), names, target
        self.legible = X.shape[1] <= SCREENED  # else the search renames columns
        shape = "{n:.0f}/{total:.0f} s |{bar:12}| {desc}" if seconds else "{elapsed} {desc}"
        self.bar = tqdm(total=seconds or None, bar_format=shape, leave=False, disable=not sys.stderr.isatty())
        self.done, self.begin = threading.Event(), time.monotonic()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        if not self.bar.disable:
            self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()
        self.bar.close()

    def _tick(self):
        while not self.done.wait(TICK):
            spent = time.monotonic() - self.begin
            self.bar.n = min(spent, self.bar.total) if self.bar.total else spent
            self.bar.refresh()

    def __call__(self, alphabet, best, seconds):
        """Show a Candidate of the search, which is about scaled columns."""
        if self.bar.disable:
            return
        words = f"R2 {1 - best.fvu:.6f}"
        if self.legible:
            prefix = wrap(alphabet.decode(best.prefix))
            raw = unscaled(prefix, best.constants, self.powers, self.power, alphabet.operators)
            if raw is not None:
                numbers = [number_text(value, 4) for value in raw[1]]
                words += f"  {self.target} = {write_formula(raw[0], numbers, self.names)}"
        self.bar.set_description_str(words, refresh=False)


def solve(cfg, model, begin):
    """Print the best formula of a table to stdout, all that are worth a look and the time to stderr."""
    table = read_table(cfg.data, cfg.target, cfg.columns, cfg.ignore, cfg.sigma)
    for note in table.notes:
        print(pasteable(f"{cfg.data}: {note}"), file=sys.stderr)
    X, y, names, target = table.X, table.y, list(table.names), table.target
    new = Predictions(cfg, names, target) if cfg.predict else None
    if np.ptp(y) == 0:
        print(write_equation(["<constant>"], [number_text(y[0])], names, target, cfg.format))
        return {}
    spent = time.monotonic() - begin
    seconds = max(cfg.max_seconds - spent, cfg.max_seconds / 2)  # reading a long table counts too
    with Bar(X, y, names, target, seconds) as bar:
        alphabet, formulas, tried = search(cfg, model, X, y, np.random.default_rng(cfg.seed), names, sigma=table.sigma,
                                           half=table.digits_y, max_seconds=seconds, watch=bar)  # fmt: skip
    answers = to_answers(alphabet, formulas, Data(X, y, table.sigma, table.digits_y), cfg.precision)
    best = answers[0]
    if is_mean(best):
        print(f"{NO_FORMULA} ({write_equation(best.prefix, best.numbers, names, target)})", flush=True)
    else:
        print(write_equation(best.prefix, best.numbers, names, target, cfg.format), flush=True)
    most = BESIDE + 1 if is_mean(best) else cfg.top
    listed = [answer for i, answer in enumerate(answers) if i < most or answer.front and not is_mean(best)]
    print("        R2     bits length  formula (* on the Pareto front of R2 and length)", file=sys.stderr)
    for answer in listed:
        text = write_formula(answer.prefix, answer.numbers, names)
        mark = "*" if answer.front else " "
        print(f"{mark} {1 - answer.fvu:8.6f} {answer.bits:8.1f} {answer.length:6}  {text}", file=sys.stderr)
    if len(answers) == 1:
        more = f"\ntry: --max_seconds {3 * cfg.max_seconds:g}" if cfg.max_seconds else ""
        print(pasteable(f"no other formula was ranked in time{more}"), file=sys.stderr)
    if not is_mean(best) and (times := roundings(alphabet, best, table)) > LARGE:
        print(f"residuals are {times:.0f} times the rounding of the table: noise, or another law", file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"{len(y)} rows, {tried} candidates, {seconds:.1f} s", file=sys.stderr)
    rows = [
        dict(rank=i + 1, formula=write_formula(a.prefix, a.numbers, names), prefix=" ".join(a.prefix),
             constants=a.constants, length=a.length, bits=a.bits, fvu=a.fvu, r2=1 - a.fvu, front=a.front,
             seconds=round(seconds, 2))
        for i, a in enumerate(answers)
    ]  # fmt: skip
    write_rows(cfg.out, rows)
    if cfg.plot:
        from data_utils.formulas.figures import plot_fit

        title = write_equation(best.prefix, best.numbers, names, target)
        plot_fit(X, y, predict(alphabet, best, X), labels(table), title, cfg.plot, answers, table.sigma)
    if new:
        new.write(lambda x: predict(alphabet, best, x))
    return {}


def roundings(alphabet, formula, table):
    """Return the residuals of a formula in units of what the rounding of x and y makes of it; 0 if none is known."""
    X, variance = table.X, np.square(table.digits_y) / 3
    with np.errstate(all="ignore"):
        for j in np.flatnonzero(table.digits_X.any(0)):
            step = np.zeros(X.shape)
            step[:, j] = table.digits_X[:, j]
            difference = predict(alphabet, formula, X + step) - predict(alphabet, formula, X - step)
            variance = variance + np.square(difference) / 12
        ratios = np.square(predict(alphabet, formula, X) - table.y) / variance
    ratios = ratios[np.isfinite(ratios) & (table.digits_y > 0)]
    return float(np.sqrt(ratios.mean())) if len(ratios) else 0.0


def labels(table):
    """Return the names of the columns x and of y with their units, as a figure shows them."""
    names = [*table.names, table.target]
    return [f"{name} ({table.units[name]})" if table.units.get(name, name) not in name else name for name in names]


class Predictions:
    """A table with the columns x of a formula, and the file beside it that gets one column more."""

    def __init__(self, cfg, names, target):
        """Read the table of --predict. Raises UsageError where its neighbour is another's file."""
        self.table = read_new_rows(cfg.predict, names)
        path = Path(cfg.predict)
        path = path.with_suffix("") if path.suffix in (".gz", ".bz2", ".xz") else path
        self.path = path.with_name(f"{path.stem}.predicted.csv")
        self.column = f"{target}_predicted"
        check_replaceable(self.path, cfg.fresh, self.made_here, flag="--predict", inputs=[cfg.data, cfg.predict])

    def text(self, rows):
        out = io.StringIO()
        csv.writer(out, delimiter=self.table.separator, lineterminator="\n").writerows(rows)
        return out.getvalue().encode("utf-8")

    def made_here(self, path):
        return begins(path, self.text([[*self.table.names, self.column]]))

    def write(self, predict):
        """Write the rows as they stand in the table, with predict(X (M, D)); nothing in rows that lack a number."""
        X = self.table.X
        complete = np.isfinite(X).all(1)
        values = np.full(len(X), np.nan)
        if complete.any():
            values[complete] = predict(X[complete])
        rows = [[*self.table.names, self.column]]
        for cells, value in zip(self.table.rows, values.tolist(), strict=True):
            text = number_text(value, 12) if np.isfinite(value) else ""
            rows.append([*cells, text.replace(".", self.table.mark)])
        make_room(self.path, self.made_here)
        write_atomic(self.path, lambda file: file.write(self.text(rows)))
        lacking = int((~np.isfinite(values)).sum())
        words = f", {lacking} of them without a value" if lacking else ""
        print(f"{shlex.quote(str(self.path))}: {len(X)} rows{words}", file=sys.stderr)


# ---- test sets


def measure(cfg, model):
    """Search the problems of the suites, print a row each and the shares that were solved."""
    rows = []
    held = hold_out(PoolConfig())
    asked = model and (cfg.model != PRETRAINED or cfg.method != "auto")
    most = min(cfg.max_variables or np.inf, len(model.alphabet.variables) if asked else np.inf)
    for suite in cfg.suite:
        for seed in range(cfg.seeds):
            for problem in problems(suite, seed, cfg.noise, 0 if most == np.inf else most):
                rng, wall, cpu = np.random.default_rng((cfg.seed, seed)), time.monotonic(), time.process_time()
                torch.manual_seed(seed)
                names = problem.formula.variables
                alphabet, formulas, tried = search(cfg, model, problem.X, problem.y, rng, names, held=held,
                                                   max_seconds=cfg.max_seconds)  # fmt: skip
                truth = problem.formula
                row = dict(suite=suite, name=problem.name, variables=len(names), seed=seed, noise=cfg.noise)
                row |= dict(method=method_of(cfg), admissible=admissible(truth.prefix, truth.values, problem.X))
                row |= dict(seconds=time.monotonic() - wall, cpu_seconds=time.process_time() - cpu, candidates=tried)
                if formulas:
                    best = formulas[0]
                    row |= score(alphabet, best, problem)
                    numbers = [number_text(value, cfg.precision or 6) for value in best.constants]
                    row["formula"] = write_formula(best.prefix, numbers, [f"x{i + 1}" for i in range(len(names))])
                rows.append(row)
                verdict = "recovered" if row.get("recovered") else "fits" if row.get("vnrr") else ""
                words = f"{problem.name:14} seed {seed} FVU {row.get('fvu_val', np.inf):8.1e} {verdict:9}"
                print(f"{words} {row['seconds']:5.1f} s  {row.get('formula', '')[:90]}", file=sys.stderr, flush=True)
        report(suite, [row for row in rows if row["suite"] == suite], cfg.noise)
    write_rows(cfg.out, rows)
    return dict(rows=rows)


def method_of(cfg):
    if cfg.method != "auto":
        return cfg.method
    return "sampling" if cfg.model else "prior"


def report(suite, rows, noise):
    """Print the shares of the runs of a suite that found what they should, and what a run took."""
    shares = {
        name: 100 * statistics.mean(bool(row.get(name)) for row in rows) for name in ("vnrr", "recovered", "nnrr")
    }
    good = 100 * statistics.mean(row.get("r2", 0) > 0.999 for row in rows)
    spent = {name: statistics.median(row[name] for row in rows) for name in ("seconds", "cpu_seconds", "candidates")}
    noisy = f", nNRR {shares['nnrr']:.1f} %" if noise else ""
    print(f"{suite}, {len(rows)} runs: vNRR {shares['vnrr']:.1f} %, recovered {shares['recovered']:.1f} %{noisy}, "
          f"R2 > 0.999 {good:.1f} %; median {spent['seconds']:.1f} s, {spent['cpu_seconds']:.1f} CPU s, "
          f"{spent['candidates']:.0f} candidates", flush=True)  # fmt: skip


# ---- files


def made_here(path):
    return begins(path, *STARTS)


def write_rows(path, rows):
    """Write dicts as csv or, by the name, jsonl; nothing for an empty name."""
    if not path:
        return
    text = io.StringIO()
    if path.endswith(".jsonl"):
        finite = [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in r.items()} for r in rows]
        text.writelines(json.dumps(row) + "\n" for row in finite)
    else:
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    make_room(path, made_here)
    write_atomic(path, lambda file: file.write(text.getvalue().encode("utf-8")))
