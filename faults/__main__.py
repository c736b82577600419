"""Faults in real runs of the six training scripts, each with what must follow: a table, most of it bit for bit.

    python benchmarks/faults.py                            # all rows, minutes on two cores
    python benchmarks/faults.py --ci                       # those that count most
    python benchmarks/faults.py --rows 1,7 --scripts hrm   # some
    python benchmarks/faults.py --soak                     # many more kills and signals
    python benchmarks/faults.py --flips                    # many more changed bits
    python benchmarks/faults.py --start                    # seconds to --help, to the first loss, of a dry run

A line a row and script: number, fault, script, seconds, and pass, what differed, or why it was not run. A resumed run
must leave what an uninterrupted one leaves: SHA-256 of each tensor and number of its checkpoints and rows of metrics.
Children are forks of a process that has imported torch but computed nothing, or interpreters of their own (cold).
Writes benchmarks/faults.json; rows that were not asked for stay in it. Status 1 when any row fails.

    python benchmarks/faults.py inject FAULTS -- train_X.py ARGS      # one run with faults: see fault_child.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__" and sys.argv[1:2] == ["inject"]:
    from benchmarks.fault_child import run

    split = sys.argv.index("--")
    run(sys.argv[2:split], sys.argv[split + 1], sys.argv[split + 2 :])
    sys.exit()

import itertools
import json
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial

from data_utils.config import from_cli
from data_utils.errors import UsageError
from data_utils.launch import launch


@dataclass
class Config:
    rows: str = ""  # numbers, comma separated; "" = all
    scripts: str = ""  # expert, mla, hrm, sr, multimodal, ae, comma separated; "" = all of a row
    ci: bool = False  # the rows and scripts that count most
    soak: int = field(default=0, metadata=dict(bare="20"))  # trials of SIGKILL a script, a quarter of each signal
    flips: int = field(default=0, metadata=dict(bare="1000"))  # changed bits in all, in place of row 8's 50 a format
    start: bool = False  # seconds to --help and to the first loss instead
    seed: int = 0  # of the moments
    jobs: int = 2  # rows at a time
    threads: int = 1  # of each run
    out: str = "benchmarks/faults.json"  # results


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

if __name__ != "__mp_main__":  # which a fork imports this file as: it shall come to its script with nothing of the repo
    import torch

    from benchmarks.fault_child import ROOT
    from benchmarks.fault_lab import SCRIPTS, Lab, NotRun, check, words_of
    from benchmarks.fault_rows import ROWS, bit_rot, crash, preemption
    from data_utils.files import write_atomic


# script: what makes its data, its smoke command; of the router's the experts are there before
START = dict(
    expert=("prepare_data.py expert --toy --data_dir toy", "--config {root}/configs/expert/smoke.yaml --data_dir toy"),
    mla=("", "--config {root}/configs/mla/smoke.yaml --data_dir {place}/data --d_model 32 --n_heads 2 --max_seq_len 32 "
         "--rope_dim 8 --transformer_ckpt {place}/experts/transformer_expert.pt --state_space_ckpt "
         "{place}/experts/state_space_expert.pt --diffuser_ckpt {place}/experts/diffuser_expert.pt"),
    hrm=("", "--config {root}/configs/hrm/smoke.yaml --run_name run"),
    sr=("", "-c {root}/configs/test/train.yaml -o run"),
    multimodal=("", "arch=smoke data_paths=pages checkpoint_path=run wandb=disabled"),
    ae=("", "--config {root}/configs/ae/smoke.yaml out=run"),
)  # fmt: skip
SIGNALS = dict(SIGKILL=1, SIGINT=4, SIGTERM=4, SIGUSR1=4)  # of --soak: trials of the first for one of this


def tried(about, function, *arguments, **how):
    """Call one function on the lab -> `about` with what came of it, printed."""
    start = time.monotonic()
    try:
        outcome, note = "pass", function(*arguments, **how) or ""
    except NotRun as why:
        outcome, note = "not run", str(why)
    except AssertionError as differed:
        outcome, note = "FAIL", str(differed)
    except Exception as error:  # of the row itself
        outcome, note = "FAIL", f"{type(error).__name__}: {error}"
    row = about | dict(seconds=round(time.monotonic() - start, 1), outcome=outcome, note=note)
    number, fault, name = about.values()
    print(f"{number:>4} {fault:18} {name:12}{row['seconds']:6.1f} s  {outcome}" + f" ({note})" * bool(note), flush=True)
    return row


def chosen(cfg):
    """The pairs of row and script that the flags ask for."""
    names = {script.letter: name for name, script in SCRIPTS.items()} | dict(P="prepare_data")
    wanted = [name for name in cfg.scripts.split(",") if name] or list(names.values())
    if unknown := [name for name in wanted if name not in names.values()]:
        raise UsageError(f"--scripts {unknown[0]}: expected some of {','.join(names.values())}")
    numbers = cfg.rows.split(",") if cfg.rows else list(map(str, ROWS))
    if unknown := [number for number in numbers if number not in map(str, ROWS)]:
        raise UsageError(f"--rows {unknown[0]}: expected some of {','.join(map(str, ROWS))}")
    pairs = [(int(n), names[letter]) for n in numbers for letter in ROWS[int(n)][3 if cfg.ci else 2]]
    return [(number, name) for number, name in pairs if name in wanted], [n for n in wanted if n in SCRIPTS]


def seconds_to_start(lab, name):
    """Cold, in clean folders: seconds to --help, to the first loss of the smoke command, of a run of one step."""
    script, folder, found = SCRIPTS[name], lab.folder(), {}
    lab.data(name)
    begin = time.monotonic()
    lab.end(lab.child(script.file, ["--help"], folder, warm=False))
    found["help"] = time.monotonic() - begin
    (first, smoke), begin = START[name], time.monotonic()
    if first:
        file, *words = first.split()
        lab.end(lab.child(file, words, folder, warm=False))
    child = lab.child(script.file, words_of(smoke, root=ROOT, place=lab.place), folder, warm=False)
    while child.status() is None and not any(re.search(r"loss[= ]\d", Path(log).read_text()) for log in child.logs):
        time.sleep(0.05)
    found["first loss"] = time.monotonic() - begin
    lab.end(child)
    begin = time.monotonic()
    lab.run(name, lab.folder(), "max_steps=1" if name in ("multimodal", "ae") else "--max_steps=1", warm=False)
    found["one step"] = time.monotonic() - begin
    limits = {"help": 0.3, "first loss": 60, "one step": 10}
    said = ", ".join(f"{key} {value:.2f} s" for key, value in found.items())
    check(all(found[key] <= limit for key, limit in limits.items()), said)
    return said


def jobs(cfg, lab):
    """(section of the results, what is printed, the function and its arguments) of all that the flags ask for."""
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


def keep(path, section, row, threads):
    """Write one row into the results, in the place of its last one."""
    results = json.loads(path.read_text()) if path.exists() else {}
    rows = {tuple(row.values())[:3]: row for row in [*results.get(section, {}).get("rows", []), row]}
    cpu = [torch.backends.cpu.get_cpu_capability()]
    about = dict(threads=threads, torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"), cpu=cpu)
    results[section] = about | dict(rows=[rows[key] for key in sorted(rows)])
    write_atomic(path, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


def main(cfg):
    place, begin = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None), time.monotonic()
    os.chmod(place, 0o755)  # for the rows of another user
    try:
        work = list(jobs(cfg, Lab(place, cfg.seed, cfg.threads)))
        with ThreadPoolExecutor(1 if cfg.start else cfg.jobs) as pool:
            under_way = {pool.submit(tried, *job[1:]): job[0] for job in work}
            for done in as_completed(under_way):
                keep(Path(cfg.out), under_way[done], done.result(), cfg.threads)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # else a stop would wait for all that is left
        shutil.rmtree(place, ignore_errors=True)
    failed = [done for done in under_way if done.result()["outcome"] == "FAIL"]
    print(f"{len(under_way) - len(failed)} of {len(under_way)} as they must, {time.monotonic() - begin:.0f} s")
    if failed:
        sys.exit(1)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
