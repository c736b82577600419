"""Atomic writes, locks and backups. No command replaces a file of the user's unless told to."""

import contextlib
import mmap
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from data_utils.advice import pasteable
from data_utils.errors import CheckpointError, UsageError
from data_utils.launch import at_end

MARK = b"made by petri"  # stands in files that other programs write too: pictures, events
TEMPORARY = r"\.tmp-(rehearsal-)?\d+"  # end of the name of a temporary file: the id of the writing process
RUN_FILES = (  # names of the files that a training run writes
    r"((step_\d+|final|best_model|best_val|last|latest(\.prev)?|ema_model|model)\.(pt|yaml)"
    r"|(meta|tokenizer)\.json|metrics\.jsonl)"
)


def root():
    """Return the folder of the training scripts, which {{ROOT}} stands for in bundles."""
    return Path(__file__).resolve().parent.parent


def warn(message):
    """Print a warning to stderr; a closed or full stderr is ignored."""
    try:
        print(pasteable(f"warning: {message}"), file=sys.stderr, flush=True)
    except OSError:
        pass


def write_atomic(path, write):
    """Call write(file) on a temporary file, flush it and rename it to `path`.

    Readers see either the old file or the new one. Raises CheckpointError; the old file then stays.
    """
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
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{path} was not written: {reason}") from e
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must survive a power cut
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def holds(path, mark):
    """Return whether a file contains the bytes `mark`; False if it can't be read."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(mark) >= 0
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def is_marked(path):
    """Return whether a file contains MARK."""
    return holds(path, MARK)


def begins(path, *starts):
    """Return whether a file begins with one of the bytes `starts`; False if it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)
    except OSError:
        return False


def check_replaceable(path, fresh, made_here=lambda path: False, *, flag="--out", inputs=(), other=""):
    """Raise UsageError if writing `path` would replace a file that this command did not make.

    made_here(path) says whether the content of the file proves that this command made it.
    With `fresh`, other files pass too: `make_room` renames them later.
    inputs: files that the command reads. It never replaces one, even with `fresh`.
    other: a free value of the flag, for the message.
    """
    if not path or not os.path.isfile(path):  # nothing to replace; a folder is refused by the writer
        return
    path = Path(path)
    free = other or unused(path, "_new")
    advice = f"try: {flag} {shlex.quote(str(free))}"
    for source in inputs:
        if source and os.path.exists(source) and os.path.samefile(path, source):
            raise UsageError(f"{flag} {path} is a file that this command reads\n{advice}")
    if made_here(path) or fresh:
        return
    raise UsageError(
        f"{path} exists, and nothing in it says that this command made it; "
        f"--fresh renames it to {backup_of(path).name}\n"
        f"{advice}\n"
        "try: --fresh"
    )


def make_room(path, made_here=lambda path: False):
    """Rename a file that is about to be replaced to *.bak, unless made_here(path) proves that the command made it."""
    if os.path.isfile(path) and not made_here(path):
        set_aside([path])


def unused(path, end):
    """Return a neighbour of `path` that does not exist yet: `end`, and a number if needed, follows its stem."""
    path = Path(path)
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    names = (path.with_name(f"{path.stem}{end}{number or ''}{path.suffix}") for number in (0, *range(2, 10**6)))
    return next(name for name in names if not os.path.lexists(name))


class _RunLock:
    """A lock file. If the `with` block or main that holds it fails, it goes, and the folders that were new for it."""

    def __init__(self, path):
        self.created = [p for p in (path, *path.parents) if not os.path.lexists(p)]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+", encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.release(kind is not None)

    def close(self):
        self.release(failed=False)

    def release(self, failed):
        """Release the lock; a lock that is released already stays so."""
        if failed and not self.file.closed:
            with contextlib.suppress(OSError):  # a folder that holds more, or Windows, where an open file stays
                for path in self.created:
                    if path.is_dir():
                        path.rmdir()
                    else:
                        path.unlink()
        self.file.close()

    def is_gone(self, path):
        """Return whether another file stands at `path`, or none: the run that held this one has failed."""
        try:
            return not os.path.samestat(os.fstat(self.file.fileno()), os.stat(path))
        except OSError:
            return True


def lock_run(folder, name, *run_folders):
    """Lock run `name` in `folder` until main (ends_cleanly) or this process ends; return the lock.

    Also removes temporary files that a killed process left: those of files whose names begin with `name`,
    and those of RUN_FILES in `run_folders`, which belong to this run alone. A main that fails leaves neither the lock
    nor an empty folder, unless they were there before. Raises UsageError if the run is locked.
    """
    path = Path(folder) / f".{name}.lock"
    try:
        lock = _RunLock(path)
    except OSError as e:
        raise CheckpointError(f"{folder} can't be written: {e.strerror}") from e
    at_end(lock.release)
    try:
        import fcntl

        fcntl.flock(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.file.seek(0)
        holder = lock.file.read().strip()
        lock.close()
        raise UsageError(f"{folder}: run {name} is in use by process {holder}") from None
    except (ImportError, OSError):  # Windows, or a network disk without locks
        warn(f"{folder} can't be locked: start each run once")
        return lock
    if lock.is_gone(path):
        lock.close()
        return lock_run(folder, name, *run_folders)
    lock.file.truncate(0)
    lock.file.write(f"{os.getpid()} on {platform.node()}")
    lock.file.flush()
    sweep(folder, rf"{re.escape(name)}([._].*)?")  # not the files of a run with a longer name
    for run_folder in run_folders:
        sweep(run_folder, RUN_FILES)
    return lock


def sweep(folder, names):
    """Remove temporary files that a killed process left; `names` is a regular expression of the final names."""
    for path in Path(folder).glob("*.tmp-*"):
        if re.fullmatch(names + TEMPORARY, path.name) and path.is_file():
            path.unlink(missing_ok=True)


def backup_of(path):
    """Return the first of path.bak, path.bak2, path.bak3, ... that does not exist yet."""
    path = Path(path)
    backup = path.with_name(f"{path.name}.bak")
    number = 2
    while os.path.lexists(backup):
        backup = path.with_name(f"{path.name}.bak{number}")
        number += 1
    return backup


def set_aside(paths):
    """Rename files or folders to *.bak, *.bak2, ... and print each; no older backup is replaced."""
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
