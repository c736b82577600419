"""Particle events, from files or from the decay chains, as normalised tensors and back.

A row is 2 + 5 T numbers, 92 for the usual T = 18 slots: T ids (0 nothing, 1 jet, 2 b-jet, 3 e+, 4 e-, 5 mu-, 6 mu+,
7 photon); missing transverse momentum (MET) and its phi; T times E, pT, eta, phi. GeV and radians. Values in a slot
of id 0 are ignored. N events, T slots, F features.
"""

import hashlib
import io
import shlex
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
HIGHEST_MEDIAN_PT = 5000  # GeV; a higher median means that the file is in MeV


def load_events(data, *, events, limit, labels, features, phi, energy_unit, seed, stats=None):
    """Return ({train, val, test: {x, ids, globals, y}}, meta): CPU tensors, and plain Python that describes them.

    x: (N, T, F) float32, the `features` in their order, some of E pT eta phi. E and pT are logarithms; phi is a sine
    and a cosine unless `phi` is raw. ids: (N, T) int64. globals: (N, 3) float32, log(1 + MET) and sine and cosine of
    its phi. y: (N,) int64. `stats` (of a checkpoint) standardise x and globals; without them mean and deviation of the
    valid train objects and of the train events do. x is 0 where the id is 0.

    data: "decay_chain" for new events, as many as `events`, or a file for `read_events`. Of a file only the `labels`
    are used, and at most `limit` events per split (0: all). energy_unit: GeV or MeV, of the file. meta: features, phi,
    n_tokens, cont_dim, n_globals, num_types, stats, dropped {reason: rows}, data_hash, source. The caller reports the
    dropped rows. Raises UsageError, DataError.
    """
    import torch

    if not features or set(features) - set(COLUMNS) or len(set(features)) < len(features):
        raise UsageError(f"--features {' '.join(features)}: expected some of {' '.join(COLUMNS)}, each once")
    if str(data) == "decay_chain" and events < 10:
        raise UsageError(f"--events {events}: expected 10 or more, for three splits")
    rows, y, split = open_rows(data, events=events, energy_unit=energy_unit, seed=seed)
    wanted = np.isin(y, labels)
    if not wanted.any():
        expected = " ".join(map(str, labels))
        present = " ".join(map(str, np.unique(y)))
        raise DataError(f"{data}: no event of labels {expected}\nlabels there: {present}")
    rows, y, split, dropped = drop_damaged(rows[wanted], y[wanted], split[wanted], data)
    chosen = [np.flatnonzero(split == i)[: limit or None] for i in range(len(SPLITS))]
    if not all(map(len, chosen)):
        counts = ", ".join(f"{name} {len(index)}" for name, index in zip(SPLITS, chosen, strict=True))
        raise DataError(f"{data}: a split is empty: {counts}\nfix: more events, other --labels")
    check_unit(rows, data)
    parts = {name: (rows[index], y[index]) for name, index in zip(SPLITS, chosen, strict=True)}
    digest = hashlib.sha256()
    for part_rows, part_labels in parts.values():
        digest.update(part_rows.tobytes())
        digest.update(part_labels.tobytes())
    meta = dict(
        features=list(features),
        phi=phi,
        n_tokens=slots(rows),
        cont_dim=len(features) + (phi == "sincos" and "phi" in features),
        n_globals=N_GLOBALS,
        num_types=NUM_TYPES,
        stats=stats or statistics(parts["train"][0], features, phi),
        dropped=dropped,
        data_hash=digest.hexdigest(),
        source=str(data),
    )
    splits = {}
    for name, (part_rows, part_labels) in parts.items():
        x, ids, globals = from_rows(part_rows, meta)
        arrays = dict(x=x, ids=ids, globals=globals, y=part_labels)
        splits[name] = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return splits, meta


# ---- rows and features -----------------------------------------------------------------------------------------------


def slots(rows):
    """Return T, the number of slots in rows (N, 2 + 5 T)."""
    return (rows.shape[1] - 2) // 5


def objects(rows):
    """Return the view (N, T, 4) of E, pT, eta, phi in rows (N, 2 + 5 T), which must be contiguous."""
    return rows[:, slots(rows) + 2 :].reshape(len(rows), -1, 4)


def from_rows(rows, meta):
    """Return x (N, T, F) float32, ids (N, T) int64, globals (N, 3) float32, standardised by meta["stats"]; numpy."""
    stats = meta["stats"]
    ids = rows[:, : slots(rows)].astype(np.int64)
    x = np.zeros((*ids.shape, meta["cont_dim"]), np.float32)
    x[ids > 0] = (_features(rows, meta["features"], meta["phi"]) - stats["mean"]) / stats["std"]
    globals = (_globals(rows) - stats["globals_mean"]) / stats["globals_std"]
    return x, ids, globals.astype(np.float32)


def to_rows(x, ids, globals, meta):
    """Undo `from_rows`: return rows (N, 2 + 5 T) float32 of CPU tensors or arrays.

    Features that are not modelled are 0, and so are slots of id 0. With E, pT and eta, E is at least pT cosh(eta), the
    energy of a massless object.
    """
    stats, ids = meta["stats"], np.asarray(ids)
    x = np.asarray(x, np.float64) * stats["std"] + stats["mean"]
    met, sine, cosine = (np.asarray(globals, np.float64) * stats["globals_std"] + stats["globals_mean"]).T
    columns, values = {}, iter(np.moveaxis(x, -1, 0))
    for name in meta["features"]:
        value = next(values)
        if name in ("E", "pT"):
            value = np.exp(value)
        elif name == "phi":
            value = np.arctan2(value, next(values)) if meta["phi"] == "sincos" else wrap(value)
        columns[name] = value
    if {"E", "pT", "eta"} <= columns.keys():
        columns["E"] = np.maximum(columns["E"], columns["pT"] * np.cosh(columns["eta"]))
    T = ids.shape[1]
    rows = np.zeros((len(ids), 2 + 5 * T), np.float32)
    rows[:, :T] = ids
    rows[:, T] = np.maximum(np.expm1(met), 0)
    rows[:, T + 1] = np.arctan2(sine, cosine)
    for name, value in columns.items():
        objects(rows)[..., COLUMNS.index(name)] = np.where(ids > 0, value, 0)
    return rows


def statistics(rows, features, phi):
    """Return mean and std (F) of the valid objects, globals_mean and globals_std (3) of the events, as lists."""
    stats = {}
    for prefix, values in (("", _features(rows, features, phi)), ("globals_", _globals(rows))):
        stats[f"{prefix}mean"] = values.mean(0).tolist()
        stats[f"{prefix}std"] = np.maximum(values.std(0), 1e-6).tolist()
    return stats


def _features(rows, features, phi):
    """Return (valid objects, F) float64."""
    valid = objects(rows)[rows[:, : slots(rows)] > 0].astype(np.float64)
    columns = []
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
    order = np.random.default_rng((seed, 0)).permutation(n)
    split = np.zeros(n, np.int8)
    split[order[n * 8 // 10 :]] = 1
    split[order[n * 9 // 10 :]] = 2
    return split


def open_rows(data, *, events, energy_unit, seed):
    """Return rows in GeV, labels and splits as `read_events` does: of a file, or of `events` new decay chains."""
    if str(data) == "decay_chain":
        return *decay_chain(events, seed), split_rows(events, seed)
    rows, labels, split = read_events(data, seed=seed)
    if energy_unit == "MeV":
        rows[:, slots(rows)] /= 1000
        objects(rows)[..., :2] /= 1000
    return rows, labels, split


def check_unit(rows, source):
    """Raise DataError, which names `source`, if the pT of rows (N, 2 + 5 T) look like MeV."""
    middle = np.median(objects(rows)[..., 1][rows[:, : slots(rows)] > 0])
    if middle > HIGHEST_MEDIAN_PT:
        raise DataError(f"{source}: half of the pT are above {middle:.0f}: looks like MeV\ntry: --energy_unit MeV")


def read_events(path, *, seed):
    """Return rows (N, 2 + 5 T) float32, labels (N,) int64 and splits (N,) int8 as they stand in a file.

    The file is .npz, or .h5 or .hdf5 with the package h5py. Its keys are X_train, Y_train, X_val, Y_val, X_test, Y_test
    (or y_); or X and y, which `split_rows` splits by the seed. Raises UsageError for another ending, DataError for
    arrays that are missing or have another shape.
    """
    path = Path(path)
    arrays, keys = _read(path)
    names = [""] if "X" in arrays or "y" in arrays else [f"_{split}" for split in SPLITS]
    missing = [key for name in names for key in ("X" + name, "y" + name) if key not in arrays]
    if missing:
        raise DataError(
            f"{path}: no {', '.join(missing)}: expected X and y, or X_train, Y_train and so for val and test\n"
            f"keys there: {', '.join(keys) or 'none'}"
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
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and the row is dropped
        rows = np.concatenate([arrays["X" + name] for name in names]).astype(np.float32, order="C")
    labels = np.concatenate([arrays["y" + name].reshape(-1) for name in names]).astype(np.int64)
    if len(names) == 1:
        return rows, labels, split_rows(len(rows), seed)
    sizes = [len(arrays["X" + name]) for name in names]
    return rows, labels, np.repeat(np.arange(3, dtype=np.int8), sizes)


def _read(path):
    """Return ({X_train ..: array}, all keys of the file); Y_ is read as y_."""
    h5py = h5py_for(path, "--data decay_chain")
    if not path.is_file():
        raise DataError(f"{path}: no such file\ntry: python prepare_data.py events --out {shlex.quote(str(path))}")
    expected = {"X", "y"} | {f"{letter}_{split}" for letter in "Xy" for split in SPLITS}
    try:
        with h5py.File(path, "r") if h5py else np.load(path, allow_pickle=False) as file:
            names = {"y" + key[1:] if key[:1] == "Y" else key: key for key in file}
            arrays = {name: file[key][...] for name, key in names.items() if name in expected}
            return arrays, sorted(names.values())
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be read: {type(e).__name__}: {reason}") from e


def h5py_for(path, remedy):
    """Return None for an .npz file and the package h5py for .h5 and .hdf5.

    Raises UsageError, with the `remedy`, for another ending; DataError without h5py.
    """
    if Path(path).suffix == ".npz":
        return None
    if Path(path).suffix not in (".h5", ".hdf5"):
        raise UsageError(f"{path}: expected a file .npz, .h5 or .hdf5\ntry: {remedy}")
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path}: needs the package h5py, an .npz file does not\ntry: pip install h5py") from None
    return h5py


def write_events(path, rows, labels, *, seed):
    """Write rows and labels in three splits as X_train, Y_train ..: .npz or .h5 by the ending of `path`, atomically."""
    split, arrays = split_rows(len(rows), seed), {}
    for i, name in enumerate(SPLITS):
        arrays[f"X_{name}"] = rows[split == i]
        arrays[f"Y_{name}"] = labels[split == i].astype(np.int8)
    content = io.BytesIO()
    h5py = h5py_for(path, "--out data/events.npz")
    if not h5py:
        np.savez_compressed(content, **arrays)
        with zipfile.ZipFile(content, "a") as archive:
            archive.comment = MARK  # a marked file may be replaced
    else:
        with h5py.File(content, "w") as file:
            file.attrs["source"] = np.bytes_(MARK)
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip", shuffle=True)
    make_room(path, is_marked)
    write_atomic(path, lambda file: file.write(content.getvalue()))


def drop_damaged(rows, labels, split, source):
    """Return rows, labels and split without the damaged rows, and {reason: number of rows}.

    The first reason that fits counts. Empties the slots of id 0 in place, and wraps phi. Raises DataError, which names
    `source`, when more than MOST_DROPPED of the rows are damaged.
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
    """Return the order (n,) int64 of n events in an epoch; with a `shape`, repeated from its start to fill that."""
    order = np.random.default_rng((seed, 1, epoch)).permutation(n)
    return np.resize(order, shape) if shape else order


def rotate_and_mirror(columns, meta, seed, epoch):
    """Return a split with each event rotated about the beam by a random angle, and mirrored in half of the cases.

    The mirror acts on eta and on phi independently. Collisions prefer no side, so ids, energies, pT, the length of MET,
    masses and angles between objects stay. The result follows from seed, epoch and an event's place in the split. A
    split without ids comes back unchanged.
    """
    import torch

    if "ids" not in columns:
        return columns
    x = columns["x"]
    stats = {name: x.new_tensor(values) for name, values in meta["stats"].items()}
    draws = x.new_tensor(np.random.default_rng((seed, 4, epoch)).random((3, len(x), 1)))
    angle = 2 * np.pi * draws[0]  # (N, 1)
    eta_sign, phi_sign = 1 - 2 * draws[1:].round()

    def rotate(sine, cosine):
        return (
            phi_sign * sine * angle.cos() + cosine * angle.sin(),
            cosine * angle.cos() - phi_sign * sine * angle.sin(),
        )

    met, *direction = (columns["globals"] * stats["globals_std"] + stats["globals_mean"]).split(1, -1)
    globals = (torch.cat([met, *rotate(*direction)], -1) - stats["globals_mean"]) / stats["globals_std"]
    features, values = [], iter((x * stats["std"] + stats["mean"]).unbind(-1))
    for name in meta["features"]:
        value = next(values)
        if name == "phi" and meta["phi"] == "sincos":
            features += rotate(value, next(values))
        elif name == "phi":
            features.append(wrap(phi_sign * value + angle))
        else:
            features.append(eta_sign * value if name == "eta" else value)
    x = (torch.stack(features, -1) - stats["mean"]) / stats["std"]
    return columns | dict(x=x.masked_fill(columns["ids"][..., None] == 0, 0), globals=globals)


def test_table(seed, task):
    """Return ({train, val, test: {x (N, 16), y (N,)}}, meta): float32 tensors, 5000 rows in all.

    y = x w + 0.1 noise, with x, w and noise of N(0, 1). For the task "binary" y is 1 where that is positive, else 0. y
    is not scaled, so a regression can reach an error of 0.1. x is standardised by the train rows.
    """
    import torch

    rng = np.random.default_rng((seed, 3))
    x = rng.standard_normal((5000, 16))
    weights = rng.standard_normal(16)
    y = x @ weights + 0.1 * rng.standard_normal(len(x))
    y = y > 0 if task == "binary" else y
    split = split_rows(len(x), seed)
    x = (x - x[split == 0].mean(0)) / x[split == 0].std(0)
    tensors = dict(x=torch.from_numpy(x.astype(np.float32)), y=torch.from_numpy(y.astype(np.float32)))
    parts = {name: {key: tensor[split == i] for key, tensor in tensors.items()} for i, name in enumerate(SPLITS)}
    return parts, dict(cont_dim=16, dropped={}, data_hash=f"table-{seed}-{task}", source=f"table for {task}")
