"""Bundles of several files: a train.yaml that names a model.yaml, and so on."""

import dataclasses
import difflib
import os
import re
import typing
from pathlib import Path

from data_utils.errors import UsageError
from data_utils.files import root, write_atomic

REFERENCES = {  # of a bundle's files: {key: the file it names}
    "train": dict(model="model", train_dataset="dataset_train", val_dataset="dataset_val"),
    "model": dict(tokenizer="tokenizer"),
    "dataset_train": dict(skeleton_pool="skeleton_pool_train", tokenizer="tokenizer"),
    "dataset_val": dict(skeleton_pool="skeleton_pool_val", tokenizer="tokenizer"),
}


def load_config(path, resolve_paths=True):
    """Read a YAML file of flat keys -> dict; a value that ends in .yaml is the dict of that file.

    {{ROOT}} is the folder of the training scripts; what begins with ./ or ../ is relative to the file it stands in.
    With resolve_paths=False all strings stay as written. Raises UsageError, with file and key, for what is missing,
    damaged or nested, and for files that refer to each other in a circle.
    """
    return _load(Path(path), resolve_paths, ())


def _load(path, resolve, above):
    import yaml

    if path.resolve() in above:
        raise UsageError(f"{path} refers to itself, by {' -> '.join(p.name for p in (*above, path))}")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        there = ", ".join(map(str, sorted(path.parent.glob("*.yaml")))) if isinstance(e, OSError) else ""
        by = f"{above[-1]}: " if above else ""
        raise UsageError(f"{by}{path}: {' '.join(str(e).split())}" + f"\nfiles there: {there}" * bool(there)) from e
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    keys = re.findall(r"^([\w-]+)\s*:", text, re.M)
    for key, value in values.items():
        inner = key
        while isinstance(value, dict) and value:
            name, value = next(iter(value.items()))
            inner = f"{inner}.{name}"
        if inner != key:
            raise UsageError(f"{path}: {inner}: keys are flat here: write {str(inner).rpartition('.')[2]}: {value}")
        if keys.count(str(key)) > 1:
            raise UsageError(f"{path}: {key} stands there {keys.count(str(key))} times")
        if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
            raise UsageError(f"{path}: {key}: expected a list of plain values")
    if not resolve:
        return values

    def resolved(value):
        if isinstance(value, list):
            return [resolved(v) for v in value]
        if not isinstance(value, str):
            return value
        value = value.replace("{{ROOT}}", str(root()))
        if value.startswith(("./", "../")):
            value = os.path.normpath(path.parent.resolve() / value)
        return _load(path.parent / value, resolve, (*above, path.resolve())) if value.endswith(".yaml") else value

    return {key: resolved(value) for key, value in values.items()}


def save_config(config, folder):
    """Write what `load_config` returned of a train.yaml into `folder` as the bundle's files, with ./ references.

    Paths below the folder of the scripts are written with {{ROOT}}, so that the bundle can be moved with it.
    """
    import yaml

    def portable(value):
        if isinstance(value, (list, tuple)):
            return [portable(v) for v in value]
        inside = isinstance(value, str) and value.startswith(f"{root()}{os.sep}")
        return value.replace(str(root()), "{{ROOT}}", 1) if inside else value

    def write(values, name):
        references = REFERENCES.get(name, {})
        for key, file in references.items():
            if isinstance(values.get(key), dict):
                write(values[key], file)
        lines = {k: f"./{references[k]}.yaml" if isinstance(v, dict) else portable(v) for k, v in values.items()}
        text = yaml.safe_dump(lines, sort_keys=False, width=110)
        write_atomic(Path(folder, f"{name}.yaml"), lambda file: file.write(text.encode("utf-8")))

    write(config, "train")


def build(cls, values, path):
    """Return cls(**values), lists as tuples. Raises UsageError, with `path` and the nearest key, for an unknown key."""
    known, made = {f.name: f for f in dataclasses.fields(cls)}, {}
    for key, value in values.items():
        near = difflib.get_close_matches(str(key), known, 1)
        if key not in known:
            raise UsageError(f"{path}: unknown key {key}" + f" (did you mean {near[0]}?)" * bool(near))
        default, choices = known[key].default, typing.get_args(known[key].type)
        try:
            if isinstance(default, tuple):
                made[key] = tuple(value) if isinstance(value, list) else (str(value),)
            elif isinstance(value, bool) != isinstance(default, bool) or isinstance(value, list):
                raise ValueError
            else:
                made[key] = type(default)(value)  # YAML takes 1e-4 for a text
            if isinstance(default, str) and choices and value not in choices:
                raise ValueError
        except (ValueError, TypeError):
            what = " or ".join(choices) if isinstance(default, str) and choices else type(default).__name__
            raise UsageError(f"{path}: {key}: {value!r}: expected {what}") from None
    return cls(**made)
