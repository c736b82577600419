"""Every benchmark, one after the other in a process of its own -> a page of all figures and a picture of it.

python benchmarks/run.py                      # all at full size, many hours on two cores
python benchmarks/run.py --only sr,hrm        # some of them, each at full size
python benchmarks/run.py --only ""            # none: only write the page from what was measured
python benchmarks/run.py --quick              # all at toy size, in minutes, only to see that they run

Writes results.md and results.png from the JSON beside each benchmark; --quick has JSON, page and picture of its own in
benchmarks/work/quick. A benchmark that fails is a line of the page, the others go on, and the status is 1 at the end.
Full size needs what the README prepares: data/ with its tokenizers, scripts/experts.sh, data/pythia_events.npz,
data/gsm8k and the model of configs/sr-cpu. What is missing fails at once and says what it wants.
"""

import math
import os
import platform
import re
import shlex
import shutil
import statistics
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

HERE = Path(__file__).resolve().parent
QUICK = Path("benchmarks/work/quick")  # of the repo; emptied first, since what is finished is only read again
SMOKE = f"train_expert.py --config configs/expert/smoke.yaml --data_dir {QUICK}/data --max_steps 8 --expert"
MLA = f"--arms router,control,store --experts {QUICK}/experts --data_dir {QUICK}/data --seeds 1 --threads 1 "
MLA += "--steps 2 --batch 16 --val_windows 16 --vectors 500"
HRM = "sums,sudoku,givens,ablate,halting,failures,step,generate"
SIZE = "--width 192 --layers 4 --batch 4 --length 256 --tokens 400000 --lr 0.002"
BENCHMARKS = dict(  # name of its JSON: (title, commands at full size, commands at toy size, which get --out)
    experts=(
        "Language-model experts",
        ["experts.py --rows speed,memory,scan,generation,tokenizing,latent,store --threads 1",
         f"experts.py --rows loss --threads 1 {SIZE}"],
        [f"experts.py --quick --threads 1 --data_dir {QUICK}/data --tokenizer bytes"],
    ),
    diffuser=(
        "Text of the diffuser",
        ["-m benchmarks.diffuser", "-m benchmarks.diffuser --seconds 600 --arms ce_warm masked_warm"],
        [f"-m benchmarks.diffuser --data_dir {QUICK}/data --work {QUICK}/diffuser --seconds 1 --transformer_seconds 1 "
         "--steps 2 --arms ce_warm masked_warm"],
    ),
    mla=("Router over frozen experts", ["-m benchmarks.mla"], [f"-m benchmarks.mla {MLA}"]),
    hrm=(
        "Recursive reasoning",
        [f"hrm.py --rows {HRM}", "hrm.py --rows text,moments --threads 1 --gsm8k data/gsm8k"],
        [f"hrm.py --quick --threads 1 --rows sums,step,generate --seeds 1 --times 1 --home {QUICK}/hrm"],
    ),
    sr=(
        "Symbolic regression",
        ["sr.py --model models/ansr-models/sr-cpu"],
        ["sr.py --rows data,simplify,refine,nguyen --times 1 --formulas 20 --seeds 1 --seconds 1"],
    ),
    ae_quality=(
        "Autoencoders of particle events: quality",
        ["ae_quality.py --data data/pythia_events.npz --seeds 3"],
        [f"ae_quality.py --quick --threads 1 --home {QUICK}/ae_quality"],
    ),
    ae_speed=(
        "Autoencoders of particle events: speed",
        ["ae_speed.py --threads 1"],
        ["ae_speed.py --quick --threads 1"],
    ),
    multimodal=("Pictures", ["multimodal.py"], [f"multimodal.py --quick --threads 1 --home {QUICK}/multimodal"]),
    busy=("Beside busy processes", ["busy.py"], ["busy.py --quick --rows expert"]),
    gpu_check=("On a GPU", ["gpu_check.py"], ["gpu_check.py --device cpu --tiny"]),
    prepare_data=("Data preparation", ["prepare_data.py --times 2"], ["prepare_data.py --mb 0.5 --times 1"]),
    faults=(
        "Faults",
        ["faults.py", "faults.py --soak", "faults.py --flips", "faults.py --start"],
        ["faults.py --rows 2,9,30 --scripts expert"],
    ),
)  # fmt: skip
PREPARED = [  # data and experts of the toy size
    f"prepare_data.py expert --toy --data_dir {QUICK}/data",
    f"prepare_data.py tokenizer --data_dir {QUICK}/data --vocab_size 2048 --out {QUICK}/data/bpe2048.json",
    f"{SMOKE} transformer --checkpoint_dir {QUICK}/experts",
    f"{SMOKE} state_space --checkpoint_dir {QUICK}/experts",
    f"{SMOKE} diffuser --checkpoint_dir {QUICK}/experts --transformer_ckpt {QUICK}/experts/transformer_expert.pt",
]


@dataclass
class Config:
    only: str = ",".join(BENCHMARKS)  # which to run, comma separated; "" = none, only the page is written
    quick: bool = False  # toy sizes: only to see that all of them run
    out: str = ""  # page, its picture beside it; "" = results.md in benchmarks, with --quick in benchmarks/work/quick


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

from benchmarks.report import load
from data_utils.files import write_atomic


# --- figures ----------------------------------------------------------------------------------
def of_mla(results):
    """Each arm of mla.json beside the best expert alone, the store beside the router without; ratio: difference."""
    results = results.get("mla", {})
    arms, command = {}, "python -m benchmarks.mla"
    for key, run in results.get("runs", {}).items():
        arm, seed = key.rsplit(" seed ", 1)
        arms.setdefault(arm, {})[seed] = run["val"]
    best = min(results.get("alone", {}).items(), key=lambda item: item[1], default=("", 0))
    pairs = [(arm, f"{best[0]} alone, the best expert", dict.fromkeys(found, best[1])) for arm, found in arms.items()]
    pairs += [("store", "the router without", arms["router"])] if {"store", "router"} <= arms.keys() else []
    for arm, beside, other in pairs:
        both = [(value, other[seed]) for seed, value in arms[arm].items() if seed in other]
        apart = [ours - peer for ours, peer in both]
        ours, peer = (_mean(values) for values in zip(*both, strict=True))
        target = "<= -0.02" if other is arms.get("router") else "<= -0.05" * (arm == "router")
        yield dict(figure=f"validation nats, {arm}, against {beside}, difference", ours=ours, peer=peer,
                   ratio=_mean(apart), spread=f"{min(apart):.4f} to {max(apart):.4f}, {_seeds(both)}",
                   target=target, command=command)  # fmt: skip


def of_diffuser(rows):
    """Judged nats of each text beside unigram text, those of ten minutes and more beside the masked control too."""
    groups = {}
    for row in rows:
        key = [row["name"], row.get("seconds", 0), row.get("sampler", ""), row.get("steps", 0), row["temperature"]]
        groups.setdefault(tuple(key), []).append(row)
    nll, varied = ({key: _mean([r[n] for r in found]) for key, found in groups.items()} for n in ("nll", "entropy"))
    unigram, real = (next((key for key in groups if key[0] == name), None) for name in ("unigram", "real text"))
    for (name, seconds, sampler, steps, temperature), found in groups.items():
        key, long = (name, seconds, sampler, steps, temperature), name.startswith("ce") and seconds >= 600
        made = " ".join([name, *([f"{seconds:g} s {sampler} {steps} steps"] if seconds else []), f"T {temperature:g}"])
        about = dict(command="python -m benchmarks.diffuser" + f" --seconds {seconds:g}" * bool(seconds))
        said = ", ".join(f"{n} {_mean([row[n] for row in found]):.2f}" for n in ("trigram", "entropy", "distinct_2"))
        about |= dict(ours=nll[key], spread=f"{said}; {_seeds(found)}")
        pairs = [("unigram text", unigram, "<= -1.5")]
        pairs += [("masked control", ("masked_warm", *key[1:]), "<= 0.4")] if long else []
        for called, other, target in pairs:
            if other in groups and other != key:
                apart = float(f"{nll[key] - nll[other]:.4g}")
                yield about | dict(figure=f"judged nats, {made}, minus {called}", peer=nll[other], ratio=apart,
                                   target=target if long and temperature == 1 else "")  # fmt: skip
        if long and temperature == 1:
            apart = float(f"{varied[key] - varied[real]:.4g}")
            yield about | dict(figure=f"entropy, {made}, minus real text",
                               ours=varied[key], peer=varied[real], ratio=apart, target="-0.3 to 0.3")  # fmt: skip


def of_faults(results):
    """Faults of faults.json: how many pairs of fault and script ended as they must, of each part, then row by row."""
    flags = dict(table="", soak=" --soak", flips=" --flips", start=" --start")
    for section, flag in flags.items():
        rows = [row for row in results.get(section, {}).get("rows", []) if row["outcome"] != "not run"]
        if rows:
            yield dict(figure=f"{section}: pairs of fault and script that did what they must", target=str(len(rows)),
                       ours=sum(row["outcome"] == "pass" for row in rows), spread=f"of {len(rows)}",
                       command=f"python benchmarks/faults.py{flag}")  # fmt: skip
    for section, flag in flags.items():
        groups = {}
        for row in results.get(section, {}).get("rows", []):
            groups.setdefault((row["row"], row["fault"]), []).append(row)
        for (number, fault), rows in groups.items():
            notes = [f"{row['script']}: {row['note']}" for row in rows if row["note"]]
            passed = sum(row["outcome"] == "pass" for row in rows)
            command = f"python benchmarks/faults.py{flag or f' --rows {number}'}"
            name = "row" if section == "table" else section
            yield dict(figure=f"{name} {number}, {fault}", ours=f"{passed} of {len(rows)} scripts", target="all",
                       spread="; ".join(notes), command=command)  # fmt: skip


def of_rows(results):
    for row in results.values():
        yield from row.get("figures", [])


READ = dict(mla=of_mla, diffuser=of_diffuser, faults=of_faults)


def _seeds(found):
    return f"{len(found)} seed{'s' * (len(found) > 1)}"


def _mean(values):
    return float(f"{statistics.mean(values):.5g}")


# --- targets ----------------------------------------------------------------------------------
NUMBER = r"(-?\d+(?:\.\d+)?(?: / \d+)?)"


def bounds(clause):
    """A clause of a target -> (what is bounded, low, high, whether the bounds are out), None if it is words.

    What is bounded is 'ours', 'ratio', 'less' (how much lower ours is than the peer) or '': the ratio if there is one.
    """
    clause = clause.removesuffix(" (stretch)")
    found = re.fullmatch(rf"(ours |ratio |lower by )?(>=|<=|>|<)? ?{NUMBER}(?: to {NUMBER})?( x)?", clause)
    if found:
        of, sign, low, high, times = found.groups()
        low, high = (n and math.prod(float(x) ** (-1) ** i for i, x in enumerate(n.split(" / "))) for n in (low, high))
        of = {"lower by ": "less", None: "ratio" if times else ""}.get(of, (of or "").strip())
        low, high = {">": (low, math.inf), "<": (-math.inf, low), None: (low, low if high is None else high)}[
            sign and sign[0]
        ]
        return of, low, high, sign in ("<", ">")
    if found := re.fullmatch(rf"within {NUMBER} %", clause):
        return "ratio", 1 - float(found[1]) / 100, 1 + float(found[1]) / 100, False
    return ("less", -math.inf, 0.0, True) if clause == "above" else None


def judged(figure):
    """Whether a figure meets its target, and how many times better it is than it must be (1: just so).

    (None, None) for a figure without a target or value, with a target in words, or of a ratio to a peer that was not
    there. The times are of value and bound, or for a target with two bounds of their half distance and what the value
    is off the middle; None without any.
    """
    clauses = re.split("[,;] ", figure.get("target") or "")
    met, least = [], []
    for clause in clauses:
        ours, ratio, peer = (_number(figure.get(name)) for name in ("ours", "ratio", "peer"))
        if not (found := bounds(clause)):
            return None, None
        of, low, high, out = found
        if not of and missing(figure):
            return None, None
        of = of or ("ratio" if ratio is not None and len(clauses) == 1 else "ours")
        less = None if None in (ours, peer) else peer - ours
        value = dict(ours=ours, ratio=ratio, less=less)[of]
        if value is None:
            return None, None
        met.append(low < value < high if out else low <= value <= high)
        if low == high:
            least.append(1.0 if met[-1] else value / low if low > 0 else 0.0)
        elif -math.inf < low and high < math.inf:
            least.append((high - low) / 2 / max(abs(value - (low + high) / 2), 1e-9))
        else:
            bound, most = (low, False) if high == math.inf else (high, True)
            if bound < 0:  # as much below 0 as that
                bound, value, most = -bound, max(0.0, -value), not most
            above, below = (bound, value) if most else (value, bound)
            least.append(max(above, 0.0) / below if below > 0 else math.inf)
    return all(met), min(least)


def missing(figure):
    """How to get a peer that was not there; "" if it was, or if there is none."""
    peer = figure.get("peer")
    return peer if isinstance(peer, str) and _number(peer) is None else ""


def _number(value):
    """The number that a figure begins with, None without one."""
    found = re.match(r"-?\d+(\.\d+)?(e[-+]?\d+)?", str(value))
    return float(found[0]) if found else None


# --- page -------------------------------------------------------------------------------------
def table(figures):
    columns = "figure", "ours", "peer", "ratio", "spread", "target"
    lines = [f"| {' | '.join(columns)} | met | command |", "| --- " * 8 + "|"]
    for f in figures:
        cells = ["not there" if missing(f) and name == "peer" else f.get(name, "") for name in columns]
        met = {True: "yes", False: "**no**", None: ""}[judged(f)[0]]
        cells = [str("" if cell is None else cell).replace("|", "\\|") for cell in (*cells, met)]
        lines.append(f"| {' | '.join(cells)} | `{f['command']}` |")
    return "\n".join(lines)


def measured(results):
    """When and with what the rows of a JSON were measured; '' if it does not say."""
    rows = [row for row in results.values() if isinstance(row, dict) and "date" in row] if results else []
    if not rows:
        return ""
    dates, torches, threads, cpus = (
        sorted({str(row[name]) if name != "cpu" else ", ".join(row[name]) for row in rows})
        for name in ("date", "torch", "threads", "cpu")
    )
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    said = f"{' or '.join(threads)} thread{'s' * (threads != ['1'])}, {' or '.join(cpus)}"
    return f"Measured {span} with torch {' or '.join(torches)}, {said}."


def machine():
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()


def page(folder, failures, spent, picture, quick=False):
    """Figures of all JSON in `folder` -> markdown, and the panels of picture.plot_results.

    failures: {name: [(command, status, last line)]}, spent: {name: seconds}, of the run that has just ended.
    """
    sections, panels, met, targets = [], [], 0, 0
    for name, (title, full, *_) in BENCHMARKS.items():
        results = load(folder / f"{name}.json")
        measure = measured(results if isinstance(results, dict) else {})
        figures = list(READ.get(name, of_rows)(results))
        verdicts = [judged(f) for f in figures]
        bars = [(f["figure"], times, _said(f), good) for f, (good, times) in zip(figures, verdicts, strict=True)
                if good is not None]  # fmt: skip
        kept = sum(good for *_, good in bars)
        met, targets = met + kept, targets + len(bars)
        about = [measure, f"{kept} of {len(bars)} targets met." if bars else ""]
        about += [f"Took {spent[name]:.0f} s."] if name in spent else []
        lines = [f"## {title}", "", " ".join(filter(None, about)), ""]
        for command, status, said in failures.get(name, ()):
            lines += [f"**Failed** with status {status}: `{command}`: {said}", ""]
        absent = list(filter(None, map(missing, figures)))
        for how in dict.fromkeys(absent):
            lines += [f"A peer of {absent.count(how)} of these figures was not there: `{how}`", ""]
        lines += [table(figures) if figures else f"Nothing measured yet: `{_command(full[0])}`", ""]
        sections += lines
        if bars:
            panels.append((f"{title}: {kept} of {len(bars)}", bars))
    head = ["# Figures", ""]
    head += ["**Toy sizes: these show that the benchmarks run, nothing else.**", ""] if quick else []
    head += [f"Written {time.strftime('%Y-%m-%d')} by `python benchmarks/run.py` on {machine()}, "
             f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}; each section says "
             f"when its figures were measured. {met} of {targets} targets are met.", "",
             "The ratio is ours / peer, or their difference where the figure says difference or minus. A target is one "
             "of the ratio if there is one, else of ours; targets in words are not judged.", ""]  # fmt: skip
    head += [f"![Figures as times of their target, by system]({picture})", ""] if panels else []
    return "\n".join(head + sections), panels


def _said(figure):
    """What stands beside a bar: what is judged, and the target."""
    target = figure["target"]
    of_ours = figure.get("ratio") is None or re.match("ours|lower|.*;", target)
    return f"{_number(figure['ours'] if of_ours else figure['ratio']):g} ({target})"


# --- run --------------------------------------------------------------------------------------
def _command(words):
    return f"python {words}" if words.startswith("-") or "/" in words.split()[0] else f"python benchmarks/{words}"


def run(words, log):
    """Run a command in the root of the repo, all it says to `log` -> (status, last line), seconds."""
    start = time.monotonic()
    with open(log, "a") as file:
        command = [sys.executable, *shlex.split(words)]
        status = subprocess.run(command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").strip().splitlines()
    return status, lines[-1][-300:] if lines else "", time.monotonic() - start


def main(cfg):
    names = list(filter(None, cfg.only.split(",")))
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UsageError(f"--only {unknown[0]}: no such benchmark\ntry: some of {','.join(BENCHMARKS)}")
    folder = HERE.parent / QUICK if cfg.quick else HERE
    out = Path(cfg.out) if cfg.out else folder / "results.md"
    logs = folder if cfg.quick else HERE / "work" / "logs"
    if cfg.quick and names:
        shutil.rmtree(folder, ignore_errors=True)
    logs.mkdir(parents=True, exist_ok=True)
    failures, spent = {}, {}
    steps = [("prepared", words) for words in PREPARED] if cfg.quick and names else []
    steps += [(name, words) for name in names for words in BENCHMARKS[name][2 if cfg.quick else 1]]
    for number, (name, words) in enumerate(steps, 1):
        command = words if name == "prepared" else _command(words).removeprefix("python ")
        command += f" --out {QUICK}/{name}.json" if cfg.quick and name != "prepared" else ""
        print(f"[{number}/{len(steps)}] python {command}", flush=True)
        status, said, seconds = run(command, logs / f"{name}.log")
        spent[name] = spent.get(name, 0) + seconds
        print(f"    {'done' if not status else f'FAILED with status {status}: {said}'}, {seconds:.0f} s", flush=True)
        if status:
            failures.setdefault(name, []).append((f"python {command}", status, said))
    text, panels = page(folder, failures, spent, out.with_suffix(".png").name, cfg.quick)
    if panels:
        from benchmarks.picture import plot_results

        plot_results(panels, out.with_suffix(".png"))
    write_atomic(out, lambda file: file.write(text.encode()))
    print(out)
    if failures:
        raise DataError(f"{', '.join(failures)} failed: see {out} and {logs}/*.log")
    return {}


if __name__ == "__main__":
    launch(main, cfg)
