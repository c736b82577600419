"""Formulas and skeletons in files: csv test sets and saved pools, checked when read and written atomically."""

import csv
import dataclasses
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.files import make_room, root, write_atomic
from data_utils.formulas.expressions import OPERATORS, Alphabet, parse_formula, structure
from data_utils.formulas.skeletons import Pool

EVERY = Alphabet(OPERATORS, [f"x{i + 1}" for i in range(64)])  # any skeleton fits it
Formula = namedtuple("Formula", "name prefix values variables row")
ARRAYS = ("tokens", "lengths", "counts")
COLUMNS = ("name", "formula", "variables", "ranges")
LARGEST = 2**32  # bytes of the arrays of a pool: a small zip file can hold arrays that fill the memory
REMEDY = "try: bash scripts/import_test_sets.sh"


def read_formulas(path, skip_bad_lines=False, warn=lambda message: None, columns=COLUMNS) -> list[Formula]:
    """Read a test set, a csv file with a header -> list of Formula(name, prefix, values, variables, row as a dict).

    Raises DataError with file:line and the reason. With skip_bad_lines a bad line is only passed to `warn`.
    """
    formulas = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise DataError(f"{path}:1: no column {', '.join(missing)}: expected {','.join(columns)}")
            for row in reader:
                try:
                    formulas.append(_formula(row))
                except DataError as e:
                    message = f"{path}:{reader.line_num}: {e}"
                    if not skip_bad_lines:
                        raise DataError(message) from e
                    warn(message)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: {e.strerror if isinstance(e, OSError) else e}\n{REMEDY}") from e
    if not formulas:
        raise DataError(f"{path}: no formula in it\n{REMEDY}")
    return formulas


def _formula(row):
    """Return the Formula of a row of a csv file."""
    if None in row or None in row.values():
        cells = [value for value in row.values() if value is not None]
        raise DataError(f"{len(cells)} cells, not as many as the header has")
    variables = row["variables"].split()
    ranges = row["ranges"].split()
    if len(ranges) != len(variables):
        raise DataError(f"{len(variables)} variables, {len(ranges)} ranges")
    prefix, values = parse_formula(row["formula"], variables)
    return Formula(row["name"], prefix, values, variables, row)


def save_pool(folder, skeletons: Pool, alphabet: Alphabet, pool):
    """Write the Pool `skeletons` as skeletons.npz (tokens, lengths, counts) and skeleton_pool.yaml.

    pool: the PoolConfig that they were drawn with.
    """
    import yaml

    lengths = (skeletons.tokens > 0).sum(1)
    tokens = skeletons.tokens[:, : max(1, int(lengths.max(initial=0)))]
    counts = skeletons.counts.astype(np.int64)
    arrays = dict(tokens=tokens, lengths=lengths.astype(np.uint8), counts=counts)
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(pool).items()}
    settings |= dict(variables=alphabet.variables, operators=alphabet.operators, size=len(tokens))
    text = yaml.safe_dump(settings, sort_keys=False, width=110)
    for name, made_here in MADE_HERE.items():
        make_room(Path(folder, name), made_here)
    write_atomic(Path(folder, "skeletons.npz"), lambda file: np.savez_compressed(file, **arrays))
    write_atomic(Path(folder, "skeleton_pool.yaml"), lambda file: file.write(text.encode("utf-8")))


def _is_pool(path):
    """Return whether skeletons.npz has the arrays of a pool, and no others."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.namelist()) == sorted(f"{name}.npy" for name in ARRAYS)
    except (OSError, zipfile.BadZipFile):
        return False


def _is_settings(path):
    """Return whether skeleton_pool.yaml belongs to the pool beside it: it says how many skeletons that holds."""
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        with np.load(path.with_name("skeletons.npz"), allow_pickle=False) as file:
            return settings["size"] == len(file["lengths"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, yaml.YAMLError):
        return False


# {file of a pool: whether a file of that name was made here}. The first test needs the second file.
MADE_HERE = {"skeleton_pool.yaml": _is_settings, "skeletons.npz": _is_pool}


def load_pool(folder) -> tuple[Pool, Alphabet]:
    """Return (Pool, Alphabet) of a saved pool. Raises DataError for a pool that is missing or damaged."""
    import yaml

    damage = (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, UsageError)
    damage += (zipfile.BadZipFile, zlib.error, yaml.YAMLError)
    folder = Path(str(folder).replace("{{ROOT}}", str(root())))
    path = folder / "skeleton_pool.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        alphabet = Alphabet(settings["operators"], settings["variables"])
        path = folder / "skeletons.npz"
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise ValueError("more than 4 GiB unpacked")
        with np.load(path, allow_pickle=False) as file:
            tokens, lengths, counts = (file[name] for name in ARRAYS)
        if tokens.dtype != np.uint8 or tokens.ndim != 2 or lengths.shape != counts.shape or len(tokens) != len(lengths):
            raise ValueError(f"tokens {tokens.dtype} {tokens.shape}, lengths {lengths.shape}, counts {counts.shape}")
        if not len(tokens) or (counts < 1).any() or (tokens.max(initial=0) >= len(alphabet.tokens)):
            raise ValueError("no skeletons, counts below 1, or tokens beyond its alphabet")
        if ((tokens > 0).sum(1) != lengths).any():
            raise ValueError("lengths are not those of the tokens")
        structure(alphabet.arity[tokens])
    except damage as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else f"{type(e).__name__}: {e}".splitlines()[0]
        raise DataError(f"{path}: {reason}\n{REMEDY}") from e
    return Pool(tokens, counts), alphabet


def translate(skeletons: Pool, old: Alphabet, new: Alphabet) -> Pool:
    """Return a Pool in ids of the Alphabet `old` as one in ids of `new`. Raises UsageError where `new` lacks tokens."""
    table = np.array([new.ids.get(token, 0) for token in old.tokens], np.uint8)
    missing = [old.tokens[i] for i in np.unique(skeletons.tokens).tolist() if i and not table[i]]
    if missing:
        raise UsageError(f"the saved pool has {' '.join(missing)}, which the alphabet lacks: {' '.join(new.tokens)}")
    return Pool(table[skeletons.tokens], skeletons.counts)
