"""Kills and signals: the same command then ends as if nothing had happened."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

from data_utils.checkpoint import read
from faults.lab import SCRIPTS, candidates, check, contents, error_lines, has, newest, unchanged
from faults.rows.inputs import prepared_pairs

SLOW = dict(  # where SIGTERM comes: in an evaluation, in tokenizing, in waiting for data
    expert=["data_utils.text.windows.DomainText.batch:val", "data_utils.tokenizer.ByteTokenizer.encode_batch"],
    hrm=["data_utils.reasoning.dataset.Pairs.batch:val"],
    multimodal=["models.multimodal.Multimodal.trace", "data_utils.pages.shards.Shards.ready"],
)


def crash(lab, name, trials=3):
    """SIGKILL twice per trial, at a random step and moment: the same command ends as if nothing had happened."""
    steps, kills = SCRIPTS[name].steps, 0
    for trial in range(trials):
        folder, draw = lab.folder(), lab.draw("crash", name, trial)
        for _ in range(2):
            fault = f"signal=SIGKILL:{draw.randrange(1, steps // 2)}:{draw.uniform(0, 30):.1f}"
            kills += lab.killed(name, folder, fault)
        lab.go_on(name, folder)
        lab.clean(folder)
    return f"{trials} trials, {kills} kills"


def stopped(lab, name, folder, kind, step, group=""):
    """Send a signal after a step: the run must save at the next one and leave with its status -> the saved step."""
    status = 130 if kind == "SIGINT" else 143
    lab.run(name, folder, faults=f"signal={kind}:{step}:0{group}", status=status)
    return newest(SCRIPTS[name], folder)["step"]


def ctrl_c(lab, name):
    folder, draw = lab.folder(), lab.draw("ctrl_c", name, 0)
    step = draw.randrange(1, SCRIPTS[name].steps - 2)
    saved = stopped(lab, name, folder, "SIGINT", step, ":group")
    check(saved >= step, f"signal after step {step}, saved was {saved}")
    lab.go_on(name, folder)


def preemption(lab, name, signals=("SIGTERM", "SIGUSR1", "SIGHUP"), trials=1):
    """One signal after the other, each in its share of the run; no step is lost."""
    for trial in range(trials):
        folder, draw, saved = lab.folder(), lab.draw("preemption", name, trial), 0
        for kind in signals:
            step = draw.randrange(1, SCRIPTS[name].steps // len(signals) - 1)
            now = stopped(lab, name, folder, kind, step)
            check(now >= saved + step, f"{kind} after step {saved + step}, saved was {now}")
            saved = now
        lab.go_on(name, folder)
    return f"{trials} trials, {trials * len(signals)} signals"


def injected_at(err, kind):
    """Return the moment of the last injected signal."""
    return float(re.findall(rf"injected {kind} at (\S+)", err)[-1])


def doubled(lab, name):
    """SIGTERM twice at once saves; a second SIGINT, a second and a half later, leaves at once."""
    folder = lab.folder()
    lab.run(name, folder, faults="signal=SIGTERM:5:0 signal=SIGTERM:5:1", status=143)
    check(newest(SCRIPTS[name], folder)["step"] >= 5, "nothing was saved")
    lab.go_on(name, folder)
    folder = lab.folder()
    child = lab.start(name, folder, faults="signal=SIGINT:5:100 signal=SIGINT:5:1600 sleep=12:5")
    _, err = lab.end(child, 130)
    took = child.ended - injected_at(err, "SIGINT")
    check(took < 1, f"gone {took:.1f} s after the second signal")
    read(candidates(SCRIPTS[name], folder)[0])
    lab.go_on(name, folder)
    return f"gone {took:.2f} s after the second"


def elsewhere(lab, name):
    """SIGTERM outside a step: the run leaves within two seconds."""
    longest = 0
    for path in SLOW[name]:
        folder, flags = lab.folder(), []
        if "tokenizer" in path:
            shutil.copytree(lab.place / "data", folder / "data", ignore=shutil.ignore_patterns(".cache"))
            flags = [f"--data_dir={folder}/data"]
        child = lab.start(name, folder, *flags, faults=f"slow={path}")
        _, err = lab.end(child, 143)
        longest = max(longest, child.ended - injected_at(err, "SIGTERM"))
        check(longest < 2, f"gone {longest:.1f} s after a signal in {path}")
        lab.clean(folder)
        lab.go_on(name, folder)
    return f"gone in {longest:.2f} s"


def kill_in_save(lab, name):
    """SIGKILL in the middle of a file, before and after a rename, at the first, second and a later one."""
    moments = [("half", 1), ("half", 3), *((where, n) for where in ("before", "after") for n in (1, 2, 5))]
    kills = 0
    for where, number in moments:
        folder = lab.folder()
        kills += lab.killed(name, folder, f"die={where}:{number}")
        lab.go_on(name, folder)
        lab.clean(folder)
    check(kills >= 6, f"only {kills} kills")
    return f"{kills} kills"


def rotation(lab, name, trials=5):
    """SIGKILL while old files are removed: there is always one that verifies."""
    flags = dict(expert=["--keep", "1"], hrm=["--checkpoint_limit", "1"])[name]
    kills, draw = 0, lab.draw("rotation", name)
    for _ in range(trials):
        folder = lab.folder()
        fault = draw.choice([f"die=delete:{draw.randrange(1, 4)}", f"die=after:{draw.randrange(2, 9)}"])
        kills += lab.killed(name, folder, fault, *flags)
        read(candidates(SCRIPTS[name], folder)[0])
        lab.go_on(name, folder, *flags)
    return f"{trials} trials, {kills} kills"


# --- more than one process --------------------------------------------------------------------
def two_at_once(lab, name):
    """A second start in the same folder is refused, and names the first."""
    folder = lab.folder()
    first = lab.start(name, folder, faults="sleep=9:600")
    deadline = time.monotonic() + 60
    while not candidates(SCRIPTS[name], folder) and first.status() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        _, err = lab.run(name, folder, status=2)
        has(error_lines(err), "in use", first.pid)
    finally:
        first.kill()
    lab.end(first, -9)
    lab.go_on(name, folder)


def finished_again(lab, name):
    """A finished run that is started again says so and writes nothing."""
    folder = lab.folder(lab.complete(name)[0])
    before = contents(folder)
    stamps = {path: path.stat().st_mtime_ns for path in before}
    out, _ = lab.run(name, folder)
    has(out, "finished")
    unchanged(before, folder)
    check(stamps == {path: path.stat().st_mtime_ns for path in before}, "files were written again")


def workers_die(lab, name):
    """Processes that read JSONL: one is killed, then all are told to stop."""
    folder = lab.folder()
    text = shutil.copytree(prepared_pairs(lab), folder / "text", ignore=shutil.ignore_patterns(".cache"))
    rows = (text / "train.jsonl").read_text()
    (text / "train.jsonl").write_text(rows * 2000)
    flags = [f"--dataset={text}", "--max_seq_len=32", "--dataset_workers=2", "--max_steps=1"]
    for status in (1, 143):
        child = lab.start(name, folder, *flags)
        while len(workers := workers_of(child.pid)) < 2 and child.status() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        if status == 1:
            os.kill(workers[-1], signal.SIGKILL)
        else:
            child.kill(signal.SIGTERM)
        _, err = lab.end(child, status)
        if status == 1:
            has(err, "worker process died")
        time.sleep(0.5)
        check(not any(map(alive, workers)), "workers outlived the run")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def children_of(pid):
    """Return the processes that `pid` started, oldest first."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def workers_of(pid):
    """Return the processes of `pid` that read data, oldest first."""
    try:
        return [child for child in children_of(pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    except OSError:
        return []
