"""Particle events, from files or from the decay chains, as normalised tensors and back.

A row is 2 + 5 T numbers, 92 for the usual T = 18 slots: T ids (0 nothing, 1 jet, 2 b-jet, 3 e+, 4 e-, 5 mu-, 6 mu+,
7 photon); missing transverse momentum (MET) and its phi; T times E, pT, eta, phi. GeV and radians. Values in a slot
of id 0 are ignored. A file may name other columns of a particle in an array `features`; a row then is 2 + (1 + C) T
numbers. N events, T slots, C columns of a particle, F features: what a model reads of them.
"""

import difflib
import hashlib
import io
import json
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError
from data_utils.events.decay_chain import VERSION, decay_chain
from data_utils.files import MARK, is_marked, make_room, write_atomic

COLUMNS = ("E", "pT", "eta", "phi")  # of a particle, unless the file names others
POSITIVE = ("E", "pT", "pT_rel")  # columns that a model reads as logarithms
ENERGIES = ("E", "pT", "px", "py", "pz", "mass")  # columns that have a unit
NUM_TYPES, N_GLOBALS = 8, 3
SPLITS = ("train", "val", "test")
NO_LABEL = -1  # of an event in a file without labels
MOST_DROPPED = 0.01  # share of the rows that may be damaged
HIGHEST_ETA = 10
LOWEST_SPREAD = 0.3  # deviation of sine and cosine of an angle, 0.7 if all angles are as likely
LOWEST_ENERGY = 0.98  # of E / pT, which is at least 1; float16 rounds by 0.001
# Reasons to leave an event out.
FAR, SWAPPED, WRONG_ID, NO_OBJECT = "phi beyond 2 pi", "E below pT", "id not one of 0 to 7", "no object"
HIGHEST_MEDIAN_PT = 5000  # GeV; a higher median means that the file is in MeV


def load_events(data, *, events, limit, labels, features, phi, energy_unit, seed, stats=None):
    """Return ({train, val, test: {x, ids, globals, y}}, meta): CPU tensors, and plain Python that describes them.

    x: (N, T, F) float32, the `features` in their order, some of the file's columns; () is all of them. POSITIVE ones
    are logarithms; phi is a sine and a cosine unless `phi` is raw. ids: (N, T) int64. globals: (N, 3) float32,
    log(1 + MET) and sine and cosine of its phi. y: (N,) int64. `stats` (of a checkpoint) standardise x and globals;
    without them mean and deviation of the valid train objects and of the train events do. x is 0 where the id is 0.

    data: "decay_chain" for new events, as many as `events`, or a file for `read_events`. Of a file only the `labels`
    are used (() is all), and at most `limit` events per split (0: all). energy_unit: GeV or MeV, of the file. meta:
    features, columns, labels, phi, n_tokens, cont_dim, n_globals, num_types, stats, dropped {reason: rows}, notes
    [line], data_hash, rows_hash, source. rows_hash is over the bytes of the rows; data_hash is the same for a file, and
    over the settings of new events, whose last bits depend on the processor. The caller reports the notes and the
    dropped rows. Raises UsageError, DataError.
    """
    import torch

    if str(data) == "decay_chain" and events < 10:
        raise UsageError(f"--events {events}: expected 10 or more, for three splits")
    columns = columns_in(data)
    features = features or columns
    if set(features) - set(columns) or len(set(features)) < len(features):
        raise UsageError(f"--features {' '.join(features)}: expected some of {' '.join(columns)}, each once")
    rows, y, split = open_rows(data, events=events, energy_unit=energy_unit, seed=seed)
    there = np.unique(y).tolist()
    labels = sorted(set(there) & set(labels or there)) or labels
    wanted = np.isin(y, labels)
    if not wanted.any():
        expected = " ".join(map(str, labels))
        raise DataError(f"{data}: no event of labels {expected}\nlabels there: {' '.join(map(str, there))}")
    notes = []
    if not wanted.all():
        others = " ".join(str(label) for label in there if label not in labels)
        notes.append(f"{(~wanted).sum()} of {len(wanted)} left out: labels {others}")
    rows, y, split, dropped = drop_damaged(rows[wanted], y[wanted], split[wanted], data, columns)
    chosen = [np.flatnonzero(split == i)[: limit or None] for i in range(len(SPLITS))]
    if not all(map(len, chosen)):
        counts = ", ".join(f"{name} {len(index)}" for name, index in zip(SPLITS, chosen, strict=True))
        raise DataError(f"{data}: a split is empty: {counts}\nfix: more events, other --labels")
    check_unit(rows, data, columns)
    parts = {name: (rows[index], y[index]) for name, index in zip(SPLITS, chosen, strict=True)}
    digest = hashlib.sha256()
    for part_rows, part_labels in parts.values():
        digest.update(part_rows.tobytes())
        digest.update(part_labels.tobytes())
    rows_hash = data_hash = digest.hexdigest()
    if str(data) == "decay_chain":
        settings = dict(version=VERSION, events=events, seed=seed, labels=labels, sizes=[*map(len, chosen)])
        data_hash = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    meta = dict(
        features=list(features),
        columns=list(columns),
        labels=labels,
        phi=phi,
        n_tokens=slots(rows, columns),
        cont_dim=len(features) + (phi == "sincos" and "phi" in features),
        n_globals=N_GLOBALS,
        num_types=NUM_TYPES,
        stats=stats or statistics(parts["train"][0], features, phi, columns),
        dropped=dropped,
        notes=notes,
        data_hash=data_hash,
        rows_hash=rows_hash,
        source=str(data),
    )
    splits = {}
    for name, (part_rows, part_labels) in parts.items():
        x, ids, globals = from_rows(part_rows, meta)
        arrays = dict(x=x, ids=ids, globals=globals, y=part_labels)
        splits[name] = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return splits, meta


# ---- rows and features -----------------------------------------------------------------------------------------------


def slots(rows, columns=COLUMNS):
    """Return T, the number of slots in rows (N, 2 + (1 + C) T)."""
    return (rows.shape[1] - 2) // (1 + len(columns))


def objects(rows, columns=COLUMNS):
    """Return the view (N, T, C) of the columns of each particle in rows, which must be contiguous."""
    return rows[:, slots(rows, columns) + 2 :].reshape(len(rows), -1, len(columns))


def add_slots(rows, T, columns=COLUMNS):
    """Return rows of T slots, of which those beyond the slots of `rows` are empty."""
    more = T - slots(rows, columns)
    if not more:
        return rows
    ids, met = np.split(rows[:, : slots(rows, columns) + 2], [-2], 1)
    particles = rows[:, slots(rows, columns) + 2 :]
    return np.concatenate([np.pad(ids, [(0, 0), (0, more)]), met,
                           np.pad(particles, [(0, 0), (0, more * len(columns))])], 1)  # fmt: skip


def columns_of(meta):
    """Return the columns of a particle in the rows that a model reads; older checkpoints don't name them."""
    return tuple(meta.get("columns", COLUMNS))


def from_rows(rows, meta):
    """Return x (N, T, F) float32, ids (N, T) int64, globals (N, 3) float32, standardised by meta["stats"]; numpy."""
    stats, columns = meta["stats"], columns_of(meta)
    ids = rows[:, : slots(rows, columns)].astype(np.int64)
    x = np.zeros((*ids.shape, meta["cont_dim"]), np.float32)
    x[ids > 0] = (_features(rows, meta["features"], meta["phi"], columns) - stats["mean"]) / stats["std"]
    globals = (_globals(rows, columns) - stats["globals_mean"]) / stats["globals_std"]
    return x, ids, globals.astype(np.float32)


def to_rows(x, ids, globals, meta):
    """Undo `from_rows`: return rows (N, 2 + (1 + C) T) float32 of CPU tensors or arrays.

    Columns that are not modelled are 0, and so are slots of id 0. With E, pT and eta, E is at least pT cosh(eta), the
    energy of a massless object.
    """
    stats, ids = meta["stats"], np.asarray(ids)
    x = np.asarray(x, np.float64) * stats["std"] + stats["mean"]
    met, sine, cosine = (np.asarray(globals, np.float64) * stats["globals_std"] + stats["globals_mean"]).T
    modelled, values = {}, iter(np.moveaxis(x, -1, 0))
    for name in meta["features"]:
        value = next(values)
        if name in POSITIVE:
            value = np.exp(value)
        elif name == "phi":
            value = np.arctan2(value, next(values)) if meta["phi"] == "sincos" else wrap(value)
        modelled[name] = value
    if {"E", "pT", "eta"} <= modelled.keys():
        modelled["E"] = np.maximum(modelled["E"], modelled["pT"] * np.cosh(modelled["eta"]))
    T, columns = ids.shape[1], columns_of(meta)
    rows = np.zeros((len(ids), 2 + (1 + len(columns)) * T), np.float32)
    rows[:, :T] = ids
    rows[:, T] = np.maximum(np.expm1(met), 0)
    rows[:, T + 1] = np.arctan2(sine, cosine)
    for name, value in modelled.items():
        objects(rows, columns)[..., columns.index(name)] = np.where(ids > 0, value, 0)
    return rows


def statistics(rows, features, phi, columns=COLUMNS):
    """Return mean and std (F) of the valid objects, globals_mean and globals_std (3) of the events, as lists."""
    stats = {}
    for prefix, values in (("", _features(rows, features, phi, columns)), ("globals_", _globals(rows, columns))):
        stats[f"{prefix}mean"] = values.mean(0).tolist()
        stats[f"{prefix}std"] = np.maximum(values.std(0), 1e-6).tolist()
    return stats


def _features(rows, features, phi, columns):
    """Return (valid objects, F) float64."""
    valid = objects(rows, columns)[rows[:, : slots(rows, columns)] > 0].astype(np.float64)
    values = []
    for name in features:
        value = valid[:, columns.index(name)]
        if name == "phi" and phi == "sincos":
            values += [np.sin(value), np.cos(value)]
        else:
            values.append(np.log(value) if name in POSITIVE else value)
    return np.stack(values, 1)


def _globals(rows, columns):
    T = slots(rows, columns)
    met, angle = rows[:, T : T + 2].astype(np.float64).T
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
        columns = columns_in(data)
        rows[:, slots(rows, columns)] /= 1000
        objects(rows, columns)[..., [name in ENERGIES for name in columns]] /= 1000
    return rows, labels, split


def check_unit(rows, source, columns=COLUMNS):
    """Raise DataError, which names `source`, if the pT of rows look like MeV."""
    valid = objects(rows, columns)[rows[:, : slots(rows, columns)] > 0]
    if "pT" in columns:
        pt = valid[:, columns.index("pT")]
    elif {"px", "py"} <= set(columns):
        pt = np.hypot(*(valid[:, columns.index(name)] for name in ("px", "py")))
    else:
        return
    middle = np.median(pt)
    if middle > HIGHEST_MEDIAN_PT:
        raise DataError(f"{source}: half of the pT are above {middle:.0f}: looks like MeV\ntry: --energy_unit MeV")


def columns_in(data):
    """Return the columns of a particle in a file: its array `features`, or COLUMNS; those of decay_chain."""
    if str(data) == "decay_chain":
        return COLUMNS
    arrays, _ = _read(data, {"features"})
    names = arrays.get("features", np.array(COLUMNS)).reshape(-1).tolist()
    names = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    if not names or len(set(names)) < len(names):
        raise DataError(f"{data}: features {' '.join(names)}: expected the columns of a particle, each once")
    return names


def read_events(path, *, seed):
    """Return rows (N, 2 + (1 + C) T) float32, labels (N,) int64 and splits (N,) int8 as they stand in a file.

    The file is .npz, or .h5 or .hdf5 with the package h5py. Its keys are X_train, Y_train, X_val, Y_val, X_test, Y_test
    (x_, y_ and _valid are read too); or X and y, which `split_rows` splits by the seed. Labels are whole numbers,
    bools or one-hot; without any, all are NO_LABEL. Raises UsageError for another ending, DataError for arrays that
    are missing or have another shape.
    """
    path = Path(path)
    arrays, keys = _read(path, {f"{letter}{end}" for letter in "Xy" for end in ("", *ENDS)})
    names = [""] if "X" in arrays or "y" in arrays else ENDS
    missing = ["X" + name for name in names if "X" + name not in arrays]
    labelled = any("y" + name in arrays for name in names)
    missing += ["y" + name for name in names if labelled and "y" + name not in arrays]
    if missing:
        raise DataError(
            f"{path}: no {', '.join(missing)}: expected X and y, or X_train, Y_train and so for val and test\n"
            f"keys there: {', '.join(keys) or 'none'}\ntry: {reader_for(path)}"
        )
    width = 1 + len(columns_in(path))
    for name in names:
        x = arrays["X" + name]
        fits = x.ndim == 2 and x.dtype.kind in "fiu" and x.shape[1] >= 2 + width and (x.shape[1] - 2) % width == 0
        if not fits or x.shape[1] != arrays["X" + names[0]].shape[1]:
            raise DataError(
                f"{path}: X{name} is {x.dtype} {x.shape}: expected numbers (events, 2 + {width} T), all of one T\n"
                f"try: {reader_for(path)}"
            )
        if not len(x):
            raise DataError(f"{path}: X{name} is empty: {x.shape}")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and the row is dropped
        rows = np.concatenate([arrays["X" + name] for name in names]).astype(np.float32, order="C")
    labels = np.full(len(rows), NO_LABEL)
    if labelled:
        sized = [(f"y{name}", arrays["y" + name], len(arrays["X" + name])) for name in names]
        labels = np.concatenate([whole_labels(y, n, f"{path}: {name}") for name, y, n in sized])
    if len(names) == 1:
        return rows, labels, split_rows(len(rows), seed)
    sizes = [len(arrays["X" + name]) for name in names]
    return rows, labels, np.repeat(np.arange(3, dtype=np.int8), sizes)


def whole_labels(y, n, name):
    """Return labels (n,) int64 of whole numbers, bools or one-hot rows (n, K). Raises DataError, which names `name`."""
    if y.dtype.kind in "fiub" and y.ndim == 2 and len(y) == n and y.shape[1] > 1:
        if np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all():
            return y.argmax(1).astype(np.int64)
    elif y.size == n and y.dtype.kind in "fiub" and (y.astype(np.float64) % 1 == 0).all():  # nan is not
        return y.reshape(-1).astype(np.int64)
    raise DataError(
        f"{name} is {y.dtype} {y.shape}: expected whole numbers ({n},), as long as X, or one-hot rows\n"
        "fix: number the classes 0, 1, ..."
    )


ENDS = tuple(f"_{split}" for split in SPLITS)
KEY = re.compile(r"([xy])(?:_(train|val|test)(?:id|idation)?)?", re.I)


def name_of(key):
    """Return the name of a key among X, y, X_train, y_train ..: x_valid is X_val."""
    match = KEY.fullmatch(key)
    if not match:
        return key
    letter = "X" if match[1] in "xX" else "y"
    return f"{letter}_{match[2].lower()}" if match[2] else letter


def _read(path, wanted):
    """Return ({name: array} of the `wanted` names, all names in the file); keys are renamed by `name_of`."""
    path = Path(path)
    h5py = h5py_for(path, reader_for(path) if path.is_file() else "--data decay_chain")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob(f"*{path.suffix}")], 1)
        writer = f"python prepare_data.py events --source YOUR_FILE --out {shlex.quote(str(path))}"
        remedy = f"try: --data {shlex.quote(str(path.with_name(near[0])))}" if near else f"fix: {writer}"
        raise DataError(f"{path}: no such file\n{remedy}")
    try:
        with h5py.File(path, "r") if h5py else np.load(path, allow_pickle=False) as file:
            names = {name_of(key): key for key in file}
            groups = {name for name, key in names.items() if h5py and isinstance(file[key], h5py.Group)}
            arrays = {name: file[key][...] for name, key in names.items() if name in wanted - groups}
            return arrays, sorted(f"{name}/" if name in groups else name for name in names)
    except Exception as e:  # truncation and flipped bits raise a dozen types
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} can't be read: {type(e).__name__}: {reason}") from e


def reader_for(path, *flags):
    """Return the command that brings a file into this form, with more flags."""
    path = Path(path)
    out = path.with_name(f"{path.stem}_events.npz")
    words = ["--source", str(path), *flags, "--out", str(out)]
    return f"python prepare_data.py events {shlex.join(words)}"


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


def write_events(path, rows, labels, *, seed, split=None, features=()):
    """Write rows and labels in three splits as X_train, Y_train ..: .npz or .h5 by the ending of `path`, atomically.

    labels: None writes none. split: (N,) of each row, 0 1 2; without one the seed decides. features: the columns of a
    particle, if they are to be named.
    """
    arrays = {}
    split = split_rows(len(rows), seed) if split is None else split
    if labels is not None:
        small = np.int8 if len(labels) and -128 <= labels.min() <= labels.max() <= 127 else np.int64
        labels = labels.astype(small)
    for i, name in enumerate(SPLITS):
        arrays[f"X_{name}"] = rows[split == i]
        if labels is not None:
            arrays[f"Y_{name}"] = labels[split == i]
    content = io.BytesIO()
    h5py = h5py_for(path, "--out data/events.npz")
    if not h5py:
        names = dict(features=np.array(features)) if features else {}
        np.savez_compressed(content, **arrays, **names)
        with zipfile.ZipFile(content, "a") as archive:
            archive.comment = MARK  # a marked file may be replaced
    else:
        with h5py.File(content, "w") as file:
            file.attrs["source"] = np.bytes_(MARK)
            if features:
                file["features"] = np.array(features, np.bytes_)
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip", shuffle=True)
    make_room(path, is_marked)
    write_atomic(path, lambda file: file.write(content.getvalue()))


def damage(rows, columns=COLUMNS):
    """Return {reason: (N,) whether it fits}, the more basic reasons first. Empties the slots of id 0 in place."""
    T, particles = slots(rows, columns), objects(rows, columns)
    ids, met = rows[:, :T], rows[:, T : T + 2]
    valid = ids != 0  # nan as well
    particles[~valid] = 0
    values = dict(zip(columns, np.moveaxis(particles, 2, 0), strict=True))
    positive = [name for name in POSITIVE if name in values]
    reasons = {
        "NaN or infinite": ~np.isfinite(rows).all(1),
        WRONG_ID: ~np.isin(ids, range(NUM_TYPES)).all(1),
    }
    if positive:
        low = np.any([~(values[name] > 0) for name in positive], 0)
        reasons[f"{' or '.join(positive)} not above 0"] = (valid & low).any(1)
    reasons["MET below 0"] = met[:, 0] < 0
    if "eta" in values:
        reasons[f"eta beyond {HIGHEST_ETA}"] = (abs(values["eta"]) > HIGHEST_ETA).any(1)
    angles = np.concatenate([met[:, 1:], values["phi"]], 1) if "phi" in values else met[:, 1:]
    reasons[FAR] = (abs(angles) > np.float32(2 * np.pi)).any(1)
    if {"E", "pT"} <= values.keys():
        reasons[SWAPPED] = (values["E"] < LOWEST_ENERGY * values["pT"]).any(1)
    return reasons | {NO_OBJECT: ~valid.any(1)}


def drop_damaged(rows, labels, split, source, columns=COLUMNS):
    """Return rows, labels and split without the damaged rows, and {reason: number of rows}.

    The first reason that fits counts. Empties the slots of id 0 in place, and wraps phi. Raises DataError, which names
    `source`, when more than MOST_DROPPED of the rows are damaged.
    """
    good, dropped = count_damaged(damage(rows, columns))
    lost = len(rows) - good.sum()
    if lost > MOST_DROPPED * len(rows):
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        worst = max(dropped, key=dropped.get)
        flags, means = {
            FAR: (("--phi", "degrees"), "phi in degrees?"),
            SWAPPED: (("--order", "pT", "E", "eta", "phi"), "pT before E?"),
            WRONG_ID: (("--ids", "pdg"), "ids of the Particle Data Group?"),
        }.get(worst, ((), f"only {MOST_DROPPED:.0%} would be dropped; leave them out?"))
        raise DataError(
            f"{source}: {lost} of {len(rows)} rows are damaged: {counts}\n{means}\ntry: {reader_for(source, *flags)}"
        )
    rows = rows[good]
    wrap_angles(rows, columns)
    return rows, labels[good], split[good], dropped


def count_damaged(reasons):
    """Return (N,) which rows are good, and {reason: rows} where the first reason that fits counts."""
    good, dropped = np.ones(len(reasons[NO_OBJECT]), bool), {}
    for reason, bad in reasons.items():
        if count := int((good & bad).sum()):
            dropped[reason] = count
        good &= ~bad
    return good, dropped


def wrap_angles(rows, columns=COLUMNS):
    """Bring all angles of rows between -pi and pi, in place."""
    angles = [rows[:, slots(rows, columns) + 1]]
    if "phi" in columns:
        angles.append(objects(rows, columns)[..., columns.index("phi")])
    for values in angles:
        far = abs(values) > np.float32(np.pi)  # all others keep their bits
        values[far] = wrap(values[far])


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
    split without ids comes back unchanged. Raises UsageError for px without py, and for events that all point one way.
    """
    import torch

    if "ids" not in columns:
        return columns
    if min(meta["stats"]["globals_std"][1:]) < LOWEST_SPREAD:  # rotated events would be far from standardised
        raise UsageError("--symmetries: MET of all events points one way, as of single jets\ntry: --no-symmetries")
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
        elif name == "phi_rel":
            features.append(phi_sign * value)
        else:
            features.append(eta_sign * value if name in ("eta", "eta_rel", "pz") else value)
    if {"px", "py"} & set(meta["features"]):
        if not {"px", "py"} <= set(meta["features"]) or "phi" in meta["features"]:
            raise UsageError("--symmetries: px and py are rotated together\ntry: --features px py pz E")
        i, j = (meta["features"].index(name) for name in ("px", "py"))
        features[j], features[i] = rotate(features[j], features[i])
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
    return parts, dict(cont_dim=16, dropped={}, notes=[], data_hash=f"table-{seed}-{task}", source=f"table for {task}")
