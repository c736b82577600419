"""The files of a folder of pages with their answers, and the plan that is known before they exist.

manifest.json           the only file that a reader trusts
test.pt                 held-out samples of all tasks, written after the first shard
batch_00000.pt ...      build_batch samples of one task each; deleted once their shard is listed
consolidated_000.pt ... shards of SHARD batches each, the last one may hold fewer
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
REBUILD = "--rebuild-dataset"


def describe(sources, *, train_samples, test_samples, build_batch, seed):
    """Return the specification, plain values: all that decides the bytes of a folder of these `sources`.

    Raises DataError for a source without a training sample or without two held-out ones (one selects, one is reported).
    """
    from data_utils.pages.render import RENDERER_VERSION

    tasks = {}
    for name, source in sources.items():
        tasks[name] = dict(task=asdict(source.task), source=source.spec)
        for split, wanted, least in (("train", train_samples, 1), ("test", test_samples, 2)):
            samples = min(wanted, source.limit(split) or wanted)
            if samples < least:
                raise DataError(
                    f"{name}: {samples} {split} samples in its data, {least} needed\nfix: add to the data of {name}"
                )
            tasks[name][split] = samples
    spec = dict(format=FORMAT, renderer=RENDERER_VERSION, seed=seed, build_batch=build_batch, tasks=tasks)
    return json.loads(json.dumps(spec))


def hash_of(spec):
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode("utf-8")).hexdigest()


def batches(samples, size):
    """Return the batches of a folder in order, [(task, first sample, count)]: the tasks take turns until used up."""
    rows = ([(task, i, min(size, n - i)) for i in range(0, n, size)] for task, n in sorted(samples.items()))
    return [batch for turn in itertools.zip_longest(*rows) for batch in turn if batch]


def shard_name(number):
    return f"consolidated_{number:03d}.pt"


def read_manifest(folder):
    """Return the manifest of a folder, None if it has none. Raises DataError for an inconsistent one."""
    path = Path(folder, "manifest.json")
    try:
        manifest = json.loads(path.read_bytes())
        _check_manifest(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} can't be used: {type(e).__name__}: {e}\ntry: {REBUILD}") from e
    return manifest


def _expect(condition, problem):
    if not condition:
        raise ValueError(problem)


def _check_manifest(manifest):
    """Raise ValueError unless numbers fit each other, and file names are the fixed ones, all inside the folder."""
    spec, shards, test, builder = (manifest[key] for key in ("spec", "shards", "test", "builder"))
    counts = {name: task["train"] for name, task in spec["tasks"].items()}
    sizes = [spec["build_batch"], *counts.values(), *(task["test"] for task in spec["tasks"].values())]
    _expect(manifest["format"] == FORMAT, f"format {manifest['format']}, expected {FORMAT}")
    _expect(manifest["spec_sha256"] == hash_of(spec), "spec_sha256 is not that of spec")
    _expect(manifest["samples"] == counts, "samples are not those of spec")
    _expect(counts and all(type(n) is int and 0 < n < 2**28 for n in sizes), f"sizes {sizes[:3]}")
    _expect(all(re.fullmatch("[a-z][a-z0-9_]{0,30}", name) for name in counts), "a name of a task")
    for number, entry in enumerate(shards):
        named = entry["file"] == shard_name(number) and entry["first_batch"] == number * SHARD
        _expect(named, f"shard {number} is {str(entry['file'])[:60]!r}")
    for entry in [*shards, test] if test else shards:
        _expect(re.fullmatch("[0-9a-f]{64}", entry["sha256"]), "a sha256")
    _expect(not test or test["file"] == "test.pt", "test is not test.pt")
    numbers = [builder[name] for name in ("pid", "heartbeat", "batches")]
    _expect(all(isinstance(number, (int, float)) for number in numbers), "builder")


def check_spec(folder, actual, expected):
    """Raise DataError, with the first fields that differ, unless the folder has the expected specification."""
    if actual == expected:
        return
    old, new = _flat(actual), _flat(expected)
    absent = dict.fromkeys(old.keys() | new.keys(), "absent")
    differs = changed(absent | old, dict(sorted((absent | new).items()))).split(", ")
    more = f" and {len(differs) - 4} more" if len(differs) > 4 else ""
    raise DataError(f"{folder} holds other data: {', '.join(differs[:4])}{more}\ntry: {REBUILD}")


def _flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    nested = (_flat(value, f"{path}.{key}".replace("tasks.", "").strip(".")) for key, value in tree.items())
    return {key: value for flat in nested for key, value in flat.items()}


def check_tasks(content, counts, spec):
    """Return the arrays {task: {field: array}} in the content of a file; ValueError unless shapes and values fit."""
    from models.glyphs import SYMBOLS

    names, expected = (", ".join(sorted(tasks)) for tasks in (content["tasks"], counts))
    _expect(names == expected, f"holds {names}, expected {expected}")
    arrays = {}
    for task, n in counts.items():
        form = spec["tasks"][task]["task"]
        fields = arrays[task] = {name: content["tasks"][task][name].numpy() for name in FIELDS}
        shapes = dict(page=(n, form["rows"], form["cols"]), target=(n, form["length"]), key=(n, 16), id=(n,))
        for name, shape in shapes.items():
            x, dtype = fields[name], np.dtype(np.int32 if name == "id" else np.uint8)
            fits = x.shape == shape and x.dtype == dtype
            _expect(fits, f"{task}.{name} is {x.dtype} {x.shape}, expected {dtype} {shape}")
        largest, ids = max(fields["page"].max(), fields["target"].max()), max(1, form["ids"])
        _expect(largest < SYMBOLS, f"{task} has symbols of {SYMBOLS} and more")
        _expect(0 <= fields["id"].min() <= fields["id"].max() < ids, f"{task} has ids outside 0 to {ids - 1}")
    return arrays


def open_file(folder, entry, counts, spec):
    """Check the hash of a listed file; return {task: {field: array}} mapped into memory.

    Raises DataError when it is absent or does not fit the manifest and `spec`.
    """
    import torch

    path = Path(folder, entry["file"])
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _expect(digest == entry["sha256"], "its hash is not that of the manifest")
        with zipfile.ZipFile(path) as archive:
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        _expect(stored, "it is compressed")
        return check_tasks(torch.load(path, map_location="cpu", mmap=True, weights_only=True), counts, spec)
    except Exception as e:  # as many types as kinds of damage
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be used: {type(e).__name__}: {reason}\ntry: {REBUILD}") from e
