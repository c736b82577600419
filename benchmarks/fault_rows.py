"""The rows of faults.py: each function injects one fault into one script and says what differs from what must follow.

A row gets the lab and the name of a script; it raises AssertionError with what differed, NotRun where the fault can't
be injected, and returns what there is to tell beside `pass`.
"""

import io
import re
import shutil
import time
import zipfile

import torch

from benchmarks.fault_lab import (
    SCRIPTS,
    candidates,
    check,
    contents,
    digests,
    error_lines,
    flat,
    has,
    newest,
    rewritten,
    truncated,
    unchanged,
    words_of,
)
from data_utils.checkpoint import CheckpointError, load_checkpoint, named, read
from data_utils.folders import load_folder

CODES = (  # pickles in which a call of a function is written out; {} is the file that it would make
    b"cos\nsystem\n(S'touch {}'\ntR.",
    b'cbuiltins\neval\n(S\'open("{}", "w")\'\ntR.',
    b"cbuiltins\nopen\n(S'{}'\nS'w'\ntR.",
    b"(dS'kind'\nS'it'\nS'step'\nI9\nS'optimizer_state'\ncos\nsystem\n(S'touch {}'\ntRs.",
)


# --- crashes and signals ----------------------------------------------------------------------
def crash(lab, name, trials=3):
    """SIGKILL twice a trial, at a random step and moment: the same command ends as if nothing had been."""
    steps, hits = SCRIPTS[name].steps, 0
    for trial in range(trials):
        folder, draw = lab.folder(), lab.draw("crash", name, trial)
        for _ in range(2):
            fault = f"signal=SIGKILL:{draw.randrange(1, steps // 2)}:{draw.uniform(0, 30):.1f}"
            child = lab.start(name, folder, faults=fault)
            lab.end(child, (-9, 0))  # 0: it had no more than that to do
            hits += child.status() == -9
        lab.go_on(name, folder)
        lab.clean(folder)
    return f"{trials} trials, {hits} kills"


def stopped(lab, name, folder, kind, step, group=""):
    """Send a signal after a step: the run must save at the next one and leave with its status."""
    status = 130 if kind == "SIGINT" else 143
    child = lab.start(name, folder, faults=f"signal={kind}:{step}:0{group}")
    lab.end(child, status)
    return newest(SCRIPTS[name], folder)["step"]


def ctrl_c(lab, name, trials=1):
    for trial in range(trials):
        folder, draw = lab.folder(), lab.draw("ctrl_c", name, trial)
        step = draw.randrange(1, SCRIPTS[name].steps - 2)
        saved = stopped(lab, name, folder, "SIGINT", step, ":group")
        check(saved >= step, f"signal after step {step}, saved was {saved}")
        lab.go_on(name, folder)


def preemption(lab, name, signals=("SIGTERM", "SIGUSR1", "SIGHUP"), trials=1):
    """One signal after the other, each in a third of the run."""
    for trial in range(trials):
        folder, draw, saved = lab.folder(), lab.draw("preemption", name, trial), 0
        for kind in signals:
            step = draw.randrange(1, SCRIPTS[name].steps // len(signals) - 1)
            now = stopped(lab, name, folder, kind, step)
            check(now >= saved + step, f"{kind} after step {saved + step}, saved was {now}")
            saved = now
        lab.go_on(name, folder)


def doubled(lab, name):
    folder = lab.folder()
    lab.run(name, folder, faults="signal=SIGTERM:5:0 signal=SIGTERM:5:1", status=143)
    check(newest(SCRIPTS[name], folder)["step"] >= 5, "nothing was saved")
    lab.go_on(name, folder)
    folder = lab.folder()
    child = lab.start(name, folder, faults="signal=SIGINT:5:100 signal=SIGINT:5:1600 sleep=12:5")
    _, err = lab.end(child, 130)
    took = child.ended - float(re.findall(r"injected SIGINT at (\S+)", err)[-1])
    check(took < 1, f"gone {took:.1f} s after the second signal")
    read(candidates(SCRIPTS[name], folder)[0])
    lab.go_on(name, folder)
    return f"gone {took:.2f} s after the second"


SLOW = dict(  # where SIGTERM comes: in an evaluation, in tokenizing, while it waits for data
    expert=["data_utils.text.DomainText.batch:val", "data_utils.tokenizer.ByteTokenizer.encode_batch"],
    hrm=["data_utils.pairs.Pairs.batch:val"],
    multimodal=["models.multimodal.Multimodal.trace", "data_utils.shards.Shards.ready"],
)


def elsewhere(lab, name):
    most = 0
    for path in SLOW[name]:
        folder, flags = lab.folder(), []
        if "tokenizer" in path:
            shutil.copytree(lab.place / "data", folder / "data", ignore=shutil.ignore_patterns(".cache"))
            flags = [f"--data_dir={folder}/data"]
        child = lab.start(name, folder, *flags, faults=f"slow={path}")
        _, err = lab.end(child, 143)
        most = max(most, child.ended - float(re.findall(r"injected SIGTERM at (\S+)", err)[-1]))
        check(most < 2, f"gone {most:.1f} s after a signal in {path}")
        lab.clean(folder)
        lab.go_on(name, folder)
    return f"gone in {most:.2f} s"


def kill_in_save(lab, name):
    """SIGKILL in the middle of a file, before and after a rename, at the first, second and a later one."""
    hits = 0
    for where, number in [("half", 1), ("half", 3), *((w, n) for w in ("before", "after") for n in (1, 2, 5))]:
        folder = lab.folder()
        child = lab.start(name, folder, faults=f"die={where}:{number}")
        lab.end(child, (-9, 0))
        hits += child.status() == -9
        lab.go_on(name, folder)
        lab.clean(folder)
    check(hits >= 6, f"only {hits} kills")
    return f"{hits} kills"


# --- damage -----------------------------------------------------------------------------------
def truncation(lab, name):
    for size in (0, 1, 4, 100, 0.5, -1):
        folder = lab.half(name)
        first, second, *_ = candidates(SCRIPTS[name], folder)
        truncated(first, size)
        out, err = lab.go_on(name, folder)
        warned = [line for line in err.splitlines() if line.startswith("warning") and "can't be read" in line]
        check(len(warned) == 1, f"{len(warned)} warnings at {size}")
        check(re.search(rf"{re.escape(first.name)} can't be read: \w+: ", warned[0]), f"no file and type: {warned[0]}")
        has(out, f"resumed {(second if second.name != 'training_state.pt' else second.parent).relative_to(folder)}")


def bit_rot(lab, name, flips=50):
    """Flip a bit: the file is refused, or gives what it gave; torch.load alone is the naive arm."""
    script, folder, draw, wrong = SCRIPTS[name], lab.half(name), lab.draw("bits", name), 0
    path = candidates(script, folder)[0]
    files = sorted(path.parent.glob("*.pt")) if script.letter == "S" else [path]
    parts = [file.stem for file in files if file != path]

    def load():
        return load_folder(path.parent, "sr", parts) if script.letter == "S" else load_checkpoint(path, script.kind)

    good, plain = digests(load()), {file: digests(read(file)) for file in files}
    refused = 0
    for _ in range(flips):
        file = draw.choices(files, [file.stat().st_size for file in files])[0]
        whole = file.read_bytes()
        place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        try:
            check(digests(load()) == good, f"another content was loaded, of bit {bit} at {place} of {file.name}")
        except CheckpointError:
            refused += 1
        try:
            wrong += digests(torch.load(file, weights_only=True)) != plain[file]
        except Exception:  # of a dozen types
            pass
        file.write_bytes(whole)
    return f"{refused} of {flips} refused, the others equal; torch.load alone: {wrong} wrong"


def all_bad(lab, name):
    folder = lab.half(name)
    there = candidates(SCRIPTS[name], folder)
    for path in there:
        if not path.is_symlink():
            truncated(path, 0.5)
    before = contents(folder)
    _, err = lab.run(name, folder, status=1)
    has(err, *(path.name for path in there), "error: none of", "fresh")
    unchanged(before, folder)


def named_bad(lab, name):
    folder, script = lab.half(name), SCRIPTS[name]
    path = candidates(script, folder)[0]
    truncated(path, 0.5)
    before = contents(folder)
    given = path.parent if script.letter == "S" else path
    _, err = lab.run(name, folder, *words_of(script.named.format(given)), status=2, go_on=False)
    has(error_lines(err), path.name, "no fallback")
    unchanged(before, folder)


def wrong_kind(lab, name):
    folder, script = lab.half(name), SCRIPTS[name]
    path = candidates(script, folder)[0]
    other = next(s.kind for s in SCRIPTS.values() if s.kind != script.kind)
    rewritten(path, path, lambda state: state.update(kind=other))
    before = contents(folder)
    given = path.parent if script.letter == "S" else path
    _, err = lab.run(name, folder, *words_of(script.named.format(given)), status=2, go_on=False)
    has(error_lines(err), other, script.kind)
    unchanged(before, folder)


def payloads(canary):
    """Twelve files that would run code: four pickles as they are, in a zip as torch writes it, in a compressed one."""
    for code in (code.replace(b"{}", str(canary).encode()) for code in CODES):
        yield code
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", method) as archive:
                archive.writestr("archive/data.pkl", code)
                archive.writestr("archive/version", b"3\n")
            yield file.getvalue()


def malicious(lab, name):
    """Hostile files in the place of all that a run could go on from, until each was there once."""
    script, tried = SCRIPTS[name], 0
    for forced in ("", "1"):
        folder = lab.half(name)
        canary, left = folder / "canary", list(payloads(folder / "canary"))
        if script.snapshot:  # it takes as many candidates as there are
            for number in range(200, 212 - len(candidates(script, folder))):
                path = folder / script.home / script.snapshot.format(number)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"")
        while left:
            there = [path for path in candidates(script, folder) if not path.is_symlink()][: len(left)]
            for path in there:
                path.write_bytes(left.pop())
            before = contents(folder)
            _, err = lab.run(name, folder, status=1, env=dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=forced))
            has(err, *(path.name for path in there), "none of")
            check(not canary.exists(), "the code of a payload ran")
            unchanged(before, folder)
            tried += len(there)
    return f"{tried} loads refused"


# --- numbers ----------------------------------------------------------------------------------
def non_finite(lab, name):
    script, limit = SCRIPTS[name], 20 if name == "ae" else 10
    calls = 2 if name in ("expert", "mla") else 1  # of backward, in a step
    step = 6

    def state(folder, *keys):
        found = named(newest(script, folder))
        if script.letter == "S":
            found |= dict(optimizer_state=read(candidates(script, folder)[0].with_name("optimizer.pt")))
        return found

    folder = lab.folder()
    lab.run(name, folder, faults=f"signal=SIGTERM:{step - 1}:0", status=143)
    good = state(folder)
    for value in ("nan", "inf"):
        folder = lab.folder()
        faults = f"bad={value}:{step * calls + 1}:1 signal=SIGTERM:{step}:0"
        lab.run(name, folder, faults=faults, status=143)
        found = state(folder)
        check((found["step"], found["skipped"]) == (step + 1, 1), f"step {found['step']}, {found['skipped']} skipped")
        ours, theirs = (dict(flat(s["optimizer_state"]["state"])) for s in (found, good))
        check(ours == theirs and ours, f"the optimizer made a step of {value}")
        lab.run(name, folder)
        check(newest(script, folder)["skipped"] == 1, "the skipped step was not counted")
    folder = lab.folder()
    _, err = lab.run(name, folder, faults=f"bad=nan:{step * calls + 1}:1000", status=1)
    has(error_lines(err), f"{limit} steps in a row", "not finite", "lr")
    for path in candidates(script, folder):
        weights = read(path.with_name("state_dict.pt")) if script.letter == "S" else named(read(path))["model_state"]
        check(all(w.isfinite().all() for w in weights.values()), f"{path.name} is not finite")


# --- more than one ----------------------------------------------------------------------------
def two_at_once(lab, name):
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
    whole, _ = lab.whole(name)
    folder = lab.folder(whole)
    before = contents(folder)
    stamps = {path: path.stat().st_mtime_ns for path in before}
    out, _ = lab.run(name, folder)
    has(out, "finished")
    unchanged(before, folder)
    check(stamps == {path: path.stat().st_mtime_ns for path in before}, "files were written again")


# --- table ----------------------------------------------------------------------------------
ALL = "EMHSVA"
ROWS = {  # number: (fault, function, scripts by their letters, those of --ci)
    1: ("crash", crash, ALL, "E"),
    2: ("Ctrl+C", ctrl_c, ALL, "E"),
    3: ("preemption", preemption, ALL, "E"),
    4: ("doubled signal", doubled, "E", "E"),
    5: ("signal elsewhere", elsewhere, "EHV", ""),
    6: ("kill in a save", kill_in_save, "ESAV", "E"),
    7: ("truncation", truncation, "EHS", "E"),
    8: ("bit rot", bit_rot, ALL, ALL),
    9: ("all bad", all_bad, ALL, "E"),
    10: ("named file bad", named_bad, ALL, "E"),
    16: ("non-finite", non_finite, ALL, "E"),
    19: ("wrong kind", wrong_kind, ALL, "E"),
    22: ("malicious file", malicious, ALL, "E"),
    29: ("two at once", two_at_once, ALL, "E"),
    30: ("finished again", finished_again, ALL, ""),
}
