"""Trained language models, rebuilt from their checkpoints."""

import dataclasses
import hashlib
import shlex
from pathlib import Path

import numpy as np

from data_utils.checkpoint import changed, load_checkpoint
from data_utils.errors import CheckpointError, DataError, UsageError
from data_utils.files import write_atomic
from models.router import FAMILIES, NanoThink
from models.vector_store import VectorStore

EXPERTS = FAMILIES | dict(mla=NanoThink)


def load_expert(path, expert="", expected=None, flags=""):
    """Return (frozen model in eval mode, its checkpoint without weights).

    expert: the kind it must be, "" for any; expected: values of model_args and tokenizer_hash that it must have;
    flags: of the command that trains one, for the message.
    Raises DataError, naming the command that makes it, if it is missing or damaged; UsageError if it is another one.
    """
    if not Path(path).exists():
        named = Path(path).name.removesuffix("_expert.pt")
        kind = expert or (named if named in FAMILIES else "transformer")
        command = "train_mla.py" if "mla" in named else f"train_expert.py --expert {kind}"
        folder = shlex.quote(str(Path(path).parent))
        raise DataError(f"{path} is missing\ntry: python {command} --checkpoint_dir {folder}{flags}")
    state = load_checkpoint(path, f"expert:{expert}" if expert else [f"expert:{name}" for name in EXPERTS])
    differs = changed(state["model_args"] | dict(tokenizer_hash=state["tokenizer_hash"]), expected or {})
    if differs:
        raise UsageError(f"{path} differs from this run: {differs}\nfix: the flags it was trained with")
    model = EXPERTS[state["expert"]](**state["model_args"])
    try:
        model.load_state_dict(state.pop("model_state"))
    except RuntimeError as e:
        raise CheckpointError(f"{path} does not fit its own model_args: {str(e).splitlines()[0]}") from e
    state.pop("optimizer_state", None)  # a pretrained model has none
    if state.get("store_hash"):
        model.attach(load_store(Path(path).with_name("nanothink_mla_store.npz"), state["store_hash"]))
    return model.requires_grad_(False).eval(), state


def typed_flags(cfg, *names):
    """Return the flags of a configuration that differ from their defaults, among `names`, each after a space."""
    words = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in names and value != field.default:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return f" {shlex.join(words)}" if words else ""


def save_store(path, store):
    """Write a VectorStore atomically; return the hash of the file, which the checkpoint keeps."""
    write_atomic(path, lambda file: np.savez(file, **store.arrays()))
    return _digest(path)


def load_store(path, digest):
    """Return the VectorStore in `path`. Raises DataError unless its hash is `digest`, which the checkpoint keeps."""
    if not Path(path).exists():
        raise DataError(f"{path} is missing: the checkpoint was trained with it\nfix: copy it beside the checkpoint")
    if _digest(path) != digest:
        raise DataError(f"{path} is not the store that the checkpoint was trained with")
    with np.load(path) as arrays:
        return VectorStore.from_arrays(arrays)


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
