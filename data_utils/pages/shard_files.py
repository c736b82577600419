"""Folders of pages with their answers: what is in the files, and the plan that is known before they are made.

manifest.json           the only thing that a reader trusts
test.pt                 held-out samples of all tasks, made after the first shard
batch_00000.pt ...      build_batch samples of one task each; gone once their shard is listed
consolidated_000.pt ... SHARD batches each, the last may hold fewer
A .pt file is {format, tasks: {task: {page (n, R, C), target (n, L), key (n, 16) uint8, id (n,) int32}}}.
"""

import hashlib
import itertools
import json
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_utils.checkpoint import changed
from data_utils.errors import DataError

FORMAT = 1
SHARD = 100  # batches
FIELDS = ("page", "target", "key", "id")
REBUILD = "--rebuild-dataset makes the data anew, or name another folder"


def describe(sources, *, train_samples, test_samples, build_batch, seed):
    """Return the specification, plain values: all that decides the bytes of a folder made from `sources`.

    Raises DataError for a source without two held-out samples (one selects, one is reported) or without any other.
    """
    from data_utils.pages.render import RENDERER_VERSION

    tasks = {}
    for name, source in sources.items():
        planned = dict(train=train_samples, test=test_samples)
        planned = {split: min(n, source.limit(split) or n) for split, n in planned.items()}
        for split, needed in dict(train=1, test=2).items():
            if planned[split] < needed:
                raise DataError(f"{name}: {planned[split]} {split} samples there, {needed} needed")
        tasks[name] = planned | dict(task=asdict(source.task), source=source.spec)
    spec = dict(format=FORMAT, renderer=RENDERER_VERSION, seed=seed, build_batch=build_batch, tasks=tasks)
    return json.loads(json.dumps(spec))


def hash_of(spec):
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode("utf-8")).hexdigest()


def batches(samples, size):
    """Return the batches of a folder in order, [(task, first sample, count)]: the tasks take turns until used up."""
    rows = ([(task, i, min(size, n - i)) for i in range(0, n, size)] for task, n in sorted(samples.items()))
    return [batch for turn in itertools.zip_longest(*rows) for batch in turn if batch]


def read_manifest(folder):
    """Return the manifest of a folder, None if it has none. Raises DataError on one that can't be right."""
    path = Path(folder, "manifest.json")
    try:
        manifest = json.loads(path.read_bytes())
        _check_manifest(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} can't be used: {type(e).__name__}: {e}\ntry: {REBUILD}") from e
    return manifest


def _check_manifest(manifest):
    """The names of files are fixed, so that none can lead out of the folder; numbers fit each other."""
    spec, shards = manifest["spec"], manifest["shards"]
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
    if manifest["spec_sha256"] != hash_of(spec):
        raise ValueError("spec_sha256 is not that of spec")
    if manifest["samples"] != {name: task["train"] for name, task in spec["tasks"].items()}:
        raise ValueError("samples are not those of spec")
    sizes = [spec["build_batch"], *(task[split] for task in spec["tasks"].values() for split in ("train", "test"))]
    if not sizes[1:] or not all(type(n) is int and 0 < n < 2**28 for n in sizes):
        raise ValueError(f"sizes {sizes[:3]}")
    if not all(re.fullmatch("[a-z][a-z0-9_]{0,30}", name) for name in spec["tasks"]):
        raise ValueError("a name of a task")
    for number, entry in enumerate(shards):
        if entry["file"] != shard_name(number) or entry["first_batch"] != number * SHARD:
            raise ValueError(f"shard {number} is {str(entry['file'])[:60]!r}")
    for entry in [*shards, *filter(None, [manifest["test"]])]:
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError("a sha256")
    if manifest["test"] and manifest["test"]["file"] != "test.pt":
        raise ValueError("test is not test.pt")
    builder = manifest["builder"]
    if not all(isinstance(builder[name], (int, float)) for name in ("pid", "heartbeat", "batches")):
        raise ValueError("builder")


def shard_name(number):
    return f"consolidated_{number:03d}.pt"


def check_spec(folder, found, spec):
    """Raise DataError, with the first fields that differ, unless `found`, of the folder, equals `spec`."""
    if found == spec:
        return
    old, new = _flat(found), _flat(spec)
    old, new = (dict.fromkeys(old.keys() | new.keys(), "absent") | flat for flat in (old, new))
    differs = changed(old, dict(sorted(new.items()))).split(", ")
    more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
    raise DataError(f"{folder} holds other data: {', '.join(differs[:4])}{more}\ntry: {REBUILD}")


def _flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    nested = (_flat(value, f"{path}.{key}".replace("tasks.", "").strip(".")) for key, value in tree.items())
    return {key: value for flat in nested for key, value in flat.items()}


def check_tasks(content, counts, spec):
    """Return the arrays {task: {field: array}} of what a file holds; ValueError unless shapes and values are right."""
    from models.glyphs import SYMBOLS

    if set(content["tasks"]) != set(counts):
        raise ValueError(f"holds {', '.join(sorted(content['tasks']))}, expected {', '.join(sorted(counts))}")
    arrays = {task: {name: fields[name].numpy() for name in FIELDS} for task, fields in content["tasks"].items()}
    for task, n in counts.items():
        about = spec["tasks"][task]["task"]
        shapes = dict(page=(n, about["rows"], about["cols"]), target=(n, about["length"]), key=(n, 16), id=(n,))
        for name, shape in shapes.items():
            x, dtype = arrays[task][name], np.int32 if name == "id" else np.uint8
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{task}.{name} is {x.dtype} {x.shape}, expected {np.dtype(dtype)} {shape}")
        fields = arrays[task]
        if max(fields["page"].max(), fields["target"].max()) >= SYMBOLS:
            raise ValueError(f"{task} has symbols of {SYMBOLS} and more")
        if fields["id"].min() < 0 or fields["id"].max() >= max(1, about["ids"]):
            raise ValueError(f"{task} has ids outside 0 to {max(1, about['ids']) - 1}")
    return arrays


def open_file(folder, entry, counts, spec):
    """Return {task: {field: array}} of a listed file, mapped into memory after its hash was checked.

    Raises DataError when it is absent or not what the manifest and `spec` say.
    """
    import torch

    path, found = Path(folder, entry["file"]), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                found.update(block)
        if found.hexdigest() != entry["sha256"]:
            raise ValueError("its hash is not that of the manifest")
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
        return check_tasks(torch.load(path, map_location="cpu", mmap=True, weights_only=True), counts, spec)
    except Exception as e:  # as many types as ways to be damaged
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be used: {type(e).__name__}: {reason}\ntry: {REBUILD}") from e
