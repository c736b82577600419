"""A sweep: the jobs of --multirun one after the other, each a process of its own, in a sweep.yaml that survives a kill.

Imports no torch: this process only waits, and a crash or an out-of-memory kill of a job can't take it along.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from data_utils.errors import DataError, UsageError
from data_utils.events.facts import best_val_loss
from data_utils.files import lock_run, write_atomic
from data_utils.overrides import SWEEP
from data_utils.progress import say

TAIL = 5  # lines of a failed job that are shown again
SIGNALS = "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"


def sweep(jobs):
    """Run the `Jobs` of a command line by the script that was called; return {stopped: signal number or 0}.

    Raises DataError, at the end or at the first with fail_fast, if a job did not finish.
    """
    folder, rows = plan(jobs)
    lock = lock_run(folder, "sweep")  # noqa: F841  held until the process ends
    _write(folder, rows)
    words = [set(row["overrides"]) for row in rows]
    labels = [" ".join(w for w in row["overrides"] if not all(w in other for other in words)) for row in rows]
    say(f"{folder}: {len(rows)} jobs")
    stopped = run(folder, rows, labels, jobs.configs[0].fail_fast)
    done = [row for row in rows if row["status"] == "done"]
    best = min((row for row in done if row["best_val_loss"] is not None), key=_loss, default=None)
    found = f", best val_loss {_loss(best):.4f} of {labels[rows.index(best)] or best['run_dir']}" if best else ""
    again = f"python {sys.argv[0]} resume={folder}"
    then = again if len(done) < len(rows) else f"python plot.py {folder}"
    say(f"{folder}: {len(done)} of {len(rows)} jobs done{found}; next: {then}")
    failed = [str(i) for i, row in enumerate(rows) if row["status"] not in ("done", "waiting")]
    if failed and not stopped:
        raise DataError(f"job {', '.join(failed)} of {folder} did not finish\ntry: {again}")
    return dict(stopped=stopped)


def _loss(row):
    return row["best_val_loss"]


def plan(jobs):
    """Return (folder of the sweep, a row for each job): both new, or those that go on."""
    unknown = dict(status="waiting", exit_code=None, best_val_loss=None, seconds=0.0)
    if jobs.rows:
        folder, rows = Path(jobs.folder), [unknown | row for row in jobs.rows]
        runs = folder.resolve().parents[1] / "runs"
        runs = runs.relative_to(Path.cwd()) if runs.is_relative_to(Path.cwd()) else runs
        for row, words in zip(rows, jobs.words, strict=True):
            row["overrides"] = row["overrides"] if row["status"] == "done" else words
            row["run_dir"] = str(runs / Path(row["run_dir"]).name)  # wherever it was moved
            row["status"] = "interrupted" if row["status"] == "running" else row["status"]  # its sweep was killed
    else:
        first = jobs.configs[0]
        if not re.fullmatch(r"\w[\w.-]{0,99}", first.name):
            raise UsageError(f"name={first.name}: letters, digits, dots, _ and -, at most 100, the first no sign")
        outputs, stamp = Path(first.outputs), time.strftime("%Y%m%d-%H%M%S")
        folder = _claim(outputs / "multiruns" / f"exp_{stamp}_{first.name}")
        name = folder.name.removeprefix("exp_")
        folders = [str(outputs / "runs" / f"run_{name}_job{i}") for i in range(len(jobs.words))]
        pairs = zip(jobs.words, folders, strict=True)
        rows = [dict(overrides=words, run_dir=run_dir) | unknown for words, run_dir in pairs]
    return folder, rows


def _claim(path):
    """Make the folder, or the first of path_2, path_3, ... that is not there yet."""
    number, free = 2, path
    try:
        while True:
            try:
                free.mkdir(parents=True)
                return free
            except FileExistsError:
                free, number = path.with_name(f"{path.name}_{number}"), number + 1
    except OSError as e:
        raise DataError(f"{free} can't be made: {e.strerror}\ntry: outputs=FOLDER") from e


def _write(folder, rows):
    import yaml

    text = yaml.safe_dump(dict(script=sys.argv[0], jobs=rows), sort_keys=False, width=1000, allow_unicode=True)
    write_atomic(folder / SWEEP, lambda file: file.write(text.encode("utf-8")))


def run(folder, rows, labels, fail_fast):
    """Run the rows that are not done; each change goes into sweep.yaml. Return the signal that ended it, or 0.

    A signal is passed on to the job, which saves and leaves; a second one too, on which it leaves at once.
    """
    stopped, child = [], None

    def note(number, frame):
        stopped.append(number)
        if child:
            child.send_signal(_passed_on(number))

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        for i, row in enumerate(rows):
            if row["status"] == "done" or stopped:
                continue
            job, start = f"job {i} of {len(rows)} {labels[i]}".rstrip(), time.monotonic()
            say(f"{job}: {'goes on' if Path(row['run_dir']).exists() else 'starts'} in {row['run_dir']}")
            row["status"] = "running"
            _write(folder, rows)
            child, tail = _start(row, i), deque(maxlen=TAIL)
            if stopped:  # between the last look and the start
                child.send_signal(_passed_on(stopped[-1]))
            for line in child.stdout:
                say(line.rstrip("\n"))
                tail.append(line)
            code, child = child.wait(), None
            code = 128 - code if code < 0 else code  # as a shell says it
            interrupted = code and (stopped or code in (130, 143))
            row.update(status="interrupted" if interrupted else "failed" if code else "done", exit_code=code,
                       best_val_loss=best_val_loss(row["run_dir"]),
                       seconds=round((row["seconds"] or 0) + time.monotonic() - start, 1))  # fmt: skip
            _write(folder, rows)
            loss = "" if row["best_val_loss"] is None else f", best val_loss {row['best_val_loss']:.4f}"
            say(f"{job}: {row['status']}{f' with status {code}' if code else ''}{loss}, {row['seconds']} s")
            if row["status"] == "failed":
                print(f"{job} failed with status {code}; its last lines:\n{''.join(tail)}", file=sys.stderr, flush=True)
                if fail_fast:
                    break
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return stopped[0] if stopped else 0


def _passed_on(number):
    return number if number == signal.SIGINT else signal.SIGTERM


def _start(row, number):
    """Start a job, in a session of its own: what is typed at the terminal reaches it once, by this process."""
    own = [f"out={row['run_dir']}", "resume=auto", "multirun=false", f"sweep_job={number}"]
    return subprocess.Popen(
        [sys.executable, sys.argv[0], *row["overrides"], *own], env=os.environ | dict(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        start_new_session=True,
    )  # fmt: skip
