"""Formulas and skeletons in files: csv test sets, saved pools; read without trust, written whole or not at all."""

import csv
import dataclasses
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.files import root
from data_utils.formulas.expressions import OPERATORS, Alphabet, parse_formula, structure
from data_utils.formulas.skeletons import Pool

EVERY = Alphabet(OPERATORS, [f"x{i + 1}" for i in range(64)])  # any skeleton fits it
Formula = namedtuple("Formula", "name prefix values variables row")
ARRAYS = ("tokens", "lengths", "counts")
COLUMNS = ("name", "formula", "variables", "ranges")


def read_formulas(path, skip_bad_lines=False, warn=lambda message: None, columns=COLUMNS):
    """Read a test set (csv with a header) -> list of Formula(name, prefix, values, variables, row as a dict).

    Raises DataError with file:line and the reason; with skip_bad_lines these lines are only passed to `warn`.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{path}:1: no column {', '.join(missing)}: expected {','.join(columns)}")
            found = []
            for row in reader:
                try:
                    found.append(_formula(row))
                except DataError as e:
                    message = f"{path}:{reader.line_num}: {e}"
                    if not skip_bad_lines:
                        raise DataError(message) from e
                    warn(message)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: {e.strerror if isinstance(e, OSError) else e}\n{IMPORT}") from e
    if not found:
        raise DataError(f"{path}: no formula in it\n{IMPORT}")
    return found


IMPORT = "try: ./scripts/import_test_sets.sh, or the right path in holdout_pools"


def _formula(row):
    if None in row or None in row.values():
        raise DataError(f"{len([v for v in row.values() if v is not None])} cells, not as many as the header has")
    variables = row["variables"].split()
    if len(row["ranges"].split()) != len(variables):
        raise DataError(f"{len(variables)} variables, {len(row['ranges'].split())} ranges")
    prefix, values = parse_formula(row["formula"], variables)
    return Formula(row["name"], prefix, values, variables, row)


def save_pool(folder, found, alphabet, pool, **about):
    """Write skeletons.npz (tokens, lengths, counts) and skeleton_pool.yaml: whole files or none."""
    import yaml

    from data_utils.files import make_room, write_atomic

    tokens = found.tokens[:, : max(1, int((found.tokens > 0).sum(1).max(initial=0)))]
    lengths = (tokens > 0).sum(1).astype(np.uint8)
    arrays = dict(tokens=tokens, lengths=lengths, counts=found.counts.astype(np.int64))
    for name, made_here in MADE_HERE.items():
        make_room(Path(folder, name), made_here)
    write_atomic(Path(folder, "skeletons.npz"), lambda file: np.savez_compressed(file, **arrays))
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(pool).items()}
    settings |= dict(variables=alphabet.variables, operators=alphabet.operators, size=len(tokens), **about)
    text = yaml.safe_dump(settings, sort_keys=False, width=110)
    write_atomic(Path(folder, "skeleton_pool.yaml"), lambda file: file.write(text.encode("utf-8")))


def _is_pool(path):
    """Return whether skeletons.npz has the arrays of a pool, and no others."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.namelist()) == sorted(f"{name}.npy" for name in ARRAYS)
    except (OSError, zipfile.BadZipFile):
        return False


def _is_of_pool(path):
    """Return whether skeleton_pool.yaml is that of the pool beside it: it says how many skeletons that holds."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        with np.load(path.with_name("skeletons.npz"), allow_pickle=False) as file:
            return settings["size"] == len(file["lengths"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, yaml.YAMLError):
        return False


MADE_HERE = {"skeleton_pool.yaml": _is_of_pool, "skeletons.npz": _is_pool}  # the first needs the second


def load_pool(folder):
    """Return (Pool, Alphabet) of a saved pool; DataError for what is missing, damaged or no pool."""
    import yaml

    folder = Path(str(folder).replace("{{ROOT}}", str(root())))
    path = folder / "skeleton_pool.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        alphabet = Alphabet(settings["operators"], settings["variables"])
        path = folder / "skeletons.npz"
        with zipfile.ZipFile(path) as archive:  # a small file can hold arrays that fill the memory
            if sum(entry.file_size for entry in archive.infolist()) > 2**32:
                raise ValueError("more than 4 GiB unpacked")
        with np.load(path, allow_pickle=False) as file:
            tokens, lengths, counts = (file[name] for name in ("tokens", "lengths", "counts"))
        if tokens.dtype != np.uint8 or tokens.ndim != 2 or lengths.shape != counts.shape or len(tokens) != len(lengths):
            raise ValueError(f"tokens {tokens.dtype} {tokens.shape}, lengths {lengths.shape}, counts {counts.shape}")
        if not len(tokens) or (counts < 1).any() or (tokens.max(initial=0) >= len(alphabet.tokens)):
            raise ValueError("no skeletons, counts below 1, or tokens beyond its alphabet")
        if ((tokens > 0).sum(1) != lengths).any():
            raise ValueError("lengths are not those of the tokens")
        structure(alphabet.arity[tokens])
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, UsageError, zipfile.BadZipFile,
            zlib.error, yaml.YAMLError) as e:  # fmt: skip
        reason = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(f"{path}: {reason}\n{IMPORT}, or python prepare_data.py generate-skeleton-pool") from e
    return Pool(tokens, counts), alphabet


def translate(found, old, new):
    """Return the Pool `found` of alphabet `old` with the ids of `new`; UsageError where tokens of it are missing."""
    table = np.array([new.ids.get(token, 0) for token in old.tokens], np.uint8)
    missing = [old.tokens[i] for i in np.unique(found.tokens).tolist() if i and not table[i]]
    if missing:
        raise UsageError(f"the saved pool has {' '.join(missing)}, which the alphabet lacks: {' '.join(new.tokens)}")
    return Pool(table[found.tokens], found.counts)
