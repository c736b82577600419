"""`generate.py formula`: a formula for a user's table, or how often those of a test set are found."""

import csv
import io
import json
import statistics
import sys
import time

import numpy as np
import torch

from data_utils.config import at_least
from data_utils.errors import UsageError
from data_utils.files import begins, check_replaceable, is_marked, make_room, write_atomic
from data_utils.formulas.expressions import format_formula
from data_utils.formulas.holdout import hold_out
from data_utils.formulas.model_files import load_model
from data_utils.formulas.problems import problems, read_table, score, terms
from data_utils.formulas.search import Network, Prior, find_formula, predict
from data_utils.formulas.skeletons import PoolConfig, check_pool
from data_utils.hardware import open_device
from models.formula_model import check_sampling

# of the files that write_rows makes: candidates of a table, runs of a suite
STARTS = b"rank,formula,prefix,constants,", b"suite,name,seed,noise,", b'{"rank": 1, "formula": ', b'{"suite": '


def find(cfg):
    """Answer one call of the command: cfg has the fields of generate.FormulaConfig."""
    at_least(cfg, 1, "choices", "restarts", "top", "seeds", "max_points", "beam_width")
    at_least(cfg, 0, "parsimony", "max_seconds", "noise", "complexity", "seed", "max_variables", "evolve")
    if not cfg.evolve <= 1:
        raise UsageError(f"--evolve {cfg.evolve}: expected a share, 0 to 1")
    if bool(cfg.data) == bool(cfg.suite):
        raise UsageError("give --data FILE.csv, or --suite nguyen")
    if cfg.method != "prior" and not cfg.model:
        raise UsageError("--model FOLDER is missing\ntry: --model models/ansr-models/sr-cpu, or --method prior")
    inputs = [cfg.data, *cfg.suite]
    check_replaceable(cfg.out, cfg.fresh, made_here, inputs=inputs)
    check_replaceable(cfg.plot, cfg.fresh, is_marked, flag="--plot", inputs=inputs)
    device = open_device(cfg.device)
    model = load_model(cfg.model).to(device) if cfg.model else None
    if model and cfg.max_len > model.max_seq_len:
        raise UsageError(f"--max_len {cfg.max_len}: the model was built for at most {model.max_seq_len}")
    pool = PoolConfig(**dict(operators=tuple(model.alphabet.operators), variables=tuple(model.alphabet.variables))
                      if model else {})  # fmt: skip
    alphabet = model.alphabet if model else check_pool(pool)
    return (solve if cfg.data else measure)(cfg, model, alphabet, pool)


def search(cfg, model, alphabet, pool, X, y, rng, names=(), held=None):
    """Candidates for y = f(X), best first, and how many were tried."""
    prior = Prior(alphabet, pool, X.shape[1], held)
    propose = prior
    if cfg.method != "prior":
        prompt, numbers = prompt_of(cfg, alphabet, names)
        sampling = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
        width = cfg.beam_width if cfg.method == "beam" else 0
        try:
            model.room(cfg.max_len, prompt)
            if not width:
                check_sampling(**sampling)
        except ValueError as e:
            raise UsageError(f"--{e}") from e
        propose = Network(model, X, y, max_points=cfg.max_points, prompt=prompt, numbers=numbers, width=width,
                          max_len=cfg.max_len, **sampling)  # fmt: skip
    return find_formula(
        propose, X, y, alphabet=alphabet, pool=pool, rng=rng, prior=prior, choices=cfg.choices, evolve=cfg.evolve,
        restarts=cfg.restarts, parsimony=cfg.parsimony, max_seconds=cfg.max_seconds, refiner=cfg.refiner, rank=cfg.rank,
    )  # fmt: skip


def prompt_of(cfg, alphabet, names):
    """Ids of the prompt that the flags ask for, and a number for each; two empty lists without one."""
    tagged = dict(allowed_term=cfg.allowed_terms, include_term=cfg.include_terms, exclude_term=cfg.exclude_terms)
    words = [["<complexity>", "<float>", "</complexity>"]] * bool(cfg.complexity)
    for tag, texts in tagged.items():
        words += [[f"<{tag}>", *alphabet.decode(term), f"</{tag}>"] for term in terms(alphabet, texts, list(names))]
    if not words:
        return [], []
    words = ["<prompt>", *(word for part in words for word in part), "</prompt>"]
    missing = [word for word in words if word not in alphabet.ids]
    if missing:
        raise UsageError(f"the model's tokenizer has no {missing[0]}: it was trained without prompts")
    return alphabet.encode(words), [float(cfg.complexity) if word == "<float>" else 0.0 for word in words]


def solve(cfg, model, alphabet, pool):
    """Print the best formula of a table to stdout, the other candidates and the time to stderr."""
    X, y, names, target, dropped = read_table(cfg.data, cfg.target, len(alphabet.variables))
    if dropped:
        print(f"{cfg.data}: {dropped} rows with nan or inf left out", file=sys.stderr)
    if np.ptp(y) == 0:
        print(f"{target} = {y[0]:.{cfg.precision}g}")
        return {}
    start = time.monotonic()
    found, tried = search(cfg, model, alphabet, pool, X, y, np.random.default_rng(cfg.seed), names)
    if not found:
        raise UsageError(f"none of {tried} candidates fits {cfg.data}\ntry: more --choices, or --max_seconds 60")
    texts = [format_formula(alphabet.decode(c.prefix), c.constants, names, cfg.precision) for c in found]
    print(f"{target} = {texts[0]}")
    print(f"{'FVU':>9} {'R2':>9} {'length':>6} {'score':>7}  formula", file=sys.stderr)
    for candidate, text in list(zip(found, texts, strict=True))[: cfg.top]:
        numbers = f"{candidate.fvu:9.2e} {1 - candidate.fvu:9.6f} {candidate.length:6} {candidate.score:7.2f}"
        print(f"{numbers}  {text}", file=sys.stderr)
    seconds = time.monotonic() - start
    print(f"{tried} candidates, {seconds:.1f} s", file=sys.stderr)
    rows = [
        dict(rank=i + 1, formula=text, prefix=" ".join(alphabet.decode(c.prefix)), constants=c.constants,
             length=c.length, fvu=c.fvu, r2=1 - c.fvu, score=c.score, seconds=round(seconds, 2))
        for i, (c, text) in enumerate(zip(found, texts, strict=True))
    ]  # fmt: skip
    write_rows(cfg.out, rows)
    if cfg.plot:
        from data_utils.formulas.figures import plot_fit

        plot_fit(X, y, predict(alphabet, found[0], X), names, target, f"{target} = {texts[0]}", cfg.plot)
    return {}


def measure(cfg, model, alphabet, pool):
    """Search the problems of the suites, print a row each and the shares that were solved."""
    held, rows = hold_out(pool), []
    for suite in cfg.suite:
        for seed in range(cfg.seeds):
            most = min(cfg.max_variables or len(alphabet.variables), len(alphabet.variables))
            for problem in problems(suite, seed, cfg.noise, most):
                rng, wall, cpu = np.random.default_rng((cfg.seed, seed)), time.monotonic(), time.process_time()
                torch.manual_seed(seed)
                found, tried = search(cfg, model, alphabet, pool, problem.X, problem.y, rng, held=held)
                spent = dict(seconds=time.monotonic() - wall, cpu_seconds=time.process_time() - cpu, candidates=tried)
                row = dict(suite=suite, name=problem.name, seed=seed, noise=cfg.noise, method=cfg.method) | spent
                if found:
                    row |= score(alphabet, found[0], problem)
                    row["formula"] = format_formula(
                        alphabet.decode(found[0].prefix), found[0].constants, None, cfg.precision
                    )
                rows.append(row)
                verdict = "recovered" if row.get("recovered") else "fits" if row.get("vnrr") else ""
                words = f"{problem.name:14} seed {seed} FVU {row.get('fvu_val', np.inf):8.1e} {verdict:9}"
                print(f"{words} {row['seconds']:5.1f} s  {row.get('formula', '')[:90]}", file=sys.stderr, flush=True)
        own = [row for row in rows if row["suite"] == suite]
        shares = {
            name: 100 * statistics.mean(bool(row.get(name)) for row in own) for name in ("vnrr", "recovered", "nnrr")
        }
        good = 100 * statistics.mean(row.get("r2", 0) > 0.999 for row in own)
        spent = {name: statistics.median(row[name] for row in own) for name in ("seconds", "cpu_seconds", "candidates")}
        noisy = f", nNRR {shares['nnrr']:.1f} %" * bool(cfg.noise)
        print(f"{suite}, {len(own)} runs: vNRR {shares['vnrr']:.1f} %, recovered {shares['recovered']:.1f} %{noisy}, "
              f"R2 > 0.999 {good:.1f} %; median {spent['seconds']:.1f} s, {spent['cpu_seconds']:.1f} CPU s, "
              f"{spent['candidates']:.0f} candidates", flush=True)  # fmt: skip
    write_rows(cfg.out, rows)
    return dict(rows=rows)


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
