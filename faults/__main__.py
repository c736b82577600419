"""Faults in real runs of the six training scripts, each with what must follow: a table, most of it bit for bit.

    python -m faults                            # all rows, minutes on two cores
    python -m faults --ci                       # those that count most
    python -m faults --rows 1,7 --scripts hrm   # some
    python -m faults --soak                     # many more kills and signals
    python -m faults --flips                    # many more changed bits
    python -m faults --start                    # seconds to --help, to the first loss, of a dry run

A line per row and script: number, fault, script, seconds, and pass, what differed, or why it was not run. A resumed run
must leave what an uninterrupted one leaves: SHA-256 of each tensor and number of its checkpoints and rows of metrics.
Children are forks of a process that has imported torch but computed nothing, or new interpreters (cold). Writes
benchmarks/results/faults.json; rows of earlier runs stay in it. Status 1 when any row fails.

    python -m faults inject FAULTS -- train_X.py ARGS      # one run with faults: see faults/child.py
"""

import sys

if __name__ == "__main__" and sys.argv[1:2] == ["inject"]:
    from faults.child import run

    split = sys.argv.index("--")
    run(sys.argv[2:split], sys.argv[split + 1], sys.argv[split + 2 :])
    sys.exit()

import itertools
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_utils.config import from_cli
from data_utils.errors import UsageError
from data_utils.launch import launch


@dataclass
class Config:
    rows: str = ""  # numbers, comma separated; "" = all
    scripts: str = ""  # expert, mla, hrm, sr, multimodal, ae, comma separated; "" = all of a row
    ci: bool = False  # the rows and scripts that count most
    soak: int = field(default=0, metadata=dict(bare="20"))  # trials of SIGKILL per script, a quarter of each signal
    flips: int = field(default=0, metadata=dict(bare="1000"))  # changed bits in all, in place of row 8's 50 per format
    start: bool = False  # seconds to --help and to the first loss instead
    seed: int = 0  # of the moments
    jobs: int = 2  # rows at a time
    threads: int = 1  # of each run
    out: str = "benchmarks/results/faults.json"  # results


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__, prog="python -m faults")

from benchmarks.report import circumstances, figure, load, write_json
from faults.child import ROOT
from faults.lab import SCRIPTS, Lab, NotRun, check, words_of
from faults.rows import ROWS
from faults.rows.crashes import crash, preemption
from faults.rows.damage import bit_rot

START = dict(  # script: (command that makes its data, flags of its smoke run); the experts of the router exist before
    expert=("prepare_data.py expert --toy --data_dir toy", "--config {root}/configs/expert/smoke.yaml --data_dir toy"),
    mla=(
        "",
        """--config {root}/configs/mla/smoke.yaml --data_dir {place}/data --d_model 32 --n_heads 2 --max_seq_len 32
        --rope_dim 8 --transformer_ckpt {place}/experts/transformer_expert.pt --state_space_ckpt
        {place}/experts/state_space_expert.pt --diffuser_ckpt {place}/experts/diffuser_expert.pt""",
    ),
    hrm=("", "--config {root}/configs/hrm/smoke.yaml --run_name run"),
    sr=("", "-c {root}/configs/test/train.yaml -o run"),
    multimodal=("", "arch=smoke data_paths=pages checkpoint_path=run wandb=disabled"),
    ae=("", "--config {root}/configs/ae/smoke.yaml out=run"),
)
LIMITS = {"help": 0.3, "first loss": 60, "one step": 10}  # seconds of --start
SIGNALS = dict(SIGKILL=1, SIGINT=4, SIGTERM=4, SIGUSR1=4)  # of --soak: trials of the first for one of this
SECTIONS = dict(table="", soak=" --soak", flips=" --flips", start=" --start")  # of the results: flag that makes it


def seconds_to_start(lab, name):
    """Cold, in clean folders: seconds to --help, to the first loss of the smoke command, of a run of one step."""
    script, folder, seconds = SCRIPTS[name], lab.folder(), {}
    lab.data(name)
    begin = time.monotonic()
    lab.end(lab.child(script.file, ["--help"], folder, warm=False))
    seconds["help"] = time.monotonic() - begin
    prepare, smoke = START[name]
    begin = time.monotonic()
    if prepare:
        file, *words = prepare.split()
        lab.end(lab.child(file, words, folder, warm=False))
    child = lab.child(script.file, words_of(smoke, root=ROOT, place=lab.place), folder, warm=False)
    while child.status() is None and not any(re.search(r"loss[= ]\d", Path(log).read_text()) for log in child.logs):
        time.sleep(0.05)
    seconds["first loss"] = time.monotonic() - begin
    lab.end(child)
    begin = time.monotonic()
    lab.run(name, lab.folder(), "max_steps=1" if name in ("multimodal", "ae") else "--max_steps=1", warm=False)
    seconds["one step"] = time.monotonic() - begin
    text = ", ".join(f"{key} {value:.2f} s" for key, value in seconds.items())
    check(all(seconds[key] <= limit for key, limit in LIMITS.items()), text)
    return text


# --- run --------------------------------------------------------------------------------------
def chosen(cfg):
    """Return the pairs of row and script that the flags select, and the training scripts among them."""
    names = {script.letter: name for name, script in SCRIPTS.items()} | dict(P="prepare_data")
    scripts = [name for name in cfg.scripts.split(",") if name] or list(names.values())
    if unknown := [name for name in scripts if name not in names.values()]:
        raise UsageError(f"--scripts {unknown[0]}: expected some of {','.join(names.values())}")
    numbers = cfg.rows.split(",") if cfg.rows else list(map(str, ROWS))
    if unknown := [number for number in numbers if number not in map(str, ROWS)]:
        raise UsageError(f"--rows {unknown[0]}: expected some of {','.join(map(str, ROWS))}")
    pairs = [(int(n), names[letter]) for n in numbers for letter in ROWS[int(n)][3 if cfg.ci else 2]]
    return [(number, name) for number, name in pairs if name in scripts], [n for n in scripts if n in SCRIPTS]


def jobs(cfg, lab):
    """Yield (section of the results, facts of the row, function) for all that the flags select."""
    pairs, names = chosen(cfg)
    if cfg.start:
        for name in names:
            yield "start", dict(row="-", fault="start", script=name), partial(seconds_to_start, lab, name)
    if cfg.soak:
        for name, (kind, times) in itertools.product(names, SIGNALS.items()):
            trials = max(1, cfg.soak // times)
            signals = partial(preemption, signals=(kind, kind)) if kind != "SIGKILL" else crash
            yield "soak", dict(row="-", fault=kind, script=name), partial(signals, lab, name, trials=trials)
    if cfg.flips:
        for name in names:
            flips = partial(bit_rot, lab, name, flips=-(-cfg.flips // len(names)))
            yield "flips", dict(row=8, fault="bit rot", script=name), flips
    if not (cfg.start or cfg.soak or cfg.flips):
        for number, name in pairs:
            fault, function, *_ = ROWS[number]
            yield "table", dict(row=number, fault=fault, script=name), partial(function, lab, name)


def attempt(facts, function):
    """Inject one fault -> its row, printed."""
    start = time.monotonic()
    try:
        outcome, note = "pass", function() or ""
    except NotRun as why:
        outcome, note = "not run", str(why)
    except AssertionError as difference:
        outcome, note = "FAIL", str(difference)
    except Exception as error:  # of the row itself
        outcome, note = "FAIL", f"{type(error).__name__}: {error}"
    row = facts | dict(seconds=round(time.monotonic() - start, 1), outcome=outcome, note=note)
    line = f"{row['row']:>4} {row['fault']:18} {row['script']:12}{row['seconds']:6.1f} s  {outcome}"
    print(f"{line} ({note})" if note else line, flush=True)
    return row


# --- results ----------------------------------------------------------------------------------
def figures_of(section, rows):
    """Yield how many pairs of fault and script ended as they must, in all, then fault by fault."""
    flag, ran = SECTIONS[section], [row for row in rows if row["outcome"] != "not run"]
    if ran:
        yield figure(f"faults.{section}", f"{section}: pairs of fault and script that did what they must",
                     sum(row["outcome"] == "pass" for row in ran), str(len(ran)), spread=f"of {len(ran)}",
                     command=f"python -m faults{flag}")  # fmt: skip
    groups = {}
    for row in rows:
        groups.setdefault((row["row"], row["fault"]), []).append(row)
    for (number, fault), group in groups.items():
        passed = sum(row["outcome"] == "pass" for row in group)
        id = number if section == "table" else fault.replace(" ", "_")
        name = f"row {number}" if section == "table" else section
        yield figure(f"faults.{section}.{id}", f"{name}, {fault}", f"{passed} of {len(group)} scripts", "all",
                     spread=[f"{row['script']}: {row['note']}" for row in group if row["note"]],
                     command=f"python -m faults{flag or f' --rows {number}'}")  # fmt: skip


def keep(path, section, row, threads):
    """Write one row into the results, in the place of its last one."""
    results = load(path)
    rows = {tuple(row.values())[:3]: row for row in [*results.get(section, {}).get("rows", []), row]}
    rows = [rows[key] for key in sorted(rows)]
    results[section] = circumstances(threads) | dict(figures=list(figures_of(section, rows)), rows=rows)
    write_json(path, results)


def main(cfg):
    place, begin = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None), time.monotonic()
    os.chmod(place, 0o755)  # for the rows of another user
    try:
        work = list(jobs(cfg, Lab(place, cfg.seed, cfg.threads)))
        with ThreadPoolExecutor(1 if cfg.start else cfg.jobs) as pool:
            under_way = {pool.submit(attempt, facts, function): section for section, facts, function in work}
            for done in as_completed(under_way):
                keep(Path(cfg.out), under_way[done], done.result(), cfg.threads)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # else a stop would wait for all remaining rows
        shutil.rmtree(place, ignore_errors=True)
    failed = sum(done.result()["outcome"] == "FAIL" for done in under_way)
    print(f"{len(under_way) - failed} of {len(under_way)} as they must, {time.monotonic() - begin:.0f} s")
    if failed:
        sys.exit(1)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
