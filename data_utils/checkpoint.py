"""Plain torch checkpoints: whole or absent, verified when read, tensors and plain Python only.

Imports torch where tensors are: prepare_data.py writes files too, and has none.
"""

import math
import os
import re
import shutil
import zipfile
from pathlib import Path

from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import set_aside, warn, write_atomic

PLAIN = (int, float, str, bool, bytes, type(None))
FAILED_SAVES = 3  # rolling saves in a row that fail before a run gives up
FOLDER = 0x10  # attribute of a zip's entry, outside all checksums: torch reads whatever memory holds for a tensor's
OTHER_NAMES = dict(  # old ones, read but never written; and those of train_multimodal.py's guide
    model_state=("model", "model_state_dict"), optimizer_state=("optimizer", "optimizer_state_dict"),
    amp_scaler=("scaler",), ema_state=("ema_state_dict",),
)  # fmt: skip


def writes():
    """Whether this process, of those that train one model, is the one that writes."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def full_tensor(tensor):
    """Return a tensor whole: of one that processes share (FSDP2) all of them give their part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(whole, own):
    """Return of a tensor the part that this process keeps of `own`: all of it, unless processes share that."""
    if not hasattr(own, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)  # each has read the file


def to_plain(x, path="checkpoint", keep=True):
    """Return a copy of `x` on the CPU. Raises TypeError, with the key's path, on what weights_only would refuse.

    Tensors that processes share are gathered, for which each calls this. keep False: None instead of any tensor.
    """
    import torch

    if isinstance(x, torch.Tensor):
        whole = full_tensor(x.detach())
        return whole.to("cpu", copy=True) if keep else None
    if type(x) is dict or type(x).__name__ == "OrderedDict":
        return {k: to_plain(v, f"{path}.{k}", keep) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(to_plain(v, f"{path}[{i}]", keep) for i, v in enumerate(x))
    if type(x) in PLAIN:
        return x
    raise TypeError(f"{path} is a {type(x).__module__}.{type(x).__name__}; save tensors and plain Python only")


def canonical_keys(state):
    """Return what a file holds under the names that are used here."""
    found = {new: state[old] for new, others in OTHER_NAMES.items() for old in others if old in state}
    return found | state


def save_checkpoint(path, state):
    """Write `state` to `path`; what was there stays if anything fails. Refuses weights that are not finite.

    Each process calls this where they share weights, else one is enough; the first one writes.
    """
    import torch

    state = to_plain(state, keep=writes())
    if not writes():
        return
    weights = canonical_keys(state).get("model_state", {}).values()
    if not all(w.isfinite().all() for w in weights if w.is_floating_point()):
        raise CheckpointError(f"{path} was not written: weights are not finite")
    write_atomic(path, lambda file: torch.save(state, file))


def read(path):
    """Return the tensors and plain Python in a file, on the CPU. Raises CheckpointError on any damage."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum: most flipped bits would go unseen
            about = [(entry.compress_type, entry.external_attr & FOLDER) for entry in archive.infolist()]
            if any(part != (zipfile.ZIP_STORED, 0) for part in about) or archive.testzip() is not None:
                raise ValueError("checksum differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason, culprit = (str(e).splitlines() or [""])[0], re.search(r"GLOBAL (\S+)", str(e))
        if reason.startswith("Weights only load failed"):  # where torch goes on to advise an unsafe load
            reason = f"holds {culprit[1] if culprit else 'a pickle'}, not tensors and plain Python only"
        raise CheckpointError(f"{path} can't be read: {type(e).__name__}: {reason}") from e


def load_checkpoint(path, kinds):
    """Return what was saved, on the CPU. Raises CheckpointError on any damage, UsageError if not one of `kinds`."""
    state = read(path)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(state, dict) or state.get("kind") not in kinds:
        found = state.get("kind") if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"{path} is of kind {found}, expected {' or '.join(kinds)}")
    return state


def numbered_files(folder, pattern):
    """Files of `folder` that match the regular expression whole, largest number first (not by name, not by mtime)."""
    found = [(int(m[1]), p) for p in Path(folder).glob("*") if (m := re.fullmatch(pattern, p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def by_step(files, final, kind):
    """Return step files (largest number first) with `final` among them by the step that it holds; first if unreadable.

    So that what cannot be read is named, and of two with the same step the final one is taken.
    """
    if not final.exists():
        return files or [final]
    try:
        step = load_checkpoint(final, kind)["step"]
    except CheckpointError:
        step = math.inf
    place = sum(int(re.search(r"\d+", p.stem)[0]) > step for p in files)
    return [*files[:place], final, *files[place:]]


def first_good(paths, load):
    """Return (path, load(path)) of the first checkpoint that loads, warning about each that does not.

    (None, None) for none. Raises CheckpointError when there are candidates and all are bad: never start over silently.
    """
    bad = []
    for path in filter(os.path.exists, paths):
        try:
            return path, load(path)
        except CheckpointError as e:
            bad.append(str(e))
            warn(f"{e}; trying the next one")
    if bad:
        raise CheckpointError(f"none of {len(bad)} checkpoints can be read\ntry: --fresh to start over")
    return None, None


def find_checkpoint(resume, fresh, files, kind):
    """Return (path, state) as --resume and --fresh say; (None, None) to begin.

    resume: "" or none begins, latest must find one of `files` (best first), auto takes one if there is one, anything
    else is a file, without fallback. Raises UsageError or CheckpointError.
    """
    if fresh and resume not in ("", "none", "latest", "auto"):
        raise UsageError(f"--fresh starts over, --resume {resume} goes on: give one of them")
    if fresh or resume in ("", "none"):
        return None, None
    if resume in ("latest", "auto"):
        path, state = first_good(files, lambda path: load_checkpoint(path, kind))
        if not state and resume == "latest":
            names = ", ".join(p.name for p in files)
            raise DataError(f"--resume: nothing in {files[0].parent} like {names}\ntry: the command without --resume")
        return path, state
    if not os.path.isfile(resume):
        there = ", ".join(str(p) for p in files if p.exists()) or "none"
        raise UsageError(f"--resume {resume}: no such file\ncheckpoints of this run: {there}")
    try:
        return Path(resume), load_checkpoint(resume, kind)
    except CheckpointError as e:
        raise UsageError(f"{e}\nno fallback for a named file; --resume alone takes the newest good one") from e


def load_parts(parts, state, path, about, allow_partial=None, same_data=""):
    """Load state[name] into parts[name] (model, optimizer, scaler). Raises UsageError, listing keys, unless all fits.

    `about` is what this run would save about itself: tokenizer and model_args must be those of the file.
    With allow_partial (None: the script has no such flag) the weights that fit are loaded, the rest is listed, and the
    optimizer starts anew. The run's weight decay and betas stand: torch would put back the file's without a word. The
    rate is the schedule's business.
    same_data: the flags that say which data it is, where other data than the file's are an error too.
    """
    if state.get("tokenizer_hash") != about.get("tokenizer_hash"):
        theirs, ours = (f"{a['tokenizer']} ({a['tokenizer_hash'][:8]})" for a in (state, about))
        raise UsageError(f"{path} was trained with tokenizer {theirs}, this run has {ours}")
    if same_data and state["data_hash"] != about["data_hash"]:
        raise UsageError(f"{path} was trained on other data: data_hash {state['data_hash'][:8]}, here "
                         f"{about['data_hash'][:8]}\ntry: the {same_data} that it was trained with")  # fmt: skip
    differs = changed(state["model_args"], about["model_args"])
    if differs and not allow_partial:
        remedy = "the settings it was trained with, or another folder"
        remedy = remedy if allow_partial is None else "--allow_partial loads what fits"
        raise UsageError(f"{path} has another model: {differs}\ntry: {remedy}")
    state, model = canonical_keys(state), parts["model_state"]
    if "optimizer_state" in parts and "optimizer_state" not in state:
        raise UsageError(f"{path} holds weights to be used, not a run to go on with\ntry: latest.pt beside it")
    saved = {re.sub(r"^(_orig_mod\.|module\.)+", "", k): v for k, v in state["model_state"].items()}
    own = model.state_dict()
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [k for k in own.keys() & saved.keys() if own[k].shape != saved[k].shape]
    if missing or extra or shapes:
        lists = dict(missing=missing, extra=extra, **{"wrong shape": sorted(shapes)})
        found = "; ".join(f"{len(v)} {k}: {', '.join(v[:3])}" for k, v in lists.items() if v)
        fits = {k: v for k, v in saved.items() if k in own and k not in shapes}
        share = sum(v.numel() for v in fits.values()) / max(1, sum(v.numel() for v in own.values()))
        if not allow_partial:
            remedy = "" if allow_partial is None else f"\ntry: --allow_partial loads {share:.0%} of it"
            raise UsageError(f"{path} does not fit this model: {found}{remedy}")
        if share < 0.5:
            raise UsageError(f"{path} fits only {share:.0%} of this model: {found}")
        warn(f"{path}: {found}; {share:.0%} loaded, the optimizer starts anew")
        model.load_state_dict({k: shared_like(v, own[k]) for k, v in fits.items()}, strict=False)
        state = {}  # nothing else fits
    else:
        model.load_state_dict({k: shared_like(v, own[k]) for k, v in saved.items()})
    for name, part in parts.items():
        if part is model:
            continue
        if not state.get(name):  # an empty scaler is that of a run without one
            if hasattr(part, "restart"):  # averaged weights begin as the loaded ones, not as random ones
                part.restart()
            continue
        if name == "optimizer_state":
            slots = _checked(part, state[name], path)
            pairs = zip(part.state_dict()["param_groups"], state[name]["param_groups"], strict=False)
            groups = [own | dict(lr=old.get("lr", own["lr"])) for own, old in pairs]
            part.load_state_dict(state[name] | dict(state=slots, param_groups=groups))
        else:
            now = part.state_dict()
            part.load_state_dict({k: shared_like(v, now.get(k)) for k, v in state[name].items()})


def _checked(optimizer, saved, path):
    """Return the states of an optimizer, shared like its parameters.

    Raises UsageError for shapes that don't fit: torch accepts any here and fails at the next step.
    """
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, slots in saved["state"].items():
        tensors = {name: t for name, t in slots.items() if torch.is_tensor(t) and t.ndim}
        whole = [t for name, t in tensors.items() if not name.endswith(("_codes", "_scales"))]  # not in blocks
        if i >= len(parameters) or any(t.shape != parameters[i].shape for t in whole):
            raise UsageError(f"{path}: optimizer state {i} does not fit its parameter")
        slots.update({name: shared_like(t, parameters[i]) for name, t in tensors.items()})
    return saved["state"]


def changed(old, new, cosmetic=()):
    """Return 'lr 0.0003 -> 0.001, ...' for the keys of `new` that differ in `old`, but for the cosmetic ones; or ''."""
    keys = [k for k in new if k in old and k not in cosmetic and _listed(old[k]) != _listed(new[k])]
    return ", ".join(f"{k} {old[k]} -> {new[k]}" for k in keys)


def _listed(x):
    return list(x) if isinstance(x, tuple) else x


def resume_notice(path, state, about, cosmetic):
    """Return the line that says what a run goes on from, and which changes end exact resuming.

    As many micro-batches a step, on more processes or on fewer, are the same step.
    """
    names = ("data_hash", "world_size", "steps")
    facts = [{n: s[n] for n in names} for s in (state, about)]
    # Facts win: the schedule's true length, where config may say that it follows from the epochs.
    old, new = (fact | s["config"] | fact for fact, s in zip(facts, (state, about), strict=True))
    split = [n for n in ("grad_accum_steps", "gradient_accumulation_steps", "world_size") if n in old and n in new]
    if len(split) == 2 and math.prod(old[n] for n in split) == math.prod(new[n] for n in split):
        cosmetic = (*cosmetic, *split)
    differs = changed(old, new, cosmetic)
    return f"resumed {path} at step {state['step']}" + f", {differs}: exact resume is lost" * bool(differs)


class Saver:
    """saver(path, state, must): save; a rolling save (must=False) may fail FAILED_SAVES - 1 times in a row."""

    def __init__(self, save=save_checkpoint):
        self.save, self.failed, self.last = save, 0, "none of this run"

    def __call__(self, path, state, must=True):
        try:
            self.save(path, state)
            self.failed, self.last = 0, path
        except CheckpointError as e:
            self.failed += 1
            if must or self.failed == FAILED_SAVES:
                raise CheckpointError(f"{e}\nlast good file: {self.last}") from e
            warn(f"{e}; what was there stays, training goes on")


def rehearse(folder, name, state):
    """Write `state` into `folder`, read it back, remove it; return the size in bytes that a checkpoint will have.

    Called as save_checkpoint is; the processes that write nothing return 0.

    Raises CheckpointError when that fails or there is no room for two of them: better now than after a night.
    """
    trial = Path(folder) / f"{name}.tmp-rehearsal-{os.getpid()}"
    try:
        save_checkpoint(trial, state)
        if not writes():
            return 0
        load_checkpoint(trial, state["kind"])
        size = trial.stat().st_size
    finally:
        if trial.parent.is_dir():
            trial.unlink(missing_ok=True)
    if not state["step"]:  # AdamW is empty before its first step; then it has two numbers of 4 bytes a parameter
        size += 8 * sum(p.numel() for p in canonical_keys(state)["model_state"].values())
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise CheckpointError(f"{folder} has {free / 1e6:.0f} MB free, a run needs {2 * size / 1e6:.0f} MB")
    return size


def rotate(paths, keep):
    """Remove all but the first `keep` of `paths` (newest first), once the newest reads well; 0 keeps all."""
    if not keep or len(paths) <= keep:
        return
    try:
        with zipfile.ZipFile(paths[0]) as newest:
            good = newest.testzip() is None
    except (OSError, zipfile.BadZipFile):
        good = False
    for path in paths[keep:] if good else ():
        path.unlink(missing_ok=True)


def set_aside_later(paths, step):
    """Set aside those of the step files or folders `paths` that are of a later step than a run goes on from.

    They are of a branch that is left, or damaged: the next start must not take them, nor `rotate` keep them as newest.
    A file without a number in its name is asked for its step.
    """
    later = []
    for path in filter(os.path.exists, paths):
        number = re.search(r"\d+", Path(path).stem)
        try:
            later += [path] * ((int(number[0]) if number else read(path)["step"]) > step)
        except CheckpointError:  # it was named when it was passed over
            continue
    set_aside(later)
