"""Particle events: rows in files or made here, as normalised tensors, and back.

A row is 2 + 5 T numbers, 92 for the usual T = 18 slots: T ids (0 nothing, 1 jet, 2 b-jet, 3 e+, 4 e-, 5 mu-, 6 mu+,
7 photon); missing transverse momentum (MET) and its phi; T times E, pT, eta, phi. GeV and radians. What stands in a
slot of id 0 is never looked at. N events, T slots, F features.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.events.decay_chain import decay_chain
from data_utils.files import MARK, is_marked, make_room, write_atomic

COLUMNS = ("E", "pT", "eta", "phi")
NUM_TYPES, N_GLOBALS = 8, 3
SPLITS = ("train", "val", "test")
MOST_DROPPED = 0.01  # share of the rows that may be damaged
HIGHEST_ETA = 10
HIGHEST_MEDIAN_PT = 5000  # GeV; above it the unit is another one


def load_events(data, *, events, limit, labels, features, phi, energy_unit, seed, stats=None):
    """Return ({train, val, test: {x, ids, globals, y}}, meta): tensors on the CPU, and plain Python about them.

    x float32 (N, T, F): the `features`, some of E pT eta phi in that order; energies as logarithms, phi as sine and
    cosine unless `phi` is raw. ids int64 (N, T). globals float32 (N, 3): log(1 + MET), sine and cosine of its phi.
    y int64 (N,). x and globals are standardised by mean and deviation of the valid train objects and the train events,
    or by `stats`, those of a checkpoint; x is 0 where the id is.

    data: decay_chain, for `events` new ones, or a file for `read_events`, of which the `labels` are kept, and `limit`
    events a split (0: all). energy_unit: of the file, GeV or MeV. meta: features, phi, n_tokens, cont_dim, n_globals,
    num_types, stats, dropped {reason: rows}, data_hash, source; the caller says aloud what was dropped. Raises
    UsageError, DataError.
    """
    import torch

    if not features or set(features) - set(COLUMNS) or len(set(features)) < len(features):
        raise UsageError(f"--features {' '.join(features)}: expected some of {' '.join(COLUMNS)}, each once")
    if str(data) == "decay_chain":
        if events < 10:
            raise UsageError(f"--events {events}: expected 10 or more, for three splits")
        rows, y = decay_chain(events, seed)
        split = split_rows(events, seed)
    else:
        rows, y, split = read_events(data, seed=seed)
        if energy_unit == "MeV":
            rows[:, slots(rows)] /= 1000
            objects(rows)[..., :2] /= 1000
    wanted = np.isin(y, labels)
    if not wanted.any():
        asked, there = (" ".join(map(str, x)) for x in (labels, np.unique(y)))
        raise DataError(f"{data}: no event of labels {asked}\nlabels there: {there}")
    rows, y, split, dropped = clean(rows[wanted], y[wanted], split[wanted], data)
    n_tokens = slots(rows)
    chosen = [np.flatnonzero(split == i)[: limit or None] for i in range(len(SPLITS))]
    if not all(map(len, chosen)):
        counts = ", ".join(f"{name} {len(c)}" for name, c in zip(SPLITS, chosen, strict=True))
        raise DataError(f"{data}: a split is empty: {counts}\ntry: more events, other --labels")
    middle = np.median(objects(rows)[..., 1][rows[:, :n_tokens] > 0])
    if middle > HIGHEST_MEDIAN_PT:
        raise DataError(f"{data}: half of the pT are above {middle:.0f}: looks like MeV\ntry: energy_unit=MeV")
    parts = {name: (rows[c], y[c]) for name, c in zip(SPLITS, chosen, strict=True)}
    digest = hashlib.sha256()
    for content in (array for part in parts.values() for array in part):
        digest.update(content.tobytes())
    cont_dim = len(features) + (phi == "sincos" and "phi" in features)
    meta = dict(features=list(features), phi=phi, n_tokens=n_tokens, cont_dim=cont_dim, n_globals=N_GLOBALS)
    meta |= dict(num_types=NUM_TYPES, stats=stats or statistics(parts["train"][0], features, phi), dropped=dropped)
    meta |= dict(data_hash=digest.hexdigest(), source=str(data))
    splits = {}
    for name, (part, label) in parts.items():
        arrays = dict(zip(("x", "ids", "globals"), from_rows(part, meta), strict=True), y=label)
        splits[name] = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return splits, meta


# ---- rows and features -----------------------------------------------------------------------------------------------


def slots(rows):
    return (rows.shape[1] - 2) // 5


def objects(rows):
    """Return the view (N, T, 4) of E, pT, eta, phi in rows (N, 2 + 5 T), which must be contiguous."""
    return rows[:, slots(rows) + 2 :].reshape(len(rows), -1, 4)


def from_rows(rows, meta):
    """Return x (N, T, F) float32, ids (N, T) int64, globals (N, 3) float32, standardised by meta["stats"]; numpy."""
    stats, ids = meta["stats"], rows[:, : slots(rows)].astype(np.int64)
    x = np.zeros((*ids.shape, meta["cont_dim"]), np.float32)
    x[ids > 0] = (_features(rows, meta["features"], meta["phi"]) - stats["mean"]) / stats["std"]
    return x, ids, ((_globals(rows) - stats["globals_mean"]) / stats["globals_std"]).astype(np.float32)


def to_rows(x, ids, globals, meta):
    """Undo `from_rows` -> rows (N, 2 + 5 T) float32. Tensors on the CPU, or arrays.

    Features that were not modelled are 0, and so is all in slots of id 0. With E, pT and eta, E is at least
    pT cosh(eta), the energy of a massless object.
    """
    stats, ids = meta["stats"], np.asarray(ids)
    x = np.asarray(x, np.float64) * stats["std"] + stats["mean"]
    met, sine, cosine = (np.asarray(globals, np.float64) * stats["globals_std"] + stats["globals_mean"]).T
    found, columns = {}, iter(np.moveaxis(x, -1, 0))
    for name in meta["features"]:
        value = next(columns)
        if name in ("E", "pT"):
            value = np.exp(value)
        elif name == "phi":
            value = np.arctan2(value, next(columns)) if meta["phi"] == "sincos" else wrap(value)
        found[name] = value
    if {"E", "pT", "eta"} <= found.keys():
        found["E"] = np.maximum(found["E"], found["pT"] * np.cosh(found["eta"]))
    rows = np.zeros((len(ids), 2 + 5 * ids.shape[1]), np.float32)
    rows[:, : ids.shape[1]] = ids
    rows[:, ids.shape[1]], rows[:, ids.shape[1] + 1] = np.maximum(np.expm1(met), 0), np.arctan2(sine, cosine)
    for name, value in found.items():
        objects(rows)[..., COLUMNS.index(name)] = np.where(ids > 0, value, 0)
    return rows


def statistics(rows, features, phi):
    """Return mean and std (F) of the valid objects, globals_mean and globals_std (3) of the events, as lists."""
    found = {}
    for prefix, values in (("", _features(rows, features, phi)), ("globals_", _globals(rows))):
        found |= {prefix + "mean": values.mean(0).tolist(), prefix + "std": np.maximum(values.std(0), 1e-6).tolist()}
    return found


def _features(rows, features, phi):
    """Return (valid objects, F) float64."""
    valid, columns = objects(rows)[rows[:, : slots(rows)] > 0].astype(np.float64), []
    for name in features:
        value = valid[:, COLUMNS.index(name)]
        if name == "phi" and phi == "sincos":
            columns += [np.sin(value), np.cos(value)]
        else:
            columns.append(np.log(value) if name in ("E", "pT") else value)
    return np.stack(columns, 1)


def _globals(rows):
    met, angle = rows[:, slots(rows) : slots(rows) + 2].astype(np.float64).T
    return np.stack([np.log1p(met), np.sin(angle), np.cos(angle)], 1)


def wrap(phi):
    """Return angles between -pi and pi."""
    return (phi + np.pi) % (2 * np.pi) - np.pi


# ---- files -----------------------------------------------------------------------------------------------------------


def split_rows(n, seed):
    """Return (n,) int8: 0 train, 1 val, 2 test, 80/10/10 at random."""
    order, split = np.random.default_rng((seed, 0)).permutation(n), np.zeros(n, np.int8)
    split[order[n * 8 // 10 :]] = 1
    split[order[n * 9 // 10 :]] = 2
    return split


def read_events(path, *, seed):
    """Return rows (N, 2 + 5 T) float32, labels (N,) int64 and splits (N,) int8 as they stand in a file.

    .npz, or .h5 and .hdf5 with the package h5py: X_train, Y_train, X_val, Y_val, X_test, Y_test (or y_); or X and y,
    which `split_rows` splits by the seed. Raises UsageError for another ending, DataError for what is missing or has
    another shape.
    """
    path = Path(path)
    arrays, there = _read(path)
    names = [""] if "X" in arrays or "y" in arrays else [f"_{split}" for split in SPLITS]
    missing = [key for name in names for key in ("X" + name, "y" + name) if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: no {', '.join(missing)}: expected X and y, or X_train, Y_train and so for val and test\n"
            f"keys there: {', '.join(there) or 'none'}"
        )
    for name in names:
        x, y = arrays["X" + name], arrays["y" + name]
        fits = x.ndim == 2 and x.dtype.kind in "fiu" and x.shape[1] >= 7 and x.shape[1] % 5 == 2
        if not fits or x.shape[1] != arrays["X" + names[0]].shape[1]:
            raise DataError(f"{path}: X{name} is {x.dtype} {x.shape}: expected numbers (events, 2 + 5 T), all of one T")
        if y.size != len(x) or y.dtype.kind not in "fiu" or (y % 1 != 0).any():  # nan as well
            raise DataError(f"{path}: y{name} is {y.dtype} {y.shape}: expected whole numbers ({len(x)},), as long as X")
        if not len(x):
            raise DataError(f"{path}: X{name} is empty: {x.shape}")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is dropped
        rows = np.concatenate([arrays["X" + name] for name in names]).astype(np.float32, order="C")
    labels = np.concatenate([arrays["y" + name].reshape(-1) for name in names]).astype(np.int64)
    sizes = [len(arrays["X" + name]) for name in names]
    split = np.repeat(np.arange(3, dtype=np.int8), sizes) if len(names) == 3 else split_rows(len(rows), seed)
    return rows, labels, split


def _read(path):
    """Return {X_train ..: array}, all keys of the file; Y_ is read as y_."""
    h5py = opener(path, "--data decay_chain")
    if not path.is_file():
        raise DataError(f"{path}: no such file\ntry: python prepare_data.py events --out {path}")
    known = {"X", "y"} | {f"{letter}_{split}" for letter in "Xy" for split in SPLITS}
    try:
        with h5py.File(path, "r") if h5py else np.load(path, allow_pickle=False) as file:
            names = {"y" + key[1:] if key[:1] == "Y" else key: key for key in file}
            return {name: file[key][...] for name, key in names.items() if name in known}, sorted(names.values())
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be read: {type(e).__name__}: {reason}") from e


def opener(path, otherwise):
    """Return None for an .npz file, the package h5py for .h5 and .hdf5. Raises UsageError, DataError without h5py."""
    if Path(path).suffix == ".npz":
        return None
    if Path(path).suffix not in (".h5", ".hdf5"):
        raise UsageError(f"{path}: expected a file .npz, .h5 or .hdf5\ntry: {otherwise}")
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path}: needs the package h5py\ntry: pip install h5py, or an .npz file") from None
    return h5py


def write_events(path, rows, labels, *, seed):
    """Write rows and labels in three splits as X_train, Y_train ..: .npz or .h5 by the ending of `path`, atomically."""
    split, arrays = split_rows(len(rows), seed), {}
    for i, name in enumerate(SPLITS):
        arrays |= {f"X_{name}": rows[split == i], f"Y_{name}": labels[split == i].astype(np.int8)}
    content = io.BytesIO()
    h5py = opener(path, "--out data/events.npz")
    if not h5py:
        np.savez_compressed(content, **arrays)
        with zipfile.ZipFile(content, "a") as archive:
            archive.comment = MARK  # which says that the file may be made again
    else:
        with h5py.File(content, "w") as file:
            file.attrs["source"] = np.bytes_(MARK)
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip", shuffle=True)
    make_room(path, is_marked)
    write_atomic(path, lambda file: file.write(content.getvalue()))


def clean(rows, labels, split, source):
    """Return rows, labels, split without the damaged rows, and {reason: rows dropped}.

    A row is counted for the first reason that fits. Empties the slots of id 0, in place, and wraps phi. Raises
    DataError, which names `source`, when more than MOST_DROPPED go.
    """
    n_tokens = slots(rows)
    ids, met = rows[:, :n_tokens], rows[:, n_tokens]
    valid = ids != 0  # nan as well
    objects(rows)[~valid] = 0
    energy, pt, eta, _ = np.moveaxis(objects(rows), 2, 0)
    reasons = {
        "NaN or infinite": ~np.isfinite(rows).all(1),
        "id not one of 0 to 7": ~np.isin(ids, range(NUM_TYPES)).all(1),
        "E or pT not above 0": (valid & ~((energy > 0) & (pt > 0))).any(1),
        "MET below 0": met < 0,
        f"eta beyond {HIGHEST_ETA}": (abs(eta) > HIGHEST_ETA).any(1),
        "no object": ~valid.any(1),
    }
    good, dropped = np.ones(len(rows), bool), {}
    for reason, bad in reasons.items():
        if count := int((good & bad).sum()):
            dropped[reason] = count
        good &= ~bad
    lost = len(rows) - good.sum()
    if lost > MOST_DROPPED * len(rows):
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(
            f"{source}: {lost} of {len(rows)} rows are damaged: {counts}\nonly {MOST_DROPPED:.0%} would be dropped"
        )
    rows = rows[good]
    for angles in (rows[:, n_tokens + 1], objects(rows)[..., 3]):
        far = abs(angles) > np.float32(np.pi)  # all others keep their bits
        angles[far] = wrap(angles[far])
    return rows, labels[good], split[good], dropped


# ---- order, symmetries, and the table of test_mlp --------------------------------------------------------------------


def take(columns, index):
    """Return the rows `index` of each column of a split."""
    return {name: column[index] for name, column in columns.items()}


def epoch_order(seed, epoch, n, shape=None):
    """Return the order (n,) int64 in which an epoch goes through n events; filled up from its start to a `shape`."""
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return np.resize(order, shape) if shape else order


def turned(columns, meta, seed, epoch):
    """Return a split whose events are each turned about the beam by a random angle and, half of them, mirrored.

    In eta and in phi, independently. Collisions prefer no side: ids, energies, pT, the length of MET, masses and angles
    between objects stay. A function of seed, epoch and an event's place in the split. Without ids nothing changes.
    """
    import torch

    if "ids" not in columns:
        return columns
    x, stats = columns["x"], {name: columns["x"].new_tensor(values) for name, values in meta["stats"].items()}
    draws = x.new_tensor(np.random.default_rng((seed, 4, epoch)).random((3, len(x), 1)))
    angle, eta, phi = 2 * np.pi * draws[0], *(1 - 2 * draws[1:].round())  # (N, 1); the last two are signs

    def turn(sine, cosine):
        return phi * sine * angle.cos() + cosine * angle.sin(), cosine * angle.cos() - phi * sine * angle.sin()

    met, *direction = (columns["globals"] * stats["globals_std"] + stats["globals_mean"]).split(1, -1)
    globals = (torch.cat([met, *turn(*direction)], -1) - stats["globals_mean"]) / stats["globals_std"]
    found, values = [], iter((x * stats["std"] + stats["mean"]).unbind(-1))
    for name in meta["features"]:
        value = next(values)
        if name == "phi" and meta["phi"] == "sincos":
            found += turn(value, next(values))
        else:
            found.append(eta * value if name == "eta" else wrap(phi * value + angle) if name == "phi" else value)
    x = ((torch.stack(found, -1) - stats["mean"]) / stats["std"]).masked_fill(columns["ids"][..., None] == 0, 0)
    return columns | dict(x=x, globals=globals)


def test_table(seed, task):
    """Return ({train, val, test: {x (N, 16), y (N,)}}, meta): float32 tensors of 5000 rows in all.

    y = x w + 0.1 noise with x, w, noise of N(0, 1); for the task binary 1 where that is positive, else 0; a regression
    can reach an error of 0.1, y is not scaled. x is standardised by the train rows.
    """
    import torch

    rng = np.random.default_rng((seed, 3))
    x, weights = rng.standard_normal((5000, 16)), rng.standard_normal(16)
    y = x @ weights + 0.1 * rng.standard_normal(len(x))
    y = y > 0 if task == "binary" else y
    split = split_rows(len(x), seed)
    x = (x - x[split == 0].mean(0)) / x[split == 0].std(0)
    tensors = [torch.from_numpy(array.astype(np.float32)) for array in (x, y)]
    parts = {name: {k: t[split == i] for k, t in zip("xy", tensors, strict=True)} for i, name in enumerate(SPLITS)}
    return parts, dict(cont_dim=16, dropped={}, data_hash=f"table-{seed}-{task}", source=f"table for {task}")
