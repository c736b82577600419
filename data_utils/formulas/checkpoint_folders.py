"""Checkpoints that are folders of several files: whole or absent, verified by the hashes that one of them holds."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import torch

from data_utils import files
from data_utils.checkpoint import first_good, load_checkpoint, numbered_files, read, to_plain, writes
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import set_aside, write_atomic
from data_utils.formulas.bundle_files import REFERENCES, save_config

FOLDER = r"checkpoint_(\d+)"
STATE = "training_state.pt"
BUNDLE = {"train.yaml", *(f"{file}.yaml" for files in REFERENCES.values() for file in files.values())}


def save_folder(path, content):
    """Write content: ({name: state dict} as name.pt each, state with their hashes as training_state.pt, the bundle).

    Called as save_checkpoint is.
    """
    path, (parts, state, config) = Path(path), content
    parts = to_plain(parts, keep=writes())  # before anything can fail, since all processes take part
    if not writes():
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name, part in parts.items():
            _save(temporary / f"{name}.pt", part)
        files = {f"{name}.pt": _hash(temporary / f"{name}.pt") for name in parts}
        _save(temporary / STATE, state | dict(files=files))
        save_config(config, temporary)
        if path.exists():  # of this very step, before a resume
            shutil.rmtree(path) if _saved_alone(path) else set_aside([path])
        temporary.rename(path)
    except OSError as e:
        raise CheckpointError(f"{path} was not written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(path, state):
    state = to_plain(state)
    write_atomic(path, lambda file: torch.save(state, file))


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_folder(path, kind, names):
    """Return (training state, {name: state}) of a checkpoint folder, on the CPU; absent parts are left out.

    Raises CheckpointError for damage, or files that were not saved together.
    """
    path, parts = Path(path), {}
    state = load_checkpoint(path / STATE, kind) if (path / STATE).exists() else {}
    for name in names:
        file = path / f"{name}.pt"
        if file.exists():
            if state and _hash(file) != state["files"].get(file.name):
                raise CheckpointError(
                    f"{file} is not the file that was saved with {STATE}: damaged, or of another step"
                )
            parts[name] = read(file)
    return state, parts


def find_folder(resume_from, fresh, out, kind, names):
    """Return (folder, training state, parts) as --resume-from and --fresh say; (None, {}, {}) to begin.

    "" or none begins. latest must find a good checkpoint folder in `out` and takes the newest, auto takes it if there
    is one. An output folder means its own newest good one. Anything else is a checkpoint folder, without fallback.
    Raises UsageError or DataError.
    """
    if fresh and resume_from not in ("", "none", "latest", "auto"):
        raise UsageError(f"--fresh starts over, --resume-from {resume_from} goes on: give one of them")
    if fresh or resume_from in ("", "none"):
        return None, {}, {}
    folder = Path(out if resume_from in ("latest", "auto") else resume_from)
    there = numbered_files(folder, FOLDER)
    if resume_from in ("latest", "auto") or there:
        path, content = first_good(there, lambda path: load_folder(path, kind, names))
        if path:
            return path, *content
        if resume_from == "latest":
            raise DataError(f"--resume-from latest: no checkpoint in {folder}\ntry: --resume-from auto")
        return None, {}, {}
    if not folder.is_dir():
        near = ", ".join(map(str, numbered_files(folder.parent, FOLDER)[:3])) or "none"
        raise UsageError(f"--resume-from {folder}: no such folder\ncheckpoints there: {near}")
    try:
        return (folder, *load_folder(folder, kind, names))
    except DataError as e:
        raise UsageError(f"{e}\nno fallback for a named checkpoint; its output folder takes the newest good one") from e


def step_of(path, state, given):
    """Return the step of a checkpoint: as given (>= 0), else as saved, else as its folder is named."""
    named = re.fullmatch(FOLDER, Path(path).name)
    found = state.get("step", int(named[1]) if named else -1)
    if given >= 0:
        return given
    if found < 0:
        raise UsageError(f"{path} does not say its step\ntry: --resume-step N")
    return found


def prune(out, interval):
    """Remove all but the newest of the rolling checkpoint folders.

    Those that this run or an earlier one was asked to keep stay. Each folder holds the flags of the run that wrote it,
    so its own interval counts as well as `interval`, steps between checkpoints that stay (0: none). A folder that does
    not say, or that holds other files, stays.
    """
    for path in numbered_files(out, FOLDER)[1:]:
        if not _asked_for(path, interval) and _saved_alone(path):
            shutil.rmtree(path)


def _asked_for(path, interval):
    """Return whether the step of a checkpoint folder is at the interval of this run, or of the one that wrote it."""
    step = int(re.fullmatch(FOLDER, path.name)[1])
    try:
        earlier = read(path / STATE)["config"]["checkpoint_interval"]
    except (CheckpointError, KeyError, TypeError):
        return True
    return any(every and step % every == 0 for every in (interval, earlier))


def _saved_alone(path):
    """Return whether a checkpoint folder holds nothing but what save_folder wrote."""
    try:
        files = {STATE, *BUNDLE, *read(path / STATE)["files"]}
    except (CheckpointError, KeyError, TypeError):
        return False
    return all(entry.name in files for entry in path.iterdir())


def sweep(out):
    """Remove what a killed process left half written: checkpoint folders, and the files of a run beside them."""
    for torn in Path(out).glob("checkpoint_*.tmp-*"):
        if torn.is_dir() and re.fullmatch(FOLDER + files.TEMPORARY, torn.name):
            shutil.rmtree(torn, ignore_errors=True)
    names = "|".join(map(re.escape, ("metrics.jsonl", "state_dict.pt", "checkpoint", *sorted(BUNDLE))))
    files.sweep(out, f"({names})")
