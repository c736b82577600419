"""Bundles of symbolic regression: a train.yaml and the model, tokenizer, data and pools that it names.

train_sr.py reads its flags from a bundle, and writes one into its output folder and into each checkpoint.
"""

import difflib
import hashlib
import json
import math
import os
import re
import typing
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

from data_utils.errors import UsageError
from data_utils.files import root, write_atomic
from data_utils.formulas.dataset import DataConfig, FlashANSRDataset
from data_utils.formulas.expressions import SPECIAL, Alphabet
from data_utils.formulas.holdout import hold_out
from data_utils.formulas.pools import load_pool, translate
from data_utils.formulas.skeletons import PoolConfig

REFERENCES = {  # {file of a bundle: {key: the file that it names}}
    "train": dict(model="model", train_dataset="dataset_train", val_dataset="dataset_val"),
    "model": dict(tokenizer="tokenizer"),
    "dataset_train": dict(skeleton_pool="skeleton_pool_train", tokenizer="tokenizer"),
    "dataset_val": dict(skeleton_pool="skeleton_pool_val", tokenizer="tokenizer"),
}
# Flags of one run, which are no part of a bundle.
NOT_IN_BUNDLE = "config output_dir verbose resume_from resume_step fresh init_from skeleton_pool".split()


def load_config(path, resolve_paths=True) -> dict:
    """Read a YAML file of flat keys -> dict. A value that ends in .yaml becomes the dict of that file.

    {{ROOT}} is the folder of the training scripts. Values that begin with ./ or ../ are relative to their file. With
    resolve_paths=False all strings stay as written. Raises UsageError, with file and key, for a file that is missing,
    damaged or nested, and for files that refer to each other in a circle.
    """
    return _load(Path(path), resolve_paths, ())


def _load(path, resolve_paths, above):
    """As load_config; above: the paths of the files that led here."""
    values = _read_flat(path, above)
    if not resolve_paths:
        return values

    def resolve(value):
        if isinstance(value, list):
            return [resolve(v) for v in value]
        if not isinstance(value, str):
            return value
        value = value.replace("{{ROOT}}", str(root()))
        if value.startswith(("./", "../")):
            value = os.path.normpath(path.parent.resolve() / value)
        if value.endswith(".yaml"):
            return _load(path.parent / value, resolve_paths, (*above, path.resolve()))
        return value

    return {key: resolve(value) for key, value in values.items()}


def _read_flat(path, above=()):
    """Return the dict of a YAML file, whose values are plain or lists of plain values."""
    import yaml

    if path.resolve() in above:
        raise UsageError(f"{path} refers to itself, by {' -> '.join(p.name for p in (*above, path))}")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        message = f"{path}: {' '.join(str(e).split())}"
        if above:
            message = f"{above[-1]}: {message}"
        there = sorted((path if path.is_dir() else path.parent).glob("*.yaml")) if isinstance(e, OSError) else []
        if there:
            message += f"\nfiles there: {', '.join(map(str, there))}"
        raise UsageError(message) from e
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    keys = re.findall(r"^([\w-]+)\s*:", text, re.M)
    for key, value in values.items():
        if isinstance(value, dict) and value:
            place = key
            while isinstance(value, dict) and value:
                name, value = next(iter(value.items()))
                place = f"{place}.{name}"
            raise UsageError(f"{path}: {place}: keys are flat here: write {name}: {value}")
        if keys.count(str(key)) > 1:
            raise UsageError(f"{path}: {key} appears {keys.count(str(key))} times")
        if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
            raise UsageError(f"{path}: {key}: expected a list of plain values")
    return values


def save_config(config: dict, folder, name="train"):
    """Write a config as `load_config` returns it into `folder`: <name>.yaml and the files that it refers to.

    References are written with ./, and paths below the folder of the scripts with {{ROOT}}: the bundle can be moved.
    """
    import yaml

    def portable(value):
        if isinstance(value, (list, tuple)):
            return [portable(v) for v in value]
        inside = isinstance(value, str) and value.startswith(f"{root()}{os.sep}")
        return value.replace(str(root()), "{{ROOT}}", 1) if inside else value

    values = {}
    for key, value in config.items():
        if isinstance(value, dict):
            file = REFERENCES[name][key]
            save_config(value, folder, file)
            values[key] = f"./{file}.yaml"
        else:
            values[key] = portable(value)
    text = yaml.safe_dump(values, sort_keys=False, width=110)
    write_atomic(Path(folder, f"{name}.yaml"), lambda file: file.write(text.encode("utf-8")))


def build_settings(cls, values: dict, path):
    """Return the dataclass cls(**values), with lists as tuples.

    Raises UsageError, with `path`, for a value of another type and for an unknown key, with the nearest known one.
    """
    known_fields = {f.name: f for f in fields(cls)}
    settings = {}
    for key, value in values.items():
        if key not in known_fields:
            near = difflib.get_close_matches(str(key), known_fields, 1)
            raise UsageError(f"{path}: unknown key {key}" + (f" (did you mean {near[0]}?)" if near else ""))
        default = known_fields[key].default
        choices = typing.get_args(known_fields[key].type) if isinstance(default, str) else ()
        try:
            if isinstance(default, tuple):
                settings[key] = tuple(value) if isinstance(value, list) else (str(value),)
            elif isinstance(value, bool) != isinstance(default, bool) or isinstance(value, list):
                raise ValueError
            else:
                settings[key] = type(default)(value)  # YAML reads 1e-4 as text
            if choices and value not in choices:
                raise ValueError
        except (ValueError, TypeError):
            expected = " or ".join(choices) or type(default).__name__
            raise UsageError(f"{path}: {key}: {value!r}: expected {expected}") from None
    return cls(**settings)


def load_flags(path) -> dict:
    """Return {flag: value} of a train.yaml, of its model, its training data and their skeleton pool."""
    flags = {}
    parts = [load_config(path)]
    while parts:
        part = parts.pop(0)
        parts += [part[key] for key in ("model", "train_dataset", "skeleton_pool") if isinstance(part.get(key), dict)]
        flags |= {key: value for key, value in part.items() if not isinstance(value, dict)}
    if flags.pop("simplipy_engine", ""):
        print("simplipy_engine: not used, formulas are simplified by data_utils/formulas/simplify.py")
    return flags


def open_formulas(cfg, rank, world):
    """Return a namespace: alphabet, train (FlashANSRDataset), val (list of fixed batches), bundle (dict to save), hash.

    The hash identifies the settings of both data sets.
    Alphabet and validation data are those of the bundle cfg.config. Without a bundle they follow from the flags, and
    validation is without noise. The skeletons of the validation are drawn first and held out of the training.
    """
    config = load_config(cfg.config) if cfg.config else {}
    tokenizer = config.get("model", {}).get("tokenizer", {})
    tokenizer = dict(
        special_tokens=list(tokenizer.get("special_tokens", SPECIAL)),
        operators=list(tokenizer.get("operators", cfg.operators)),
        variables=list(tokenizer.get("variables", cfg.variables)),
    )
    alphabet = Alphabet(tokenizer["operators"], tokenizer["variables"], tokenizer["special_tokens"])

    # (PoolConfig, DataConfig, saved pool or "") of each split.
    pool, data = (cls(**{f.name: getattr(cfg, f.name) for f in fields(cls)}) for cls in (PoolConfig, DataConfig))
    val_pool = pool
    val_data = DataConfig(**asdict(data) | dict(noise_probability=0))
    val_path = ""
    if "val_dataset" in config:
        values = dict(config["val_dataset"])
        values.pop("tokenizer", None)
        pool_values = values.pop("skeleton_pool", {})
        if isinstance(pool_values, dict):
            val_pool = build_settings(PoolConfig, pool_values, cfg.config)
        else:
            val_path = pool_values
        val_data = build_settings(DataConfig, values, cfg.config)
    splits = dict(train=(pool, data, cfg.skeleton_pool), val=(val_pool, val_data, val_path))

    def open_split(split, excluded=(), **settings):
        pool, data, path = splits[split]
        return FlashANSRDataset(
            alphabet,
            pool,
            data,
            seed=cfg.seed,
            split=split,
            max_seq_len=cfg.decoder_max_seq_len,
            saved=translate(*load_pool(path), alphabet) if path else None,
            held=hold_out(pool, excluded),
            **settings,
        )

    val = open_split("val", batch_size=min(cfg.val_batch_size, cfg.val_size))
    batches = [val.batch(i) for i in range(math.ceil(cfg.val_size / val.batch_size))]
    val_skeletons = [alphabet.decode(row) for batch in batches for row in batch["skeletons"].numpy()]
    train = open_split(
        "train",
        val_skeletons,
        batch_size=cfg.batch_size,
        rank=rank,
        world=world,
        accumulation=cfg.gradient_accumulation_steps,
        num_workers=cfg.num_workers,
    )

    # The bundle: the fields of the script's own class, then one dict per file that train.yaml names.
    inherited = {f.name for base in type(cfg).__bases__ for f in fields(base)}
    bundle = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in (*inherited, *NOT_IN_BUNDLE)}
    model_class = next(cls for cls in type(cfg).__bases__ if cls.__name__ == "ModelConfig")
    bundle["model"] = {f.name: getattr(cfg, f.name) for f in fields(model_class)} | dict(tokenizer=tokenizer)
    for split, (pool, data, path) in splits.items():
        source = str(Path(path).resolve()) if path else asdict(pool)
        bundle[f"{split}_dataset"] = asdict(data) | dict(skeleton_pool=source, tokenizer=tokenizer)
    settings = [bundle["train_dataset"], bundle["val_dataset"], cfg.seed]
    digest = hashlib.sha256(json.dumps(settings).encode("utf-8")).hexdigest()
    return SimpleNamespace(alphabet=alphabet, train=train, val=batches, bundle=bundle, hash=digest)
