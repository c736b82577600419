"""Commands of prepare_data.py for pools of skeletons: generate-skeleton-pool and import-data."""

import itertools
import sys
from pathlib import Path

from tqdm import tqdm

from data_utils.errors import UsageError
from data_utils.files import check_replaceable, unused
from data_utils.formulas.bundles import build_settings, load_config
from data_utils.formulas.expressions import OPERATORS, Alphabet, padded
from data_utils.formulas.holdout import fitting, hold_out, skeleton_of
from data_utils.formulas.pools import COLUMNS, EVERY, MADE_HERE, read_formulas, save_pool
from data_utils.formulas.skeletons import Pool, PoolConfig, check_pool, distinct, draw_pool


def generate_skeleton_pool(cfg):
    """Write a pool of exactly cfg.size skeletons, as cfg.config describes it, to cfg.output_dir."""
    _check_output(cfg)
    if cfg.size < 1:
        raise UsageError(f"--size {cfg.size}: expected 1 or more")
    pool = build_settings(PoolConfig, load_config(cfg.config), cfg.config)
    alphabet = check_pool(pool)
    fits = fitting(pool, alphabet) if cfg.strict else None
    held = hold_out(pool)
    with tqdm(total=cfg.size, disable=not cfg.verbose, unit="skeletons") as bar:
        skeletons = draw_pool(
            cfg.size,
            alphabet,
            pool,
            held,
            seed=cfg.seed,
            split=1,
            fits=fits,
            report=lambda n: bar.update(n - bar.n),
        )
    save_pool(cfg.output_dir, skeletons, alphabet, pool)
    mean = (skeletons.tokens > 0).sum(1).mean()
    print(f"{cfg.output_dir}: {cfg.size} skeletons of {mean:.1f} tokens on average")
    return {}


def import_data(cfg):
    """Write the skeletons of a csv of formulas, cfg.input, as a pool to cfg.output_dir."""
    _check_output(cfg)
    pool = build_settings(PoolConfig, load_config(cfg.base_skeleton_pool), cfg.base_skeleton_pool)
    skipped = []
    columns = (*COLUMNS, "difficulty", "sampling") if cfg.parser == "fastsrb" else COLUMNS
    formulas = read_formulas(cfg.input, cfg.skip_bad_lines, skipped.append, columns)
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    prefixes = [skeleton_of(formula) for formula in formulas]
    present = set(itertools.chain(*prefixes))
    more_operators = [name for name in OPERATORS if name in present and name not in pool.operators]
    D = max(len(pool.variables), *(len(formula.variables) for formula in formulas))
    alphabet = Alphabet([*pool.operators, *more_operators], EVERY.variables[:D])
    skeletons = Pool(*distinct(padded([alphabet.encode(prefix) for prefix in prefixes])))
    save_pool(cfg.output_dir, skeletons, alphabet, pool)
    message = f"{cfg.output_dir}: {len(skeletons.tokens)} skeletons of {len(formulas)} formulas"
    more = [*more_operators, *alphabet.variables[len(pool.variables) :]]
    if more and cfg.verbose:
        message += f"; {' '.join(more)} are beyond the base pool"
    print(message)
    return {}


def _check_output(cfg):
    """Raise UsageError for missing flags, and where the output would replace a file that the command did not make."""
    flags = ("config", "output_dir", "input", "base_skeleton_pool")
    missing = [f"--{name}" for name in flags if getattr(cfg, name, "given") == ""]
    if missing:
        raise UsageError(f"{' '.join(missing)}: not given")
    if Path(cfg.output_dir, "skeletons.npz").exists() and not cfg.fresh:
        raise UsageError(f"{cfg.output_dir} holds a skeleton pool; --fresh overwrites it\ntry: --fresh")
    other = unused(cfg.output_dir, "_new")
    inputs = [getattr(cfg, name, "") for name in ("config", "input", "base_skeleton_pool")]
    for name, made_here in MADE_HERE.items():
        path = Path(cfg.output_dir, name)
        check_replaceable(path, cfg.fresh, made_here, flag="--output_dir", inputs=inputs, other=other)
