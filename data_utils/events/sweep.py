"""Run the jobs of --multirun one after the other, each in its own process, listed in a sweep.yaml that survives a kill.

Imports no torch: this process only waits. It survives a crash or an out-of-memory kill of a job.
"""

import itertools
import os
import re
import shlex
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

TAIL = 5  # last lines of a failed job that are printed again
SIGNALS = "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"


def sweep(jobs):
    """Run the `Jobs` of a command line with the script that was called; return {stopped: signal number or 0}.

    Raises DataError if a job does not finish: after all jobs, or at once with fail_fast.
    """
    folder, rows = plan(jobs)
    lock = lock_run(folder, "sweep")  # noqa: F841  held until the process ends
    _write(folder, rows)
    labels = differences([row["overrides"] for row in rows])
    say(f"{folder}: {len(rows)} jobs")
    stopped = run_jobs(folder, rows, labels, jobs.configs[0].fail_fast)
    done = [row for row in rows if row["status"] == "done"]
    resume = shlex.join(["python", "train_ae.py", f"resume={folder}"])
    command = resume if len(done) < len(rows) else f"python plot.py {shlex.quote(str(folder))}"
    losses = {i: row["best_val_loss"] for i, row in enumerate(rows) if row["status"] == "done"}
    losses = {i: loss for i, loss in losses.items() if loss is not None}
    best = ""
    if losses:
        i = min(losses, key=losses.get)
        best = f", best val_loss {losses[i]:.4f} of {labels[i] or rows[i]['run_dir']}"
    say(f"{folder}: {len(done)} of {len(rows)} jobs done{best}; next: {command}")
    failed = [str(i) for i, row in enumerate(rows) if row["status"] not in ("done", "waiting")]
    if failed and not stopped:
        raise DataError(f"job {', '.join(failed)} of {folder} did not finish\ntry: {resume}")
    return dict(stopped=stopped)


def differences(words):
    """Return, for each list of KEY=VALUE or other words, those that not all lists have, as one text."""
    return [" ".join(word for word in job if not all(word in other for other in words)) for job in words]


def plan(jobs):
    """Return (folder of the sweep, one row per job), new ones or those of a sweep that is resumed."""
    unknown = dict(status="waiting", exit_code=None, best_val_loss=None, seconds=0.0)
    if jobs.rows:
        folder, rows = Path(jobs.folder), [unknown | row for row in jobs.rows]
        runs = folder.resolve().parents[1] / "runs"
        runs = runs.relative_to(Path.cwd()) if runs.is_relative_to(Path.cwd()) else runs
        for row, words in zip(rows, jobs.words, strict=True):
            row["overrides"] = row["overrides"] if row["status"] == "done" else words
            row["run_dir"] = str(runs / Path(row["run_dir"]).name)  # the sweep may have been moved
            if row["status"] == "running":  # its sweep was killed
                row["status"] = "interrupted"
    else:
        first = jobs.configs[0]
        if not re.fullmatch(r"\w[\w.-]{0,99}", first.name):
            raise UsageError(f"name={first.name}: expected letters, digits, dots, _ and -, at most 100, no sign first")
        outputs, stamp = Path(first.outputs), time.strftime("%Y%m%d-%H%M%S")
        folder = _claim(outputs / "multiruns" / f"exp_{stamp}_{first.name}")
        name = folder.name.removeprefix("exp_")
        folders = [str(outputs / "runs" / f"run_{name}_job{i}") for i in range(len(jobs.words))]
        pairs = zip(jobs.words, folders, strict=True)
        rows = [dict(overrides=words, run_dir=run_dir) | unknown for words, run_dir in pairs]
    return folder, rows


def _claim(path):
    """Create the folder `path`, or the first of path_2, path_3, ... that does not exist yet; return it."""
    folder = path
    try:
        for number in itertools.count(2):
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                folder = path.with_name(f"{path.name}_{number}")
    except OSError as e:
        raise DataError(f"{folder} can't be created: {e.strerror}\nfix: outputs=FOLDER") from e


def _write(folder, rows):
    import yaml

    text = yaml.safe_dump(dict(script=sys.argv[0], jobs=rows), sort_keys=False, width=1000, allow_unicode=True)
    write_atomic(folder / SWEEP, lambda file: file.write(text.encode("utf-8")))


def run_jobs(folder, rows, labels, fail_fast):
    """Run the rows that are not done, and write each change into sweep.yaml. Return the signal that ended it, or 0.

    The job gets each signal too. At the first one it saves and leaves; at a second one it leaves at once.
    """
    stopped, child = [], None

    def note(number, frame):
        stopped.append(number)
        if child:
            child.send_signal(_passed_on(number))

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup keeps its effect
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
            if stopped:  # the signal came before the start
                child.send_signal(_passed_on(stopped[-1]))
            for line in child.stdout:
                say(line.rstrip("\n"))
                tail.append(line)
            code, child = child.wait(), None
            code = 128 - code if code < 0 else code  # as a shell reports it
            if not code:
                row["status"] = "done"
            else:
                row["status"] = "interrupted" if stopped or code in (130, 143) else "failed"
            row["exit_code"] = code
            row["best_val_loss"] = best_val_loss(row["run_dir"])
            row["seconds"] = round((row["seconds"] or 0) + time.monotonic() - start, 1)
            _write(folder, rows)
            result = f" with status {code}" if code else ""
            if row["best_val_loss"] is not None:
                result += f", best val_loss {row['best_val_loss']:.4f}"
            say(f"{job}: {row['status']}{result}, {row['seconds']} s")
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
    """Start a job in its own session, so that Ctrl+C reaches it once, through this process."""
    fixed = [f"out={row['run_dir']}", "resume=auto", "multirun=false", f"sweep_job={number}"]
    return subprocess.Popen(
        [sys.executable, sys.argv[0], *row["overrides"], *fixed],
        env=os.environ | dict(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
