"""The rows of faults.py: each function injects one fault into one script and says what differs from what must follow.

A row gets the lab and the name of a script; it raises AssertionError with what differed, NotRun where the fault can't
be injected, and returns what there is to tell beside `pass`.
"""

import io
import os
import re
import shutil
import signal
import time
import zipfile
from pathlib import Path

import torch

from benchmarks.fault_inputs import (
    bad_jsonl,
    changed_flags,
    data_changed,
    disk_full_at_start,
    disk_full_later,
    foreign_files,
    huge_line,
    layout,
    malicious_formula,
    missing_part,
    pairs,
    path_names,
    pipes,
    prefixes,
    read_only,
    surroundings,
    tokenizer_changed,
)
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
    results,
    rewritten,
    truncated,
    unchanged,
    words_of,
)
from data_utils.checkpoint import canonical_keys, load_checkpoint, read
from data_utils.errors import CheckpointError
from data_utils.formulas.checkpoint_folders import load_folder

CODES = (  # pickles in which a call of a function is written out; {} is the file that it would make
    b"cos\nsystem\n(S'touch {}'\ntR.",
    b'cbuiltins\neval\n(S\'open("{}", "w")\'\ntR.',
    b"cbuiltins\nopen\n(S'{}'\nS'w'\ntR.",
    b"(dS'kind'\nS'it'\nsS'step'\nI9\nsS'optimizer_state'\ncos\nsystem\n(S'touch {}'\ntRs.",
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
    expert=["data_utils.text.windows.DomainText.batch:val", "data_utils.tokenizer.ByteTokenizer.encode_batch"],
    hrm=["data_utils.reasoning.dataset.Pairs.batch:val"],
    multimodal=["models.multimodal.Multimodal.trace", "data_utils.pages.shards.Shards.ready"],
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
    step = 3  # neither it nor the one before ends in an evaluation, where a signal would stop the run at once

    def state(folder):
        found = canonical_keys(newest(script, folder))
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
        if script.letter == "S":
            weights = read(path.with_name("state_dict.pt"))
        else:
            weights = canonical_keys(read(path))["model_state"]
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


# --- which checkpoint -------------------------------------------------------------------------
def stale_interrupted(lab, name):
    """Ctrl+C early, on past a snapshot, a crash: the file of the interruption must not come back."""
    folder, seldom = lab.folder(), ["--save_minutes", "0"]
    lab.run(name, folder, *seldom, faults="signal=SIGINT:2:0", status=130)
    early = newest(SCRIPTS[name], folder)["step"]
    lab.run(name, folder, *seldom, faults="signal=SIGKILL:22:0", status=-9)
    there = candidates(SCRIPTS[name], folder)
    check(not there[0].name.endswith("_interrupted.pt"), "the interrupted file is still there")
    check(read(there[0])["step"] > early, f"only step {read(there[0])['step']} is there")
    out, _ = lab.go_on(name, folder)
    has(out, f"resumed {there[0].relative_to(folder)}")


def order(lab, name):
    """Newest by number, not by name or time; and going on from an older one leaves the later branch aside."""
    script = SCRIPTS[name]
    folder = lab.half(name)
    there = candidates(script, folder)
    source = next(path for path in there if re.search(r"\d", str(path.relative_to(folder))))
    copied = source.parent if script.letter == "S" else source
    content = lab.folder() / "copy"
    shutil.copytree(copied, content) if copied.is_dir() else shutil.copy(copied, content)
    for path in there:
        shutil.rmtree(path.parent) if script.letter == "S" else path.unlink()
    for age, number in enumerate((100, 10, 9)):
        path = folder / script.home / script.snapshot.format(number)
        path = path.parent if script.letter == "S" else path
        shutil.copytree(content, path) if content.is_dir() else shutil.copy(content, path)
        os.utime(path, (1e9 + age, 1e9 + age))
    out, _ = lab.run(name, folder)
    has(out, "resumed " + str((folder / script.home / script.snapshot.format(100)).relative_to(folder)).split("/tr")[0])

    folder = lab.folder(lab.whole(name)[0])
    numbered = [path for path in candidates(script, folder) if re.search(r"\d", str(path.relative_to(folder)))]
    oldest = numbered[-1]
    given = oldest.parent if script.letter == "S" else oldest
    fault = "signal=SIGKILL:2:0"
    words = words_of(script.named.format(given))
    lab.run(name, folder, *words, faults=fault, go_on=False, status=-9)
    left = [path for path in candidates(script, folder) if read(path)["step"] > read(oldest)["step"] + 2]
    left = [path for path in left if "epoch" in path.name or script.letter in "HS"]  # the best file stays
    check(not left, f"of the branch that was left: {', '.join(p.name for p in left)}")
    lab.go_on(name, folder)


def overflow(lab, name):
    """A gradient that overflows under loss scaling: the scale is halved, and goes on halved after a resume."""
    script, fault = SCRIPTS[name], "scaler=1 bad=inf:7:1"
    whole = lab.folder()
    lab.run(name, whole, faults=fault)
    folder = lab.folder()
    lab.run(name, folder, faults=f"{fault} signal=SIGTERM:12:0", status=143)
    state = canonical_keys(newest(script, folder))
    check((state["skipped"], state["amp_scaler"]["scale"]) == (1, 32768.0), f"{state['skipped']} skipped, scale "
          f"{state['amp_scaler']['scale']}")  # fmt: skip
    lab.run(name, folder, faults="scaler=1")
    a, b = (digests(results(script, f)) for f in (whole, folder))
    check(a == b, f"{sum(a.get(key) != b.get(key) for key in a)} values differ after a resume")


def rotation(lab, name, trials=5):
    """Killed while old files are removed: there is always one that verifies."""
    flags = dict(expert=["--keep", "1"], hrm=["--checkpoint_limit", "1"])[name]
    hits, draw = 0, lab.draw("rotation", name)
    for _ in range(trials):
        folder = lab.folder()
        where = draw.choice([f"die=delete:{draw.randrange(1, 4)}", f"die=after:{draw.randrange(2, 9)}"])
        child = lab.start(name, folder, *flags, faults=where)
        lab.end(child, (-9, 0))
        hits += child.status() == -9
        read(candidates(SCRIPTS[name], folder)[0])
        lab.go_on(name, folder, *flags)
    return f"{trials} trials, {hits} kills"


def workers_die(lab, name):
    """Processes that read JSONL: one is killed, then all are told to stop."""
    folder = lab.folder()
    text = shutil.copytree(pairs(lab), folder / "text", ignore=shutil.ignore_patterns(".cache"))
    rows = (text / "train.jsonl").read_text()
    (text / "train.jsonl").write_text(rows * 2000)
    flags = [f"--dataset={text}", "--max_seq_len=32", "--dataset_workers=2", "--max_steps=1"]
    for status in (1, 143):
        child = lab.start(name, folder, *flags)
        while len(workers := workers_of(child.pid)) < 2 and child.status() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(workers[-1], signal.SIGKILL) if status == 1 else child.kill(signal.SIGTERM)
        _, err = lab.end(child, status)
        has(err, "worker process died") if status == 1 else None
        time.sleep(0.5)
        check(not any(map(alive, workers)), "workers outlived the run")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def workers_of(pid):
    """Processes started by `pid` that read data, oldest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


# --- ranks ------------------------------------------------------------------------------------
def torchrun(lab, name, folder, *flags, faults=(), more=()):
    """Two ranks of a script below torchrun, all cold."""
    lab.data(name)
    words = [*lab.words(name), *words_of(SCRIPTS[name].go_on), *map(str, flags)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *more]
    return lab.child(SCRIPTS[name].file, words, folder, faults=["figures=0", *faults], warm=False, launcher=launcher)


def pair_whole(lab, name):
    """Digests of a run on two ranks."""

    def make():
        folder = lab.folder()
        for child in ranks(lab, name, folder, 2):
            lab.end(child)
        return digests(results(SCRIPTS[name], folder))

    return lab.once(("pair", name), make)


def ranks(lab, name, folder, world, *flags, **how):
    """Warm children that are the ranks of one run; A x W stays two."""
    lab.data(name)
    if world == 1:
        return [lab.start(name, folder, *flags, **how)]
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    told = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    told |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="none")
    children = [
        lab.start(name, folder, *flags, env=told | dict(RANK=str(rank), LOCAL_RANK=str(rank)), **how)
        for rank in range(2)
    ]
    children[0].store = store  # lives as long as they do
    return children


def below(pid):
    """All processes below `pid`."""
    try:
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(p for child in children for p in below(child))]


def signalled_ranks(lab, name):
    """torchrun and its ranks hit by signals: what is left goes on to what two ranks leave without any."""
    expected, said = pair_whole(lab, name), []
    cases = [  # fault in rank 1, what the agent gets, what its ranks get too, torchrun's status
        ("", signal.SIGTERM, None, 1),
        ("", signal.SIGTERM, signal.SIGTERM, 1),
        ("", signal.SIGINT, None, 1),
        ("signal=SIGTERM:6:0", None, None, 0),
        ("signal=SIGUSR1:6:0", None, None, 0),
        ("signal=SIGKILL:6:0", None, None, 1),
        ("", signal.SIGKILL, signal.SIGKILL, -9),
    ]
    for fault, to_agent, to_ranks, status in cases:
        folder = lab.folder()
        child = torchrun(lab, name, folder, faults=[f"1@{fault}"] if fault else [])
        if to_agent:
            while not candidates(SCRIPTS[name], folder) and child.status() is None:
                time.sleep(0.01)
            processes = below(child.pid)
            if to_agent == signal.SIGKILL:
                child.kill()
            else:
                os.kill(child.pid, to_agent)
            for process in processes if to_ranks else ():
                os.kill(process, to_ranks)
        found, _, err = child.wait(600)
        check(found == status, f"status {found}, not {status}: {fault} {to_agent} {to_ranks}: {err[-300:]}")
        deadline = time.monotonic() + 60
        while to_agent and any(map(alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.1)
        check(not (to_agent and any(map(alive, processes))), "a process was left")
        for rank in ranks(lab, name, folder, 2):
            lab.end(rank)
        check(digests(results(SCRIPTS[name], folder)) == expected, f"not identical after {fault} {to_agent}")
        said.append(found)
    return f"statuses {said}"


def one_rank_fails(lab, name):
    """From the message of the rank that fails until all are gone."""
    child = torchrun(lab, name, lab.folder(), faults=["1@word=--data_dir=none"])
    while "error: " not in Path(child.logs[1]).read_text() and child.status() is None:
        time.sleep(0.05)
    start = time.monotonic()
    status, _, err = child.wait(600)
    check(status == 1, f"status {status}")
    took = child.ended - start
    check(took < 30, f"{took:.0f} s")
    check(err.count("error: ") == 1, f"{err.count('error: ')} messages: {err[-300:]}")
    check(not below(child.pid), "a process was left")
    return f"gone in {took:.0f} s"


def elastic(lab, name):
    folder = lab.folder()
    child = torchrun(lab, name, folder, faults=["1@once=" + str(folder / "once"), "1@signal=SIGKILL:6:0"],
                     more=["--max-restarts=2"])  # fmt: skip
    status, out, err = child.wait(600)
    check(status == 0, f"status {status}: {err[-300:]}")
    has(out, "resumed")
    check(digests(results(SCRIPTS[name], folder)) == pair_whole(lab, name), "not identical")
    folder = lab.folder()
    child = torchrun(lab, name, folder, faults=["1@signal=SIGTERM:6:0"], more=["--max-restarts=2"])
    status, out, err = child.wait(600)
    check(status == 0 and out.count("next: ") == 1, f"status {status}, started {out.count('next: ')} times")


def other_world(lab, name):
    """Two ranks, one, two again, as many windows a step: as two ranks all the way, nearly so without accumulation."""
    folder = lab.folder()
    flags = dict(expert={1: ["--grad_accum_steps=2"], 2: ["--grad_accum_steps=1"]},
                 hrm={1: ["--batch_size=32"], 2: ["--batch_size=16"]})[name]  # fmt: skip
    for world in (2, 1, 2):
        stop = "signal=SIGTERM:5:0"
        for child in ranks(lab, name, folder, world, *flags[world], faults=stop):
            lab.end(child, (143, 0))
    whole = lab.folder()
    for place in (folder, whole):
        for child in ranks(lab, name, place, 2, *flags[2]):
            lab.end(child)
    ours, theirs = (results(SCRIPTS[name], place) for place in (folder, whole))
    if name == "hrm":
        torch.testing.assert_close(
            *(x["checkpoints/final.pt"]["model_state"] for x in (ours, theirs)), rtol=0, atol=1e-4
        )
        return "to 1e-4"
    differ = [key for key, value in digests(theirs).items() if digests(ours).get(key) != value]
    check(not differ, f"{len(differ)} values differ: {', '.join(sorted(differ)[:3])}")


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
    11: ("stale interrupted", stale_interrupted, "EM", ""),
    12: ("order", order, "EHS", ""),
    13: ("disk full later", disk_full_later, "EA", ""),
    14: ("disk full at start", disk_full_at_start, "ES", ""),
    15: ("read-only", read_only, "EP", ""),
    16: ("non-finite", non_finite, ALL, "E"),
    17: ("fp16 overflow", overflow, "A", ""),
    18: ("changed flags", changed_flags, "EA", ""),
    19: ("wrong kind", wrong_kind, ALL, "E"),
    20: ("prefixes", prefixes, "E", ""),
    21: ("missing part", missing_part, "MEVH", ""),
    22: ("malicious file", malicious, ALL, "E"),
    23: ("malicious formula", malicious_formula, "S", ""),
    24: ("bad JSONL", bad_jsonl, "EP", ""),
    25: ("huge line", huge_line, "E", ""),
    26: ("layout", layout, "E", ""),
    27: ("data changed", data_changed, "EA", ""),
    28: ("tokenizer changed", tokenizer_changed, "EH", ""),
    29: ("two at once", two_at_once, ALL, "E"),
    30: ("finished again", finished_again, ALL, ""),
    31: ("workers die", workers_die, "H", ""),
    32: ("ranks", signalled_ranks, "E", "E"),
    33: ("one rank fails", one_rank_fails, "E", ""),
    34: ("elastic", elastic, "E", ""),
    35: ("other world", other_world, "EH", ""),
    36: ("rotation", rotation, "EH", ""),
    37: ("foreign files", foreign_files, "EH", ""),
    38: ("path names", path_names, "HA", ""),
    39: ("pipes", pipes, "E", ""),
    40: ("surroundings", surroundings, "E", ""),
}
