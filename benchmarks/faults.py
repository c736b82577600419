"""Faults in real runs of the six training scripts, each with what must follow: a table, most of it bit for bit.

    python benchmarks/faults.py                            # all rows, minutes on two cores
    python benchmarks/faults.py --ci                       # those that count most
    python benchmarks/faults.py --rows 1,7 --scripts hrm   # some
    python benchmarks/faults.py --soak                     # many more kills and signals
    python benchmarks/faults.py --flips 1000               # many more changed bits
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

import json
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_utils.config import UsageError, from_cli, launch


@dataclass
class Config:
    rows: str = ""  # numbers, comma separated; "" = all
    scripts: str = ""  # expert, mla, hrm, sr, multimodal, ae, comma separated; "" = all of a row
    ci: bool = False  # the rows and scripts that count most
    soak: int = 0  # trials of SIGKILL for each script, and a quarter as many of each other signal; 0 = off
    flips: int = 0  # changed bits in all, in place of row 8's 50 a format; 0 = off
    start: bool = False  # seconds to --help and to the first loss instead
    seed: int = 0  # of the moments
    jobs: int = 2  # rows at a time
    out: str = "benchmarks/faults.json"  # results


if __name__ == "__main__":
    cfg = from_cli(Config, __doc__)

if __name__ != "__mp_main__":  # which a fork imports this file as: it shall come to its script with nothing of the repo
    import torch

    from benchmarks.fault_lab import SCRIPTS, Lab, NotRun
    from benchmarks.fault_rows import ROWS
    from data_utils.checkpoint import write_atomic


def tried(lab, number, name, **how):
    """Run one row on one script -> what is printed and kept of it."""
    start, (fault, function, *_) = time.monotonic(), ROWS[number]
    try:
        outcome, note = "pass", function(lab, name, **how) or ""
    except NotRun as why:
        outcome, note = "not run", str(why)
    except AssertionError as differed:
        outcome, note = "FAIL", str(differed)
    except Exception as error:  # of the row itself
        outcome, note = "FAIL", f"{type(error).__name__}: {error}"
    row = dict(row=number, fault=fault, script=name, seconds=round(time.monotonic() - start, 1), outcome=outcome)
    print(f"{number:3} {fault:18} {name:11}{row['seconds']:6.1f} s  {outcome}" + f" ({note})" * bool(note), flush=True)
    return row | dict(note=note)


def chosen(cfg):
    """The pairs of row and script that the flags ask for."""
    names = {script.letter: name for name, script in SCRIPTS.items()}
    wanted = [name for name in cfg.scripts.split(",") if name] or list(SCRIPTS)
    if unknown := [name for name in wanted if name not in SCRIPTS]:
        raise UsageError(f"--scripts {unknown[0]}: expected some of {','.join(SCRIPTS)}")
    numbers = cfg.rows.split(",") if cfg.rows else list(map(str, ROWS))
    if unknown := [number for number in numbers if number not in map(str, ROWS)]:
        raise UsageError(f"--rows {unknown[0]}: expected some of {','.join(map(str, ROWS))}")
    pairs = [(int(n), names[letter]) for n in numbers for letter in ROWS[int(n)][3 if cfg.ci else 2]]
    return [(number, name) for number, name in pairs if name in wanted]


def main(cfg):
    place = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    try:
        lab = Lab(place, cfg.seed)
        with ThreadPoolExecutor(cfg.jobs) as pool:
            found = list(pool.map(lambda pair: tried(lab, *pair), chosen(cfg)))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    path = Path(cfg.out)
    results = json.loads(path.read_text()) if path.exists() else {}
    kept = {(row["row"], row["script"]): row for row in [*results.get("table", {}).get("rows", []), *found]}
    cpu = [torch.backends.cpu.get_cpu_capability()]
    about = dict(threads=1, torch=str(torch.__version__), date=time.strftime("%Y-%m-%d"), cpu=cpu)
    results["table"] = about | dict(rows=[kept[key] for key in sorted(kept)])
    write_atomic(path, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))
    if any(row["outcome"] == "FAIL" for row in found):
        sys.exit(1)
    return {}


if __name__ == "__main__":
    launch(main, cfg)
