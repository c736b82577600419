"""Damaged, hostile and foreign checkpoints, and which one is resumed."""

import io
import os
import re
import shutil
import zipfile

import torch

from data_utils.checkpoint import load_checkpoint, read
from data_utils.errors import CheckpointError
from data_utils.formulas.checkpoint_folders import load_folder
from faults.lab import (
    SCRIPTS,
    candidates,
    check,
    contents,
    digests,
    error_lines,
    has,
    named_words,
    newest,
    rewrite,
    truncate,
    unchanged,
)

CODES = (  # pickles in which a call of a function is written out; {} is the file that it would make
    b"cos\nsystem\n(S'touch {}'\ntR.",
    b'cbuiltins\neval\n(S\'open("{}", "w")\'\ntR.',
    b"cbuiltins\nopen\n(S'{}'\nS'w'\ntR.",
    b"(dS'kind'\nS'it'\nsS'step'\nI9\nsS'optimizer_state'\ncos\nsystem\n(S'touch {}'\ntRs.",
)


# --- damage -----------------------------------------------------------------------------------
def truncation(lab, name):
    """The newest file is cut: one warning names it, and the second newest is resumed."""
    for size in (0, 1, 4, 100, 0.5, -1):
        folder = lab.half(name)
        first, second, *_ = candidates(SCRIPTS[name], folder)
        truncate(first, size)
        out, err = lab.go_on(name, folder)
        warnings = [line for line in err.splitlines() if line.startswith("warning") and "can't be read" in line]
        check(len(warnings) == 1, f"{len(warnings)} warnings at {size}")
        pattern = rf"{re.escape(first.name)} can't be read: \w+: "
        check(re.search(pattern, warnings[0]), f"no file and type: {warnings[0]}")
        has(out, f"resumed {(second if second.name != 'training_state.pt' else second.parent).relative_to(folder)}")


def bit_rot(lab, name, flips=50):
    """Flip a bit: the file is refused, or gives what it gave; torch.load alone is the naive arm."""
    script, folder, draw = SCRIPTS[name], lab.half(name), lab.draw("bits", name)
    path = candidates(script, folder)[0]
    in_folder = script.letter == "S"
    files = sorted(path.parent.glob("*.pt")) if in_folder else [path]
    parts = [file.stem for file in files if file != path]

    def load():
        return load_folder(path.parent, "sr", parts) if in_folder else load_checkpoint(path, script.kind)

    good, plain = digests(load()), {file: digests(read(file)) for file in files}
    refused = wrong = 0
    for _ in range(flips):
        file = draw.choices(files, [file.stat().st_size for file in files])[0]
        content = file.read_bytes()
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            check(digests(load()) == good, f"another content was loaded, of bit {bit} at {place} of {file.name}")
        except CheckpointError:
            refused += 1
        try:
            wrong += digests(torch.load(file, weights_only=True)) != plain[file]
        except Exception:  # of a dozen types
            pass
        file.write_bytes(content)
    return f"{refused} of {flips} refused, the others equal; torch.load alone: {wrong} wrong"


def all_bad(lab, name):
    """Every file is cut: the error names them all and touches none."""
    folder = lab.half(name)
    paths = candidates(SCRIPTS[name], folder)
    for path in paths:
        if not path.is_symlink():
            truncate(path, 0.5)
    before = contents(folder)
    _, err = lab.run(name, folder, status=1)
    has(err, *(path.name for path in paths), "error: none of", "fresh")
    unchanged(before, folder)


def named_bad(lab, name):
    """A file that was named explicitly is cut: an error, with no fallback."""
    folder = lab.half(name)
    path = candidates(SCRIPTS[name], folder)[0]
    truncate(path, 0.5)
    before = contents(folder)
    _, err = lab.run(name, folder, *named_words(SCRIPTS[name], path), status=2, go_on=False)
    has(error_lines(err), path.name, "no fallback")
    unchanged(before, folder)


def wrong_kind(lab, name):
    """A checkpoint of another script is refused; the error names both kinds."""
    folder, script = lab.half(name), SCRIPTS[name]
    path = candidates(script, folder)[0]
    other = next(s.kind for s in SCRIPTS.values() if s.kind != script.kind)
    rewrite(path, lambda state: state.update(kind=other))
    before = contents(folder)
    _, err = lab.run(name, folder, *named_words(script, path), status=2, go_on=False)
    has(error_lines(err), other, script.kind)
    unchanged(before, folder)


def prefixes(lab, name):
    """Weights named as by torch.compile or DistributedDataParallel are taken all the same."""
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        folder = lab.half(name)

        def rename(state, prefix=prefix):
            key = next(key for key in state if key.startswith("model") and "args" not in key)
            state[key] = {prefix + name: weight for name, weight in state[key].items()}

        rewrite(candidates(SCRIPTS[name], folder)[0], rename)
        lab.go_on(name, folder)


def payloads(canary):
    """Yield twelve files that would run code: four pickles, each bare, in a zip like torch's, in a compressed one."""
    for code in (code.replace(b"{}", str(canary).encode()) for code in CODES):
        yield code
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", method) as archive:
                archive.writestr("archive/data.pkl", code)
                archive.writestr("archive/version", b"3\n")
            yield file.getvalue()


def malicious(lab, name):
    """Hostile files replace all that a run could resume, until each was there once."""
    script, loads = SCRIPTS[name], 0
    for forced in ("", "1"):
        folder = lab.half(name)
        canary = folder / "canary"
        waiting = list(payloads(canary))
        if script.snapshot:  # there may be as many candidates as payloads
            for number in range(200, 212 - len(candidates(script, folder))):
                path = folder / script.home / script.snapshot.format(number)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"")
        while waiting:
            paths = [path for path in candidates(script, folder) if not path.is_symlink()][: len(waiting)]
            for path in paths:
                path.write_bytes(waiting.pop())
            before = contents(folder)
            _, err = lab.run(name, folder, status=1, env=dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=forced))
            has(err, *(path.name for path in paths), "none of")
            check(not canary.exists(), "the code of a payload ran")
            unchanged(before, folder)
            loads += len(paths)
    return f"{loads} loads refused"


# --- which checkpoint -------------------------------------------------------------------------
def stale_interrupted(lab, name):
    """Ctrl+C early, on past a snapshot, a crash: the file of the interruption must not come back."""
    folder, seldom = lab.folder(), ["--save_minutes", "0"]
    lab.run(name, folder, *seldom, faults="signal=SIGINT:2:0", status=130)
    early = newest(SCRIPTS[name], folder)["step"]
    lab.run(name, folder, *seldom, faults="signal=SIGKILL:22:0", status=-9)
    path = candidates(SCRIPTS[name], folder)[0]
    check(not path.name.endswith("_interrupted.pt"), "the interrupted file is still there")
    check(read(path)["step"] > early, f"only step {read(path)['step']} is there")
    out, _ = lab.go_on(name, folder)
    has(out, f"resumed {path.relative_to(folder)}")


def order(lab, name):
    """The newest is the one of the highest number, whatever its name or time says."""
    script = SCRIPTS[name]
    folder = lab.half(name)
    paths = candidates(script, folder)
    unit = (lambda path: path.parent) if script.letter == "S" else (lambda path: path)  # a folder, or a file
    copy = shutil.copytree if script.letter == "S" else shutil.copy
    content = copy(unit(numbered(paths, folder)[0]), lab.folder() / "copy")
    for path in map(unit, paths):
        shutil.rmtree(path) if script.letter == "S" else path.unlink()
    for age, number in enumerate((100, 10, 9)):
        path = unit(folder / script.home / script.snapshot.format(number))
        copy(content, path)
        os.utime(path, (1e9 + age, 1e9 + age))
    out, _ = lab.run(name, folder)
    has(out, f"resumed {unit(folder / script.home / script.snapshot.format(100)).relative_to(folder)}")
    older_branch(lab, name)


def older_branch(lab, name):
    """A run that resumes an older file leaves no later file of the branch that it abandons."""
    script, folder = SCRIPTS[name], lab.folder(lab.complete(name)[0])
    oldest = numbered(candidates(script, folder), folder)[-1]
    lab.run(name, folder, *named_words(script, oldest), faults="signal=SIGKILL:2:0", go_on=False, status=-9)
    later = [path for path in candidates(script, folder) if read(path)["step"] > read(oldest)["step"] + 2]
    later = [path for path in later if "epoch" in path.name or script.letter in "HS"]  # the best file stays
    check(not later, f"of the abandoned branch: {', '.join(path.name for path in later)}")
    lab.go_on(name, folder)


def numbered(paths, folder):
    return [path for path in paths if re.search(r"\d", str(path.relative_to(folder)))]


def foreign_files(lab, name):
    """Files whose names only resemble a checkpoint's are neither resumed nor touched."""
    folder = lab.half(name)
    home = folder / SCRIPTS[name].home
    content = candidates(SCRIPTS[name], folder)[0].read_bytes()
    names = ["notes.txt", "step_x.pt", "epoch3.pt.bak", "step_99999.pt.bak", "transformer_expert_epoch99.pt.old"]
    names += ["xstep_99999.pt", "transformer_expert_epoch٣.pt", "old_transformer_expert_epoch99.pt"]
    stamps = {}
    for path in (home / foreign for foreign in names):
        path.write_bytes(content)
        stamps[path] = path.stat().st_mtime_ns
    out, _ = lab.run(name, folder)
    check(not any(foreign in out for foreign in names), f"a foreign file was resumed: {out[:300]}")
    for path, stamp in stamps.items():
        check(path.exists() and path.read_bytes() == content, f"{path.name} was touched")
        check(path.stat().st_mtime_ns == stamp, f"{path.name} was written")
        path.unlink()
    lab.same(name, folder)
