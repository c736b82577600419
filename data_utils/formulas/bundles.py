"""Bundles of symbolic regression: train.yaml and the model, tokenizer, data and pools that it names, both ways."""

import math
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

from data_utils.formulas.bundle_files import build, load_config
from data_utils.formulas.dataset import DataConfig, FlashANSRDataset
from data_utils.formulas.expressions import SPECIAL, Alphabet
from data_utils.formulas.holdout import hold_out
from data_utils.formulas.pools import load_pool, translate
from data_utils.formulas.skeletons import PoolConfig

OF_A_RUN = "config output_dir verbose resume_from resume_step fresh skeleton_pool".split()  # not of a bundle


def load_flags(path):
    """Return {flag: value} of the train.yaml at `path`, of its model, its training data, and the pool of these."""
    found, parts = {}, [load_config(path)]
    while parts:
        part = parts.pop(0)
        parts += [part[key] for key in ("model", "train_dataset", "skeleton_pool") if isinstance(part.get(key), dict)]
        found |= {key: value for key, value in part.items() if not isinstance(value, dict)}
    if found.pop("simplipy_engine", ""):
        print("simplipy_engine: not used, formulas are simplified by data_utils/formulas/simplify.py")
    return found


def open_formulas(cfg, rank, world):
    """Return a namespace: alphabet, train (FlashANSRDataset), val (list of fixed batches), bundle (to save).

    The alphabet and the validation data are those of the bundle cfg.config, else they follow from the flags; validation
    is then without noise. Its skeletons are drawn first and held out of the training.
    """
    whole = load_config(cfg.config) if cfg.config else {}
    tokens = whole.get("model", {}).get("tokenizer", {})
    names = dict(special_tokens=list(tokens.get("special_tokens", SPECIAL)),
                 operators=list(tokens.get("operators", cfg.operators)),
                 variables=list(tokens.get("variables", cfg.variables)))  # fmt: skip
    alphabet = Alphabet(names["operators"], names["variables"], names["special_tokens"])
    pool, data = (kind(**{f.name: getattr(cfg, f.name) for f in fields(kind)}) for kind in (PoolConfig, DataConfig))
    settings = dict(
        train=(pool, data, cfg.skeleton_pool), val=(pool, DataConfig(**asdict(data) | dict(noise_probability=0)), "")
    )
    if "val_dataset" in whole:
        own = dict(whole["val_dataset"])
        of_val, _ = own.pop("skeleton_pool", {}), own.pop("tokenizer", None)
        saved = "" if isinstance(of_val, dict) else of_val
        val_pool = build(PoolConfig, of_val, cfg.config) if not saved else pool
        settings["val"] = val_pool, build(DataConfig, own, cfg.config), saved

    def dataset(split, excluded=(), **sizes):
        pool, data, path = settings[split]
        saved = translate(*load_pool(path), alphabet) if path else None
        return FlashANSRDataset(alphabet, pool, data, seed=cfg.seed, split=split, max_seq_len=cfg.decoder_max_seq_len,
                                saved=saved, held=hold_out(pool, excluded), **sizes)  # fmt: skip

    val = dataset("val", batch_size=min(cfg.val_batch_size, cfg.val_size))
    batches = [val.batch(i) for i in range(math.ceil(cfg.val_size / val.batch_size))]
    rows = [row[row > 0] for batch in batches for row in batch["skeletons"].numpy()]
    train = dataset("train", map(alphabet.decode, rows), batch_size=cfg.batch_size, rank=rank, world=world,
                    accumulation=cfg.gradient_accumulation_steps, num_workers=cfg.num_workers)  # fmt: skip
    kept = [f.name for f in fields(cfg) if f.name in type(cfg).__annotations__ and f.name not in OF_A_RUN]
    bundle = {name: getattr(cfg, name) for name in kept}
    of_model = {name: getattr(cfg, name) for base in type(cfg).__mro__ if base.__name__ == "ModelConfig"
                for name in base.__annotations__}  # fmt: skip
    bundle["model"] = of_model | dict(tokenizer=names)
    for split, (pool, data, path) in settings.items():
        source = str(Path(path).resolve()) if path else asdict(pool)
        bundle[f"{split}_dataset"] = asdict(data) | dict(skeleton_pool=source, tokenizer=names)
    return SimpleNamespace(alphabet=alphabet, train=train, val=batches, bundle=bundle)
