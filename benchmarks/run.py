"""Run benchmarks one after the other, each in its own process; write a page of all figures and a picture of it.

python benchmarks/run.py                          # all at full size, many hours on two cores
python benchmarks/run.py --only formulas,sudoku   # some of them, each at full size
python benchmarks/run.py --only ""                # none: only write the page from what was measured
python benchmarks/run.py --quick                  # all at toy size, in minutes: only shows that they run

Writes README.md and results.png in benchmarks/results from the JSON there; --quick has JSON, page and picture of its
own in benchmarks/work/quick. A benchmark that fails becomes a line of the page, the others go on, and the status is 1
at the end. Full size needs what the docs prepare: data/ with its tokenizers, scripts/experts.sh,
data/pythia_events.npz, data/gsm8k and the model of configs/sr-cpu. A benchmark that lacks its input fails at once and
names it.
"""

import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_utils.config import from_cli
from data_utils.errors import DataError, UsageError
from data_utils.launch import launch

QUICK = Path("benchmarks/work/quick")  # of the repo; emptied first, since finished runs are only read again
SMOKE = f"train_expert.py --config configs/expert/smoke.yaml --data_dir {QUICK}/data --max_steps 8 --expert"
ROUTER = f"--arms router,control,store --experts {QUICK}/experts --data_dir {QUICK}/data --seeds 1 --threads 1 "
ROUTER += "--steps 2 --batch 16 --val_windows 16 --vectors 500"
DIFFUSER = f"--data_dir {QUICK}/data --work {QUICK}/diffuser --seconds 1 --transformer_seconds 1 --steps 2 "
DIFFUSER += "--arms ce_warm masked_warm"
LOSS = "--width 192 --layers 4 --batch 4 --length 256 --tokens 400000 --lr 0.002"
EXPERTS = "speed,memory,scan,generation,tokenizing,latent,store"
SUDOKU = "sums,sudoku,givens,ablate,halting,failures"
BENCHMARKS = {  # module: (title, flags of each run at full size, flags at toy size)
    "speed.experts": (
        "Language-model experts",
        [f"--rows {EXPERTS} --threads 1", f"--rows loss --threads 1 {LOSS}"],
        f"--quick --threads 1 --data_dir {QUICK}/data --tokenizer bytes",
    ),
    "quality.diffuser": ("Text of the diffuser", ["", "--seconds 600 --arms ce_warm masked_warm"], DIFFUSER),
    "quality.router": ("Router over frozen experts", [""], ROUTER),
    "speed.hrm": ("Recursive reasoning: speed", [""], "--quick --threads 1 --times 1"),
    "quality.sudoku": (
        "Recursive reasoning: quality",
        [f"--rows {SUDOKU}", "--rows text,moments --threads 1 --gsm8k data/gsm8k"],
        f"--quick --threads 1 --rows sums --seeds 1 --home {QUICK}/sudoku",
    ),
    "quality.formulas": (
        "Symbolic regression",
        ["--model models/ansr-models/sr-cpu"],
        "--quick --rows data,simplify,refine,nguyen",
    ),
    "quality.laws": ("Formulas of measurements", [""], "--quick"),
    "speed.autoencoder": ("Autoencoders of particle events: speed", ["--threads 1"], "--quick --threads 1"),
    "quality.autoencoder": (
        "Autoencoders of particle events: quality",
        ["--data data/pythia_events.npz --seeds 3"],
        f"--quick --threads 1 --home {QUICK}/autoencoder",
    ),
    "speed.pictures": ("Pictures: speed", [""], "--quick --threads 1"),
    "quality.pictures": ("Pictures: quality", [""], f"--quick --threads 1 --home {QUICK}/pictures"),
    "quality.puzzles": ("Hard puzzles, official code beside", [""], f"--quick --threads 1 --home {QUICK}/puzzles"),
    "speed.busy": ("Beside busy processes", [""], "--quick --rows expert"),
    "gpu_check": ("On a GPU", [""], "--device cpu --tiny"),
    "quality.pretrained": ("Models that come with the repo", [""], "--quick --threads 1"),
    "speed.preparation": ("Data preparation", ["--times 2"], "--quick"),
    "faults": ("Faults", ["", "--soak", "--flips", "--start"], "--rows 2,9,30 --scripts expert"),
}
PREPARED = [  # data and experts of the toy size
    f"prepare_data.py expert --toy --data_dir {QUICK}/data",
    f"prepare_data.py tokenizer --data_dir {QUICK}/data --vocab_size 2048 --out {QUICK}/data/bpe2048.json",
    f"{SMOKE} transformer --checkpoint_dir {QUICK}/experts",
    f"{SMOKE} state_space --checkpoint_dir {QUICK}/experts",
    f"{SMOKE} diffuser --checkpoint_dir {QUICK}/experts --transformer_ckpt {QUICK}/experts/transformer_expert.pt",
]


@dataclass
class Config:
    only: str = ",".join(BENCHMARKS)  # speed.experts, or experts, or speed; comma separated; "" = only write the page
    quick: bool = False  # toy sizes: only shows that all of them run
    out: str = ""  # page, its picture beside it; "" = README.md in benchmarks/results, with --quick in work/quick


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

from benchmarks.misses import MISSES
from benchmarks.report import RESULTS, ROOT, WORK, load, results_file
from data_utils.files import write_atomic

# --- targets ----------------------------------------------------------------------------------
NUMBER = r"(-?\d+(?:\.\d+)?(?: / \d+)?)"


def bounds(clause):
    """Parse a clause of a target -> (quantity, low, high, strict), or None if it is words.

    quantity: 'ours', 'ratio', 'less' (baseline - ours), or '': the ratio if there is one, else ours.
    """
    clause = clause.removesuffix(" (stretch)")
    if match := re.fullmatch(rf"within {NUMBER} %", clause):
        share = float(match[1]) / 100
        return "ratio", 1 - share, 1 + share, False
    if clause == "above":
        return "less", -math.inf, 0.0, True
    match = re.fullmatch(rf"(ours |ratio |lower by )?(>=|<=|>|<)? ?{NUMBER}(?: to {NUMBER})?( x)?", clause)
    if not match:
        return None
    quantity, sign, low, high, times = match.groups()
    low, high = (number and fraction(number) for number in (low, high))
    quantity = {"lower by ": "less", None: "ratio" if times else ""}.get(quantity, (quantity or "").strip())
    if not sign:
        return quantity, low, low if high is None else high, False
    low, high = (low, math.inf) if sign[0] == ">" else (-math.inf, low)
    return quantity, low, high, sign in ("<", ">")


def fraction(text):
    """Return the value of '3' or '160 / 768'."""
    number, _, divisor = text.partition(" / ")
    return float(number) / float(divisor or 1)


def judged(figure):
    """Return whether a figure meets its target, and how many times better it is than it must be (1: just so).

    (None, None) for a figure without target or value, with a target in words, or with a ratio target and no baseline.
    The times are of value and bound; for a target with two bounds, of their half distance and the value's distance
    from their middle. Of several clauses the worst counts.
    """
    clauses = re.split("[,;] ", figure.get("target") or "")
    ours, ratio, baseline = (leading_number(figure.get(name)) for name in ("ours", "ratio", "baseline"))
    values = dict(ours=ours, ratio=ratio, less=None if None in (ours, baseline) else baseline - ours)
    verdicts = []
    for clause in clauses:
        parsed = bounds(clause)
        if not parsed or not parsed[0] and missing(figure):
            return None, None
        quantity, low, high, strict = parsed
        value = values[quantity or ("ratio" if ratio is not None and len(clauses) == 1 else "ours")]
        if value is None:
            return None, None
        met = low < value < high if strict else low <= value <= high
        verdicts.append((met, times_better(value, low, high, met)))
    return all(met for met, _ in verdicts), min(times for _, times in verdicts)


def times_better(value, low, high, met):
    if low == high:
        if met:
            return 1.0
        return value / low if low > 0 else 0.0
    if -math.inf < low and high < math.inf:
        return (high - low) / 2 / max(abs(value - (low + high) / 2), 1e-9)
    at_most = low == -math.inf
    bound = high if at_most else low
    if bound < 0:  # how far below 0 counts, so mirror both
        bound, value, at_most = -bound, max(0.0, -value), not at_most
    above, below = (bound, value) if at_most else (value, bound)
    return max(above, 0.0) / below if below > 0 else math.inf


def missing(figure):
    """Return the command that installs a baseline which was missing, else ''."""
    baseline = figure.get("baseline")
    return baseline if isinstance(baseline, str) and leading_number(baseline) is None else ""


def leading_number(value):
    match = re.match(r"-?\d+(\.\d+)?(e[-+]?\d+)?", str(value))
    return float(match[0]) if match else None


# --- page -------------------------------------------------------------------------------------
COLUMNS = "title", "ours", "unit", "baseline", "ratio", "spread", "target"


def table(figures):
    lines = [f"| {' | '.join(['figure', *COLUMNS[1:]])} | met | command |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for f in figures:
        row = f | dict(baseline="missing") if missing(f) else dict(f)
        settings = ", ".join(f"{name} {value}" for name, value in f.get("settings", {}).items())
        row["spread"] = "; ".join(filter(None, [f.get("spread"), settings]))
        cells = [row.get(name, "") for name in COLUMNS] + [{True: "yes", False: "**no**", None: ""}[judged(f)[0]]]
        cells = [str(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} | `{f['command']}` |")
    return "\n".join(lines)


def reasons(figures):
    """Return lines that say why figures miss their targets, as far as MISSES knows it."""
    titles = {f["id"]: f["title"] for f in figures if judged(f)[0] is False}
    lines = []
    for ids, reason in MISSES.items():
        if short := [titles[id] for id in ids.split() if id in titles]:
            lines.append(f"- **{'; '.join(short)}**: {' '.join(reason.split())}")
    return ["Short of the target:", "", *lines, ""] if lines else []


def measured(results):
    """Say when and with what the rows of a JSON were measured; '' if it does not say."""
    rows = [row for row in results.values() if isinstance(row, dict) and "date" in row]
    if not rows:
        return ""
    dates, torches, threads = (sorted({str(row[name]) for row in rows}) for name in ("date", "torch", "threads"))
    cpus = sorted({", ".join(row["cpu"]) for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    thread_word = "thread" if threads == ["1"] else "threads"
    return (f"Measured {span} with torch {' or '.join(torches)}, {' or '.join(threads)} {thread_word}, "
            f"{' or '.join(cpus)}.")  # fmt: skip


def processor():
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def page(folder, failures, spent, picture, quick=False):
    """Render the figures of all JSON in `folder` -> Markdown, and the panels of `draw`.

    failures: {name: [(command, status, last line)]}, spent: {name: seconds}, of the run that has just ended.
    """
    sections, panels, met, targets = [], [], 0, 0
    for name, (title, runs, _) in BENCHMARKS.items():
        results = load(results_file(name, folder))
        figures = [f for row in results.values() for f in row.get("figures", [])]
        verdicts = [judged(f) for f in figures]
        bars = [(f["title"], times, verdict_text(f), good)
                for f, (good, times) in zip(figures, verdicts, strict=True) if good is not None]  # fmt: skip
        good_here = sum(good for *_, good in bars)
        met += good_here
        targets += len(bars)
        facts = [measured(results)]
        if bars:
            facts.append(f"{good_here} of {len(bars)} targets met.")
            panels.append((f"{title}: {good_here} of {len(bars)}", bars))
        if name in spent:
            facts.append(f"Took {spent[name]:.0f} s.")
        sections += [f"## {title}", "", " ".join(filter(None, facts)), ""]
        for command, status, line in failures.get(name, ()):
            sections += [f"**Failed** with status {status}: `{command}`: {line}", ""]
        absent = list(filter(None, map(missing, figures)))
        for install in dict.fromkeys(absent):
            sections += [f"The baseline of {absent.count(install)} of these figures was missing: `{install}`", ""]
        sections += [table(figures) if figures else f"Nothing measured yet: `{command_of(name, runs[0])}`", ""]
        sections += reasons(figures)
    head = ["# Figures", ""]
    if quick:
        head += ["**Toy sizes: these show that the benchmarks run, nothing else.**", ""]
    head += [f"Written {time.strftime('%Y-%m-%d')} by `python benchmarks/run.py` on {processor()}, {os.cpu_count()} "
             f"cores, Python {platform.python_version()}, torch {version('torch')}; each section says when its figures "
             f"were measured. {met} of {targets} targets are met; reasons for misses stand below the tables.", "",
             "The ratio is ours / baseline, or their difference where the figure says difference or minus. A target is "
             "one of the ratio if there is one, else of ours; targets in words are not judged.", ""]  # fmt: skip
    if panels:
        head += [f"![Figures as times of their target, by system]({picture})", ""]
    return "\n".join(head + sections), panels


def verdict_text(figure):
    """Return what stands beside a bar: the judged value, and the target."""
    target = figure["target"]
    of_ours = figure.get("ratio") is None or re.match("ours|lower|.*;", target)
    return f"{leading_number(figure['ours'] if of_ours else figure['ratio']):g} ({target})"


# --- picture ----------------------------------------------------------------------------------
LABEL = 60  # most characters of a title
REACH = 10  # times


def draw(panels, out):
    """Draw how many times better figures are than their targets to `out`: a line per system, and below it its misses.

    panels: [(title, [(figure, times, text beside it, whether the target is met)])]. The line of a system has a dot per
    figure, and a miss a bar from 1, which is just the target. Both end at REACH or 1 / REACH, where an arrow says that
    it goes beyond.
    """
    from matplotlib.ticker import NullFormatter

    from data_utils.figures import COLOURS, RED, SMALL, WIDTH, open_frame, plt, write_figure

    lines = []
    for title, dots in panels:
        lines.append((title, dots, ""))
        lines += [(shortened(dot[0]), [dot], dot[2]) for dot in dots if not dot[-1]]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.24 * len(lines) + 1), layout="constrained")
    for y, (_, dots, text) in enumerate(lines):
        for _, times, _, met in dots:
            end = min(max(times, 1 / REACH), REACH)
            marker = ">" if times > REACH else "<" if times < 1 / REACH else "o"
            ax.plot(end, y, marker, color=COLOURS[0] if met else RED, ms=7, alpha=0.6, mew=0)
        if text:
            ax.plot([1, end], [y, y], color=RED, lw=5, solid_capstyle="butt")
            ax.annotate(text, (1, y), (7, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.axvline(1, color="0.3", lw=0.8)
    ax.set_yticks(range(len(lines)), [label for label, *_ in lines], fontsize=SMALL)
    for label, (_, _, text) in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if text else "bold")
    ax.set(xscale="log", xlim=(0.8 / REACH, 1.25 * REACH), ylim=(len(lines) - 0.4, -0.6))  # the first on top
    ax.set_xticks([1 / REACH, 1, REACH], [f"1/{REACH}", "1", f"{REACH}"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    open_frame(ax, grid=False)
    figure.suptitle("figures as times of their target: blue meets it, red does not")
    write_figure(figure, out)


def shortened(name):
    """Return at most LABEL characters of a title: its beginning, and its end, which tells rows apart."""
    name = name.replace("`", "")
    if len(name) <= LABEL:
        return name
    return f"{name[: LABEL - 30].rpartition(' ')[0].rstrip(',')} … {name[-28:].partition(' ')[2]}"


# --- run --------------------------------------------------------------------------------------
def command_of(name, flags):
    module = name if name == "faults" else f"benchmarks.{name}"
    return f"python -m {module} {flags}".strip()


def run(command, log):
    """Run a python command in the root of the repo, its output appended to `log` -> status, last line, seconds."""
    start = time.monotonic()
    with open(log, "a") as file:
        words = [sys.executable, *shlex.split(command)[1:]]
        status = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1][-300:] if lines else "", time.monotonic() - start


def chosen(only):
    """Return the benchmarks that --only names, in their order there."""
    names = []
    for word in filter(None, only.split(",")):
        matches = [name for name in BENCHMARKS if word == name or word in name.split(".")]
        if not matches:
            raise UsageError(f"--only {word}: no such benchmark\ntry: some of {','.join(BENCHMARKS)}")
        names += matches
    return list(dict.fromkeys(names))


def main(cfg):
    names = chosen(cfg.only)
    folder = ROOT / QUICK if cfg.quick else RESULTS
    out = Path(cfg.out) if cfg.out else folder / "README.md"
    picture = out.with_name("results.png")
    logs = folder if cfg.quick else WORK / "logs"
    if cfg.quick and names:
        shutil.rmtree(folder, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    steps = []  # name, command
    if cfg.quick and names:
        steps += [("prepared", f"python {words}") for words in PREPARED]
    for name in names:
        if cfg.quick:
            steps.append((name, command_of(name, f"{BENCHMARKS[name][2]} --out {results_file(name, QUICK)}")))
        else:
            steps += [(name, command_of(name, flags)) for flags in BENCHMARKS[name][1]]
    failures, spent = {}, {}
    for number, (name, command) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {command}", flush=True)
        status, last, seconds = run(command, logs / f"{name}.log")
        spent[name] = spent.get(name, 0) + seconds
        print(f"    {f'FAILED with status {status}: {last}' if status else 'done'}, {seconds:.0f} s", flush=True)
        if status:
            failures.setdefault(name, []).append((command, status, last))
    text, panels = page(folder, failures, spent, picture.name, cfg.quick)
    if panels:
        draw(panels, picture)
    write_atomic(out, lambda file: file.write(text.encode()))
    print(out)
    if failures:
        raise DataError(f"{', '.join(failures)} failed: see {out} and {logs}/*.log")
    return {}


if __name__ == "__main__":
    launch(main, cfg)
