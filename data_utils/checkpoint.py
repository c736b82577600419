"""Plain torch checkpoints: written atomically, verified when read, tensors and plain Python only.

Imports torch inside functions: prepare_data.py also imports this file and runs without torch.
"""

import math
import os
import pickletools
import re
import shlex
import shutil
import zipfile
from pathlib import Path

from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import root, set_aside, unused, warn, write_atomic

PRETRAINED = root() / "checkpoints" / "pretrained"  # models that come with the repo
PLAIN = (int, float, str, bool, bytes, type(None))
EXPORTED = {".pt2": "torch.export.load", ".safetensors": "safetensors.torch.load_file"}
LEAST_SHARE = 0.5  # of the numbers of a model that must fit for --allow_partial
FAILED_SAVES = 3  # rolling saves that may fail in a row before a run gives up
# This bit of a zip entry is in no checksum. If it flips, torch fills the tensor with uninitialized memory.
FOLDER = 0x10
# Arguments of models that change what training does, not what the weights mean.
TRAINING_ONLY = """dropout encoder_dropout decoder_dropout pre_encoder_noise_scale entropy_reg balance_reg z_reg vq_beta
use_checkpointing enable_gradient_checkpointing""".split()
OTHER_NAMES = {  # read, never written: old names, and those of train_multimodal.py's guide
    "model_state": ("model", "model_state_dict"),
    "optimizer_state": ("optimizer", "optimizer_state_dict"),
    "amp_scaler": ("scaler",),
    "ema_state": ("ema_state_dict",),
}


def writes():
    """Return whether this process is the one of its run that writes files."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def full_tensor(tensor):
    """Return the full tensor; for an FSDP2-sharded one all ranks must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(tensor, local):
    """Return the part of a full tensor that this rank holds of the FSDP2-sharded `local`; all of it if not sharded."""
    if not hasattr(local, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: nothing is sent, since every rank has read the file
    return distribute_tensor(tensor, local.device_mesh, local.placements, src_data_rank=None)


def to_plain(x, path="checkpoint", keep=True):
    """Return a copy of `x` on the CPU, with full tensors. keep=False puts None in place of each tensor.

    All ranks must call this if tensors are sharded. Raises TypeError, naming the key, for a type that
    torch.load(weights_only=True) would refuse.
    """
    import torch

    if isinstance(x, torch.Tensor):
        tensor = full_tensor(x.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if type(x) is dict or type(x).__name__ == "OrderedDict":
        return {k: to_plain(v, f"{path}.{k}", keep) for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(to_plain(v, f"{path}[{i}]", keep) for i, v in enumerate(x))
    if type(x) in PLAIN:
        return x
    raise TypeError(f"{path} is a {type(x).__module__}.{type(x).__name__}; save tensors and plain Python only")


def canonical_keys(state):
    """Return `state` with the keys that this project uses added for those of OTHER_NAMES."""
    renamed = {new: state[old] for new, others in OTHER_NAMES.items() for old in others if old in state}
    return renamed | state


def save_checkpoint(path, state):
    """Write `state` to `path`. If anything fails, the old file stays.

    The first rank writes. All ranks must call this if weights are sharded. Raises CheckpointError, also for
    weights that are not finite.
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
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum and would miss most flipped bits
            entries = archive.infolist()
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            folders = any(entry.external_attr & FOLDER for entry in entries)
            if not plain or folders or archive.testzip() is not None:
                raise ValueError("checksum differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        if reason.startswith("Weights only load failed"):  # torch's own message advises an unsafe load
            culprit = re.search(r"GLOBAL (\S+)", str(e))
            reason = f"holds {culprit[1] if culprit else 'a pickle'}, not tensors and plain Python only"
        remedy = "" if Path(path).suffix in ("", ".pt", *EXPORTED) else "\nfix: a checkpoint, whose name ends in .pt"
        if Path(path).suffix in EXPORTED:
            remedy = f"\nfix: the checkpoint that it was exported from; {EXPORTED[Path(path).suffix]} reads this file"
        raise CheckpointError(f"{path} can't be read: {type(e).__name__}: {reason}{remedy}") from e


def by_name(path):
    """Return the file of the pretrained model that `path` names; `path` itself if it exists or names none."""
    file = PRETRAINED / f"{path}.pt"
    if Path(path).name == str(path) and not os.path.exists(path) and file.is_file():
        return str(file)
    return path


def kind_of(path):
    """Return the kind that a checkpoint says it is of, or the first checkpoint in the folder of a run; "" if none does.

    Reads the pickle's opcodes without running them, and without torch. A folder with model.yaml is of kind "sr".
    """
    path = Path(path)
    if path.is_dir():
        if any(path.glob("model.yaml")) or any(path.glob("checkpoint_*/model.yaml")):
            return "sr"
        patterns = ("*.pt", "checkpoints/*.pt", "best-model/*.pt")
        kinds = (kind_of(file) for pattern in patterns for file in sorted(path.glob(pattern)))
        return next(filter(None, kinds), "")
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            texts = (value for _, value, _ in pickletools.genops(archive.read(name)) if isinstance(value, str))
            if any(text == "kind" for text in texts):  # the next text is its value
                return next(texts, "")
    except (OSError, ValueError, zipfile.BadZipFile):  # no checkpoint, or damaged: its reader says so
        pass
    return "sr" if (path.parent / "model.yaml").is_file() and path.suffix == ".pt" else ""


def load_checkpoint(path, kinds):
    """Return the state in a checkpoint, on the CPU.

    Raises CheckpointError on any damage, UsageError if state["kind"] is not one of `kinds` (a str or several).
    """
    state = read(path)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(state, dict) or state.get("kind") not in kinds:
        kind = state.get("kind") if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"{path} is of kind {kind}, expected {' or '.join(kinds)}")
    return state


def numbered_files(folder, pattern):
    """Return the files of `folder` whose names match `pattern`, by its first group, the largest number first."""
    matches = [(re.fullmatch(pattern, path.name), path) for path in Path(folder).glob("*")]
    numbered = [(int(match[1]), path) for match, path in matches if match]
    return [path for _, path in sorted(numbered, reverse=True)]


def by_step(files, final, kind):
    """Return step files (largest number first) with `final` inserted by its step, before a file of the same step.

    An unreadable `final` comes first, so that the reader names it.
    """
    if not final.exists():
        return files or [final]
    try:
        step = load_checkpoint(final, kind)["step"]
    except CheckpointError:
        step = math.inf
    place = sum(int(re.search(r"\d+", path.stem)[0]) > step for path in files)
    return [*files[:place], final, *files[place:]]


def first_good(paths, load):
    """Return (path, load(path)) of the first checkpoint that loads; warn about each one before it.

    Returns (None, None) if no file exists. Raises CheckpointError if files exist and none loads: a run never
    starts over silently.
    """
    unreadable = 0
    for path in filter(os.path.exists, paths):
        try:
            return path, load(path)
        except CheckpointError as e:
            unreadable += 1
            warn(f"{e}; trying the next one")
    if unreadable:
        raise CheckpointError(f"none of {unreadable} checkpoints can be read; --fresh starts over\ntry: --fresh")
    return None, None


def find_checkpoint(resume, fresh, files, kind, init_from=""):
    """Return the (path, state) that --resume and --fresh ask for; (None, None) to start from step 0.

    resume: "" and "none" start from step 0. "latest" takes the first readable one of `files` and fails if there is
    none, unless init_from has weights for a new run. "auto" takes it if there is one. Any other value is a path,
    without fallback. Raises UsageError, DataError or CheckpointError.
    """
    if fresh and resume not in ("", "none", "latest", "auto"):
        raise UsageError(f"--fresh starts over, --resume {resume} continues: give one of them")
    if fresh or resume in ("", "none"):
        return None, None
    if resume in ("latest", "auto"):
        path, state = first_good(files, lambda path: load_checkpoint(path, kind))
        if not state and resume == "latest" and not init_from:
            names = ", ".join(path.name for path in files)
            raise DataError(f"--resume: {files[0].parent} has no checkpoint named {names}\ntry: without --resume")
        return path, state
    if not os.path.isfile(resume):
        existing = ", ".join(str(path) for path in files if path.exists()) or "none"
        raise UsageError(f"--resume {resume}: no such file\ncheckpoints of this run: {existing}")
    try:
        return Path(resume), load_checkpoint(resume, kind)
    except CheckpointError as e:
        raise UsageError(f"{e}\nno fallback for a named file; --resume alone takes the newest good one") from e


def load_parts(parts, state, path, header, allow_partial=None, same_data=""):
    """Load state[name] into parts[name] (model, optimizer, scaler, ...).

    header: what this run would save; its tokenizer and model_args must equal those of the file. allow_partial: the
    weights that fit are loaded, the others are listed, and the optimizer starts anew (None: the script has no such
    flag). same_data: the flags that choose the data, in scripts that refuse a checkpoint of other data.
    Weight decay and betas stay those of this run; torch would silently restore those of the file. The learning rate
    follows from the schedule. Raises UsageError, listing the keys, if something does not fit.
    """
    _check_header(state, path, header, same_data)
    differs = changed(state["model_args"], header["model_args"])
    state = canonical_keys(state)
    model = parts["model_state"]
    if "optimizer_state" in parts and "optimizer_state" not in state:
        raise UsageError(f"{path} holds weights alone: training can't continue from it\nfix: latest.pt beside it")
    saved = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): w for name, w in state["model_state"].items()}
    weights = model.state_dict()
    if differs and not allow_partial:
        raise UsageError(f"{path} has another model: {differs}{_remedy(_share(saved, weights), allow_partial)}")
    fitting = _fitting(saved, weights, path, allow_partial)
    complete = len(fitting) == len(weights) == len(saved)
    model.load_state_dict({name: shared_like(w, weights[name]) for name, w in fitting.items()}, strict=complete)
    if not complete:
        state = {}  # nothing else fits
    for name, part in parts.items():
        if part is model:
            continue
        if not state.get(name):  # also the empty scaler of a run without one
            if hasattr(part, "restart"):  # averaged weights start from the loaded ones, not from random ones
                part.restart()
            continue
        if name == "optimizer_state":
            slots = _fitting_slots(part, state[name], path)
            pairs = zip(part.state_dict()["param_groups"], state[name]["param_groups"], strict=False)
            groups = [group | dict(lr=old.get("lr", group["lr"])) for group, old in pairs]
            part.load_state_dict(state[name] | dict(state=slots, param_groups=groups))
        else:
            current = part.state_dict()
            part.load_state_dict({key: shared_like(v, current.get(key)) for key, v in state[name].items()})


def load_source(path, kind):
    """Return the checkpoint that --init_from names, with averaged weights if it has them.

    Raises UsageError for a file that is missing or of another kind, CheckpointError for a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        names = ", ".join(str(file) for file in sorted([*folder.glob("*.pt"), *folder.glob("*/*.pt")])[:5]) or "none"
        problem = "a folder, expected a file" if path.is_dir() else "no such file"
        raise UsageError(f"--init_from {path}: {problem}\ncheckpoints there: {names}")
    other = kind_of(path)
    if other == "token_grid":  # of prepare_data.py weights
        raise UsageError(f"--init_from {path} holds published weights\nfix: a checkpoint of kind {kind}")
    if other and other != kind:
        family, _, member = other.replace("expert:mla", "mla").partition(":")
        words = [f"train_{family}.py", *(["--expert", member] if family == "expert" else [])]
        words += ["--resume" if family == "ae" else "--init_from", str(path)]  # train_ae.py has no --init_from
        advice = f"python {shlex.join(words)}"
        if family == "expert" and kind.startswith("expert:") and kind != "expert:mla":
            advice = f"--expert {member}"  # the same script: its other flags stay
        raise UsageError(f"--init_from {path} is of kind {other}, expected {kind}\ntry: {advice}")
    state = canonical_keys(load_checkpoint(path, kind))
    averaged = state.get("ema_state") or state.get("ema") or {}
    return state | dict(model_state=state["model_state"] | averaged)


def start_from(cfg, parts, source, header):
    """Begin a new run with the weights of another, as --init_from asks; return the line that says so.

    source: of `load_source`. parts, header: of this run, as for `load_parts`. Averages restart at these weights; all
    else, the optimizer too, is new. Raises UsageError, naming what differs and the flags that fit the weights.
    """
    ours = header["model_args"]
    theirs = source["model_args"] | {name: ours[name] for name in TRAINING_ONLY if name in ours}
    partial = getattr(cfg, "allow_partial", None)
    if not partial and source.get("tokenizer_hash") == header.get("tokenizer_hash") and changed(theirs, ours):
        plain = [name for name in _differing(theirs, ours) if type(theirs[name]) in PLAIN and hasattr(cfg, name)]
        flags = [_flag(name, theirs[name]) for name in plain]
        remedy = f"try: {' '.join(flags) or '--allow_partial'}"
        if not flags and partial is None:
            remedy = "fix: the settings it was trained with"
        raise UsageError(f"--init_from {cfg.init_from} has another model: {changed(theirs, ours)}\n{remedy}")
    restarting = {name: part for name, part in parts.items() if name == "model_state" or hasattr(part, "restart")}
    weights = {name: value for name, value in source.items() if name not in parts} | dict(model_args=theirs)
    weights["model_state"] = source["model_state"]
    load_parts(restarting, weights, cfg.init_from, header, partial)
    return f"weights of {cfg.init_from}, step {source['step']}: a new run begins with them"


def _flag(name, value):
    """Return the flag that gives a field its value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def _check_header(state, path, header, same_data):
    """Raise UsageError if tokenizer or data of a checkpoint differ from those of this run."""
    if state.get("tokenizer_hash") != header.get("tokenizer_hash"):
        theirs, ours = (f"{h['tokenizer']} ({h['tokenizer_hash'][:8]})" for h in (state, header))
        advice = f"try: --tokenizer {state['tokenizer']}"
        if state["tokenizer"] not in ("bytes", "gpt2"):
            new = shlex.quote(str(unused("tokenizer.json", "_of_run")))
            advice = f"try: python generate.py {shlex.quote(str(path))} --export {new}"
        raise UsageError(f"{path} was trained with tokenizer {theirs}, this run has {ours}\n{advice}")
    if same_data and state["data_hash"] != header["data_hash"]:
        theirs, ours = (h["data_hash"][:8] for h in (state, header))
        raise UsageError(
            f"{path} was trained on other data: data_hash {theirs}, here {ours}\n"
            f"fix: the {same_data} that it was trained with"
        )


def _share(saved, weights):
    """Return the share of the numbers of `weights` that have the name and shape of a saved one."""
    fitting = [w.numel() for name, w in weights.items() if name in saved and saved[name].shape == w.shape]
    return sum(fitting) / max(1, sum(w.numel() for w in weights.values()))


def _remedy(share, allow_partial):
    """Return the end of a message about a checkpoint of which a share fits; the arguments are as in `load_parts`."""
    if allow_partial is None:
        return "\nfix: the settings it was trained with, or another folder"
    if share < LEAST_SHARE:
        return f": {share:.0%} of it would fit\nfix: the flags it was trained with"
    return f"; --allow_partial loads {share:.0%} of it\ntry: --allow_partial"


def _fitting(saved, weights, path, allow_partial):
    """Return the saved weights whose names and shapes fit `weights`.

    Raises UsageError unless all fit, or with allow_partial at least half of the numbers.
    """
    problems = {
        "missing": sorted(weights.keys() - saved.keys()),
        "extra": sorted(saved.keys() - weights.keys()),
        "wrong shape": sorted(k for k in weights.keys() & saved.keys() if weights[k].shape != saved[k].shape),
    }
    fitting = {k: w for k, w in saved.items() if k in weights and k not in problems["wrong shape"]}
    if not any(problems.values()):
        return fitting
    listing = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in problems.items() if names)
    share = _share(saved, weights)
    if not allow_partial:
        raise UsageError(f"{path} does not fit this model: {listing}{_remedy(share, allow_partial)}")
    if share < LEAST_SHARE:
        raise UsageError(f"{path} fits only {share:.0%} of this model: {listing}\nfix: the flags it was trained with")
    warn(f"{path}: {listing}; {share:.0%} loaded, the optimizer starts anew")
    return fitting


def _fitting_slots(optimizer, saved, path):
    """Return the saved states of an optimizer, sharded like its parameters.

    Raises UsageError for shapes that don't fit: torch accepts any here and fails at the next step.
    """
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, slots in saved["state"].items():
        tensors = {name: t for name, t in slots.items() if torch.is_tensor(t) and t.ndim}
        # 8-bit states have shapes of their own
        unquantized = [t for name, t in tensors.items() if not name.endswith(("_codes", "_scales"))]
        if i >= len(parameters) or any(t.shape != parameters[i].shape for t in unquantized):
            raise UsageError(f"{path}: optimizer state {i} does not fit its parameter")
        slots.update({name: shared_like(t, parameters[i]) for name, t in tensors.items()})
    return saved["state"]


def changed(old, new, cosmetic=()):
    """Return "lr 0.0003 -> 0.001, ..." for the keys in both dicts whose values differ, without the `cosmetic` ones."""
    return ", ".join(f"{k} {old[k]} -> {new[k]}" for k in _differing(old, new) if k not in cosmetic)


def _differing(old, new):
    return [key for key in new if key in old and _as_list(old[key]) != _as_list(new[key])]


def _as_list(x):
    return list(x) if isinstance(x, tuple) else x


def resume_notice(path, state, header, cosmetic):
    """Return the line that names the resumed checkpoint and the changes that end exact resuming.

    More processes with fewer micro-batches each, or the reverse, give the same step.
    """
    names = ("data_hash", "world_size", "steps")
    facts = [{name: h[name] for name in names} for h in (state, header)]
    # Facts win: the schedule has its true length there, where the config may say that it follows from the epochs.
    old, new = (fact | h["config"] | fact for fact, h in zip(facts, (state, header), strict=True))
    factors = ("grad_accum_steps", "gradient_accumulation_steps", "world_size")
    factors = [name for name in factors if name in old and name in new]
    if len(factors) == 2 and math.prod(old[n] for n in factors) == math.prod(new[n] for n in factors):
        cosmetic = (*cosmetic, *factors)
    notice = f"resumed {path} at step {state['step']}"
    differs = changed(old, new, cosmetic)
    if differs:
        notice += f", {differs}: exact resume is lost"
    if header["config"].get("init_from"):
        notice += "; --init_from is for a new run"
    return notice


def schedule_steps(epochs, steps_per_epoch, saved):
    """Return the steps of a schedule of `epochs`. A resumed run keeps the steps that it has taken.

    saved: the checkpoint that is resumed, or None. Only the epochs that are left get another number of steps, as with
    another batch size. Otherwise a larger batch would end the run early.
    """
    if not saved or saved["config"].get("steps", 0) > 0:
        return epochs * steps_per_epoch
    before = saved.get("steps_per_epoch") or saved["steps"] // saved["config"]["epochs"]  # older files have none
    left = round((saved["steps"] - saved["step"]) * steps_per_epoch / before)
    return saved["step"] + left + (epochs - saved["config"]["epochs"]) * steps_per_epoch


def check_same_data(path, saved, header, resume, places, remedy):
    """Raise UsageError if a run that nobody asked to resume has other data than this one, under another name.

    saved, header: of the checkpoint and of this run. resume: the flag; a script whose default is auto resumes unasked.
    places: of the data of both, folders as a rule. remedy: the command that begins a run of its own.
    """
    theirs, ours = places
    same_place = os.path.abspath(theirs) == os.path.abspath(ours)
    if resume == "auto" and saved["data_hash"] != header["data_hash"] and not same_place:
        raise UsageError(
            f"{path} is of a run on other data: {theirs}, here {ours}; "
            f"--resume {shlex.quote(str(path))} goes on with the new data\ntry: {remedy}"
        )


class Saver:
    """saver(path, state, must) saves; a rolling save (must=False) may fail FAILED_SAVES - 1 times in a row."""

    def __init__(self, save=save_checkpoint):
        self.save = save
        self.failed = 0
        self.last = "none of this run"

    def __call__(self, path, state, must=True):
        try:
            self.save(path, state)
            self.failed = 0
            self.last = path
        except CheckpointError as e:
            self.failed += 1
            if must or self.failed == FAILED_SAVES:
                raise CheckpointError(f"{e}\nlast good file: {self.last}") from e
            warn(f"{e}; the old file stays, training continues")


def rehearse(folder, name, state):
    """Write `state` into `folder`, read it back and remove it; return the size in bytes of a checkpoint.

    All ranks must call this if weights are sharded; those that write nothing return 0. Raises CheckpointError if
    it fails or the disk has no room for two checkpoints: a run must find out before it trains for a night.
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
    if not state["step"]:  # AdamW has no state before its first step, then two float32 numbers per parameter
        size += 8 * sum(p.numel() for p in canonical_keys(state)["model_state"].values())
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise CheckpointError(f"{folder} has {free / 1e6:.0f} MB free, a run needs {2 * size / 1e6:.0f} MB")
    return size


def rotate(paths, keep):
    """Remove all but the first `keep` of `paths` (newest first), if the newest is undamaged; 0 keeps all."""
    if not keep or len(paths) <= keep:
        return
    try:
        with zipfile.ZipFile(paths[0]) as newest:
            intact = newest.testzip() is None
    except (OSError, zipfile.BadZipFile):
        intact = False
    if intact:
        for path in paths[keep:]:
            path.unlink(missing_ok=True)


def set_aside_later(paths, step):
    """Rename step files or folders of a later step than `step` to *.bak.

    They belong to an abandoned branch or are damaged. The next start must not resume from them, and `rotate` must
    not count them as the newest. A file without a number in its name holds its step.
    """
    later = []
    for path in filter(os.path.exists, paths):
        number = re.search(r"\d+", Path(path).stem)
        try:
            path_step = int(number[0]) if number else read(path)["step"]
        except CheckpointError:  # first_good has warned about it
            continue
        if path_step > step:
            later.append(path)
    set_aside(later)
