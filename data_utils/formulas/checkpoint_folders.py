"""Checkpoints that are folders of several files: complete or absent, verified by the hashes that one of them holds."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import torch

from data_utils import files
from data_utils.checkpoint import first_good, load_checkpoint, numbered_files, read, to_plain, writes
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.formulas.bundles import REFERENCES, save_config

FOLDER = r"checkpoint_(\d+)"
STATE = "training_state.pt"
BUNDLE = {"train.yaml", *(f"{file}.yaml" for references in REFERENCES.values() for file in references.values())}


def save_folder(path, content):
    """Write a checkpoint folder. All ranks call this, as they call save_checkpoint.

    content: ({name: state dict}, training state, bundle). Each state dict goes to <name>.pt, the training state with
    the hashes of these files to training_state.pt, the bundle to its YAML files.
    """
    path = Path(path)
    parts, state, bundle = content
    parts = to_plain(parts, keep=writes())  # before anything can fail, since all ranks take part
    if not writes():
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name, part in parts.items():
            _save(temporary / f"{name}.pt", part)
        hashes = {f"{name}.pt": _hash(temporary / f"{name}.pt") for name in parts}
        _save(temporary / STATE, to_plain(state | dict(files=hashes)))
        save_config(bundle, temporary)
        if path.exists():  # of this very step, before a resume
            if _has_only_saved_files(path):
                shutil.rmtree(path)
            else:
                files.set_aside([path])
        temporary.rename(path)
    except OSError as e:
        raise CheckpointError(f"{path} was not written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(path, state):
    files.write_atomic(path, lambda file: torch.save(state, file))


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_folder(path, kind: str, names) -> tuple[dict, dict]:
    """Return (training state, {name: state dict}) of a checkpoint folder, on the CPU. Absent parts are left out.

    Raises CheckpointError for damaged files, and for files that were not saved together.
    """
    path = Path(path)
    state = load_checkpoint(path / STATE, kind) if (path / STATE).exists() else {}
    parts = {}
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
    """Return (folder, training state, parts) that --resume-from and --fresh ask for; (None, {}, {}) to begin.

    | resume_from | takes |
    | --- | --- |
    | "", none | nothing: the run begins |
    | auto | the newest good checkpoint folder in `out`, if there is one |
    | latest | the same, which must exist |
    | an output folder | its newest good checkpoint folder |
    | a checkpoint folder | that one, without a fallback |

    Raises UsageError or DataError.
    """
    if fresh and resume_from not in ("", "none", "latest", "auto"):
        raise UsageError(f"--fresh starts over, --resume-from {resume_from} goes on: give one of them")
    if fresh or resume_from in ("", "none"):
        return None, {}, {}
    folder = Path(out if resume_from in ("latest", "auto") else resume_from)
    checkpoints = numbered_files(folder, FOLDER)
    if resume_from in ("latest", "auto") or checkpoints:
        path, content = first_good(checkpoints, lambda path: load_folder(path, kind, names))
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


def step_of(path, state: dict, given: int) -> int:
    """Return the step of a checkpoint: `given` if 0 or more, else the saved one, else that of its folder's name."""
    if given >= 0:
        return given
    name = re.fullmatch(FOLDER, Path(path).name)
    step = state.get("step", int(name[1]) if name else -1)
    if step < 0:
        raise UsageError(f"{path} does not say its step\nfix: --resume-step N")
    return step


def prune(out, interval):
    """Remove all but the newest of the rolling checkpoint folders.

    Checkpoints that this run or an earlier one was asked to keep stay: those at `interval`, steps between kept
    checkpoints (0: none), and at the interval of the run that wrote them. A folder that does not hold its flags, or
    holds other files, stays as well.
    """
    for path in numbered_files(out, FOLDER)[1:]:
        if not _at_interval(path, interval) and _has_only_saved_files(path):
            shutil.rmtree(path)


def _at_interval(path, interval):
    """Return whether the step of a checkpoint folder is at the interval of this run, or of the one that wrote it."""
    step = int(re.fullmatch(FOLDER, path.name)[1])
    try:
        earlier = read(path / STATE)["config"]["checkpoint_interval"]
    except (CheckpointError, KeyError, TypeError):
        return True
    return any(every and step % every == 0 for every in (interval, earlier))


def _has_only_saved_files(path):
    """Return whether a checkpoint folder holds nothing but what save_folder wrote."""
    try:
        names = {STATE, *BUNDLE, *read(path / STATE)["files"]}
    except (CheckpointError, KeyError, TypeError):
        return False
    return all(entry.name in names for entry in path.iterdir())


def sweep(out):
    """Remove what a killed process left half written: checkpoint folders, and files of the run beside them."""
    for torn in Path(out).glob("checkpoint_*.tmp-*"):
        if torn.is_dir() and re.fullmatch(FOLDER + files.TEMPORARY, torn.name):
            shutil.rmtree(torn, ignore_errors=True)
    names = "|".join(map(re.escape, ("metrics.jsonl", "state_dict.pt", "checkpoint", *sorted(BUNDLE))))
    files.sweep(out, f"({names})")
