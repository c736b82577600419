"""Disks, folders, terminals, clocks."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from faults.child import ROOT
from faults.lab import SCRIPTS, candidates, check, error_lines, has, newest


def disk_full_later(lab, name):
    """No room for one rolling save, then for the last ones; and a disk that fills with something else."""
    steps = SCRIPTS[name].steps
    folder = lab.folder()
    late = "sleep=7:0.1 sleep=14:0.1"  # so that a save is due after step 7: of one call of backward, or of two
    _, err = lab.go_on(name, folder, faults=f"{late} limit=7:20000 limit=8:-1")
    warnings = [line for line in err.splitlines() if "training goes on" in line]
    check(warnings and all("was not written" in line for line in warnings), f"no warning: {err[-300:]}")
    lab.clean(folder)
    folder = lab.folder()
    _, err = lab.run(name, folder, faults=f"limit={steps - 1}:20000", status=1)
    has(error_lines(err), "was not written", "last good file")
    newest(SCRIPTS[name], folder)
    lab.go_on(name, folder)
    return f"{len(warnings)} warnings; {full_disk(lab, name)}"


def full_disk(lab, name):
    folder = lab.folder()
    home = folder / SCRIPTS[name].home
    home.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(home)]
    if os.geteuid() or subprocess.run(words, capture_output=True).returncode:
        return "a small disk: not run, not root"
    try:
        child = lab.start(name, folder, faults="sleep=12:2")
        while not candidates(SCRIPTS[name], folder) and child.status() is None:
            time.sleep(0.01)
        with open(home / "filler", "wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass
        _, err = lab.end(child, 1)
        has(error_lines(err), "No space left")
        (home / "filler").unlink()
        newest(SCRIPTS[name], folder)
        lab.go_on(name, folder)
    finally:
        subprocess.run(["umount", "-l", home])
    return "a disk of 8 MB too"


def disk_full_at_start(lab, name):
    """No room for the first checkpoint: the run ends before it trains, and leaves none."""
    folder = lab.folder()
    _, err = lab.run(name, folder, faults="quota=64000", status=1)
    has(error_lines(err), "was not written")
    check(not candidates(SCRIPTS[name], folder), "a checkpoint was written")
    metrics = folder / SCRIPTS[name].metrics
    check(not metrics.exists() or '"train"' not in metrics.read_text(), "it had trained before")
    lab.clean(folder)


def read_only(lab, name):
    """A folder that can't be written: the error names it within five seconds."""
    place = lab.folder()
    (place / "file").write_text("")
    (place / "closed").mkdir(mode=0o555)
    others = all(path.stat().st_mode & 1 for path in Path(sys.base_prefix, "lib").parents)  # may use this interpreter
    cases = [("file", "")]
    if os.geteuid() == 0 and others:
        cases.append(("closed", "user=65534"))
    for folder, fault in cases:
        start, target = time.monotonic(), place / folder / "run"
        if name == "prepare_data":
            child = lab.child("prepare_data.py", ["expert", "--toy", f"--data_dir={target}"], place, faults=[fault])
        else:
            child = lab.start(name, place, f"--checkpoint_dir={target}", faults=fault)
        _, err = lab.end(child, 1)
        has(error_lines(err), target)
        took = time.monotonic() - start
        check(took < 5, f"{took:.1f} s")
    return "" if len(cases) > 1 else "0555: not run: not root, or no interpreter for others"


def pipes(lab, name):
    """A reader that goes away, no error stream, no terminal: it trains on, and writes no codes of a terminal."""
    lab.data(name)
    words = " ".join(map(str, [SCRIPTS[name].file, *lab.words(name)]))
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), TERM="dumb", LANG="C", LC_ALL="C")
    for pipe in ("| head -1", "2>&-", "2>&1 | cat"):
        folder = lab.folder()
        line = f"set -o pipefail; {sys.executable} -m faults inject figures=0 -- {words} {pipe}"
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, timeout=600)
        check(done.returncode == 0, f"status {done.returncode} with {pipe}: {done.stderr[-300:]}")
        check(not re.search(b"\x1b", done.stdout + done.stderr), f"escape codes with {pipe}")
        lab.same(name, folder)


def surroundings(lab, name):
    """A moved folder, another clock, time zone, language and hash seed: the same to the last bit."""
    env = dict(PYTHONHASHSEED="7", TZ="Pacific/Kiritimati", LANG="C")
    folder = lab.folder()
    lab.run(name, folder, faults=f"signal=SIGTERM:{SCRIPTS[name].steps // 2}:0", status=143)
    moved = lab.folder(folder)
    shutil.rmtree(folder)
    lab.go_on(name, moved, faults="clock=-100000000", env=env, warm=False)
