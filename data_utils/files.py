"""Files that are whole or absent, locks, and what a command may replace: nothing of the user's, unasked."""

import mmap
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from data_utils.errors import CheckpointError, UsageError
from data_utils.launch import at_end

MARK = b"made by petri"  # in files that a person may also make: pictures, events
TORN = r"\.tmp-(rehearsal-)?\d+"  # how the name of a temporary file ends: the process that writes it
OF_A_RUN = r"(step_\d+|final|best_model|best_val|last|latest(\.prev)?|ema_model|model)\.(pt|yaml)"  # files of a run
OF_A_RUN = rf"({OF_A_RUN}|(meta|tokenizer)\.json|metrics\.jsonl)"


def root():
    """Return the folder of the training scripts, which {{ROOT}} stands for in bundles."""
    return Path(__file__).resolve().parent.parent


def warn(message):
    try:
        print(f"warning: {message}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, or its disk is full
        pass


def write_atomic(path, write):
    """Call write(file) on a temporary neighbour of `path`, flush it, rename it: readers see the old file or the new."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"{path} was not written: {(str(e).splitlines() or [type(e).__name__])[0]}") from e
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def holds(path, mark):
    """Return whether the bytes of a file contain `mark`; False for what can't be read."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(mark) >= 0
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def is_marked(path):
    return holds(path, MARK)


def begins(path, *starts):
    """Return whether a file begins with one of the bytes `starts`."""
    try:
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)
    except OSError:
        return False


def check_replaceable(path, fresh, made_here=lambda path: False, *, flag="--out", inputs=(), other=""):
    """Raise UsageError where writing `path` would replace a file that this command did not make.

    made_here(path): whether the content of the file proves that the command made it. With `fresh` a file without that
    proof is let through: `make_room` sets it aside. inputs: files that the command reads; it replaces none of them,
    fresh or not. other: a value of the flag that is free.
    """
    if not path or not os.path.isfile(path):  # nothing to write or to replace; or a folder, which the writer refuses
        return
    path = Path(path)
    advice = f"try: {flag} {shlex.quote(str(other or unused(path, '_new')))}"
    if any(os.path.exists(other) and os.path.samefile(path, other) for other in inputs if other):
        raise UsageError(f"{flag} {path} is a file that this command reads\n{advice}")
    if made_here(path):
        return
    if not fresh:
        raise UsageError(f"{path} exists, and nothing in it says that this command made it\n"
                         f"{advice}, or --fresh, which renames it to {backup_of(path).name}")  # fmt: skip


def make_room(path, made_here=lambda path: False):
    """Set a file aside that is about to be replaced, unless made_here(path) proves that the same command made it."""
    if os.path.isfile(path) and not made_here(path):
        set_aside([path])


def unused(path, end):
    """Return the neighbour of `path` with `end` after its stem that does not exist yet."""
    path = Path(path)
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    names = (path.with_name(f"{path.stem}{end}{number or ''}{path.suffix}") for number in (0, *range(2, 10**6)))
    return next(name for name in names if not os.path.lexists(name))


def lock_run(folder, name, *own):
    """Keep other runs out of run `name` in `folder` until main (ends_cleanly) or this process ends; return the lock.

    Raises UsageError if it is in use. Removes temporary files that a killed process left: those of files that begin
    with the name, and those of a run's files (OF_A_RUN) in the folders `own`, which hold this run alone.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = open(Path(folder) / f".{name}.lock", "a+", encoding="utf-8")
    except OSError as e:
        raise CheckpointError(f"{folder} can't be written: {e.strerror}") from e
    at_end(lambda failed: lock.close())
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise UsageError(f"{folder}: run {name} is in use by process {lock.read().strip()}") from None
    except (ImportError, OSError):  # Windows, or a network disk without locks
        warn(f"{folder} can't be locked: start each run once")
        return lock
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {platform.node()}")
    lock.flush()
    sweep(folder, rf"{re.escape(name)}([._].*)?")  # not those of a run with a longer name
    for place in own:
        sweep(place, OF_A_RUN)
    return lock


def sweep(folder, names):
    """Remove the temporary files that a killed process left of the files whose names match the regular expression."""
    for torn in Path(folder).glob("*.tmp-*"):
        if re.fullmatch(names + TORN, torn.name) and torn.is_file():
            torn.unlink(missing_ok=True)


def backup_of(path):
    """Return the first of path.bak, path.bak2, path.bak3, ... that does not exist yet."""
    path, number = Path(path), 2
    backup = path.with_name(f"{path.name}.bak")
    while os.path.lexists(backup):
        backup = path.with_name(f"{path.name}.bak{number}")
        number += 1
    return backup


def set_aside(paths):
    """Rename files or folders to *.bak, *.bak2, ..., aloud: starting over loses nothing, and no older backup."""
    for path in map(Path, paths):
        if path.exists():
            backup = backup_of(path)
            path.rename(backup)
            print(f"{path} -> {backup.name}", file=sys.stderr)


def symlink_to(link, name):
    """Make `link` a relative link to its neighbour `name`, by a rename; a copy where the system has no links."""
    link = Path(link)
    temporary = link.with_name(f"{link.name}.tmp-{os.getpid()}")
    try:
        os.symlink(name, temporary)
        os.replace(temporary, link)
    except (OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        write_atomic(link, lambda file: file.write(link.with_name(name).read_bytes()))
