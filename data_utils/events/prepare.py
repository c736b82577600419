"""`prepare_data.py events --source`: convert events of other programs into a file for train_ae.py.

n events of a slice, T slots, C columns of a particle.
"""

import contextlib
import re
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_utils.config import at_least
from data_utils.errors import DataError, UsageError
from data_utils.events.dataset import (
    COLUMNS,
    ENERGIES,
    FAR,
    MOST_DROPPED,
    NO_OBJECT,
    SPLITS,
    SWAPPED,
    WRONG_ID,
    add_slots,
    check_unit,
    columns_in,
    count_damaged,
    damage,
    name_of,
    objects,
    slots,
    split_rows,
    whole_labels,
    wrap,
    wrap_angles,
    write_events,
)
from data_utils.events.kinematics import complete
from data_utils.events.layouts import PDG, Layout, read_columns, recognize
from data_utils.events.sources import Source, number_labels, open_source, unreadable
from data_utils.progress import say

MANY = 100  # angles at random in radians nearly fill a turn
AT_ONCE = 2_000_000  # numbers of a column that are converted together
KINEMATIC = "E px py pz pT eta phi y mass pT_rel eta_rel phi_rel".split()
ANGLES = ("phi", "phi_rel")
LEPTONS = {3: 4, 4: 3, 5: 6, 6: 5}  # id -> id of the other charge
POSITIVE_LEPTONS = (3, 6)
REMEDIES = {
    FAR: "phi in degrees?\ntry: --phi degrees",
    SWAPPED: "pT before E?\ntry: --order pT E eta phi",
    WRONG_ID: "ids of the Particle Data Group?\ntry: --ids pdg",
}


@dataclass
class Part:
    """Events to read: all of a file, or one of its splits."""

    source: Source
    layout: Layout
    file: int  # number of the file
    split: int  # 0 train, 1 val, 2 test; -1 for a random split
    events: int


def convert(cfg):
    """Run the command: cfg has the fields of prepare_data.EventsConfig."""
    at_least(cfg, 1, "max_particles")
    at_least(cfg, 0, "limit")
    if cfg.columns and cfg.layout != "auto":
        raise UsageError(f"--columns {cfg.columns} --layout {cfg.layout}: give one of them")
    for flag, names in (("features", cfg.features), ("order", cfg.order)):
        if not names or len(set(names)) < len(names):
            typed = " ".join(names)
            raise UsageError(f"--{flag} {typed}: expected names of columns, each once\ntry: --{flag} E pT eta phi")
    if reserved := {"mask", "id"} & set(cfg.features):
        raise UsageError(f"--features {' '.join(reserved)}: mask and id are in each file\ntry: --features E pT eta phi")
    with contextlib.ExitStack() as stack:
        parts = open_parts(cfg, stack)
        print("\n".join(dict.fromkeys(line for part in parts for line in describe(part.source, part.layout))))
        chunks = list(read_parts(parts, cfg))
    T = max(slots(chunk["rows"], cfg.features) for chunk in chunks)
    for chunk in chunks:
        chunk["rows"] = add_slots(chunk["rows"], T, cfg.features)
    columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("rows", "split", "file", "label")}
    counts = sum((Counter(chunk["counts"]) for chunk in chunks), Counter())
    del chunks
    write(cfg, columns, counts)
    return {}


def open_parts(cfg, stack):
    """Return the Parts of all files; `stack` closes them."""
    described = read_columns(cfg.columns) if cfg.columns else None
    options = dict(tree=described.tree, event_id=described.event_id, labels=described.label) if described else {}
    splits_by_name = [split_in_name(path) for path in cfg.source]
    if set(splits_by_name) != set(range(len(SPLITS))):
        splits_by_name = [-1] * len(cfg.source)
    parts = []
    for number, path in enumerate(cfg.source):
        file = stack.enter_context(open_source(path, **options))
        for split, source in parts_of(file):
            layout = described or recognize(source, cfg.layout, columns_of_petri(path, cfg.order))
            split = splits_by_name[number] if split < 0 else split
            events = min(source.events, cfg.limit or source.events)
            parts.append(Part(source, with_flags(layout, cfg), number, split, events))
    number_labels([(p.source, p.layout.label[0]) for p in parts if p.events and len(p.layout.label) == 1])
    if not any(part.events for part in parts):
        raise DataError(f"{cfg.source[0]}: no events in it")
    return parts


def read_parts(parts, cfg):
    """Yield what read_chunk returns of each slice of events, with `split` and `file` (n,)."""
    with tqdm(total=sum(part.events for part in parts), unit="event", disable=None) as progress:
        for part in parts:
            step = max(1, AT_ONCE // part.source.width())
            for start in range(0, part.events, step):
                n = min(part.events, start + step) - start
                try:
                    chunk = read_chunk(part.source, part.layout, start, start + n, cfg)
                except OSError as e:
                    raise unreadable(part.source.path, e) from e
                yield chunk | dict(split=np.full(n, part.split, np.int8), file=np.full(n, part.file))
                progress.update(n)


def columns_of_petri(path, order):
    """Return the columns of a particle in a file of this project: those that it names, else `order`."""
    if Path(path).suffix not in (".npz", ".h5", ".hdf5"):
        return order
    named = columns_in(path)
    return named if named != COLUMNS else order


def parts_of(source):
    """Yield (number of the split, Source) of a file with X_train, X_val and X_test; else (-1, the file).

    Keys are renamed as read_events does; so is the one array of a group X.
    """
    keys = {key: key.partition("/")[0] for key in source.columns}
    groups = Counter(keys.values())
    names = {name_of(base if groups[base] == 1 else key): key for key, base in keys.items()}
    columns = {name: source.columns[key] for name, key in names.items()}
    if all(f"X_{split}" in columns for split in SPLITS):
        for i, split in enumerate(SPLITS):
            part = {letter: columns[f"{letter}_{split}"] for letter in "Xy" if f"{letter}_{split}" in columns}
            yield i, Source(source.path, part).aligned()
        return
    if "X" not in columns and "X_train" in columns:
        columns |= {letter: columns[f"{letter}_train"] for letter in "Xy" if f"{letter}_train" in columns}
        print(f"{source.path}: not all of X_train, X_val and X_test: X_train alone is read, and split anew")
        columns = {name: column for name, column in columns.items() if name in ("X", "y")}
    yield -1, Source(source.path, columns).aligned()


def split_in_name(path):
    """Return the number of the split that the name of a file says, such as 1 for val.h5 or jets_val_2.h5; else -1."""
    words = re.split(r"[^a-z]+", Path(path).stem.lower())
    numbers = {i for i, split in enumerate(SPLITS) if any(word in (split, f"{split}id") for word in words)}
    return numbers.pop() if len(numbers) == 1 else -1


def with_flags(layout, cfg):
    """Return a layout with the units and ids that the flags say; the flags come before a file of columns."""
    changes = dict(energy_unit=cfg.energy_unit, phi=cfg.phi, ids=cfg.ids)
    typed = {name: value for name, value in changes.items() if value != type(cfg).__dataclass_fields__[name].default}
    return replace(layout, **typed)


def describe(source, layout):
    """Return lines that say which column of a file is read as what."""
    quantities = layout.particles | layout.event | (dict(label=", ".join(layout.label)) if layout.label else {})
    texts = []
    for name, column in quantities.items():
        if isinstance(column, dict):
            column = ", ".join(f"{text} = {number}" for number, text in column.items())
        texts.append(f"{name}: {column}")
    units = f"{layout.energy_unit}, {layout.phi}"
    return [f"{source.path}: {source.events} events, layout {layout.name}; {units}", f"  {'; '.join(texts)}"]


# ---- a slice of events -----------------------------------------------------------------------------------------------


def read_chunk(source, layout, start, stop, cfg):
    """Return rows (n, 2 + (1 + C) T), label (n,) and counts {event or particle that was cut: how many}."""
    values = {name: source.read(column, start, stop) for name, column in layout.particles.items() if name != "id"}
    shapes = {name: value.shape for name, value in values.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        listing = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"{source.path}: {listing}: expected (events, particles), the same for all")
    ids, others = read_ids(source, layout, start, stop, values)
    present = find_particles(values, layout.padding) & (ids != 0)
    if "mask" in values:
        present &= values.pop("mask") > 0
    event = {name: first(source.read(column, start, stop)) for name, column in layout.event.items()}
    scale_units(values, event, present, layout, source.path)
    relative_to_absolute(values, event)
    values = {name: np.where(present, value, 0) for name, value in complete(values).items()}
    met, direction = missing_momentum(values, event)
    if {"pT_rel", "eta_rel", "phi_rel"} & set(cfg.features) - values.keys() and {*COLUMNS, "px"} <= values.keys():
        more = {name: np.where(present, value, 0) for name, value in relative(values, event).items()}
        values = more | values
    if unknown := [name for name in cfg.features if name not in values]:
        names = " ".join(unknown), " ".join(values)
        raise UsageError(f"--features {names[0]}: not in {source.path}\ncolumns of its particles: {names[1]}")
    keep = hardest(values, present, cfg.max_particles)
    present_kept = np.take_along_axis(present, keep, 1)
    particles = np.stack([np.take_along_axis(values[name], keep, 1) for name in cfg.features], 2)
    particles[~present_kept] = 0
    ids = np.where(present_kept, np.take_along_axis(ids, keep, 1), 0)
    with np.errstate(over="ignore"):  # beyond float32: infinite, and the event is left out
        rows = np.concatenate([ids, met[:, None], direction[:, None], particles.reshape(len(ids), -1)], 1)
        rows = rows.astype(np.float32)
    more = present.sum(1) - present_kept.sum(1)
    counts = dict(cut_events=int((more > 0).sum()), cut_particles=int(more.sum()))
    counts |= others
    counts |= dict(massless=int(not {"E", "mass"} & layout.particles.keys()), summed=int("MET" not in event))
    return dict(rows=rows, label=read_labels(source, layout, start, stop), counts=counts)


def first(values):
    """Return a number per event; a table of particles repeats it."""
    return values[:, 0] if values.ndim == 2 else values


def read_ids(source, layout, start, stop, values):
    """Return the ids (n, T) of petri: those of the file, translated as the layout says; 1 where it has none.

    Also returns {("id", number): particles} of the numbers of the Particle Data Group that become jets.
    """
    column = layout.particles.get("id")
    shape = next(iter(values.values())).shape
    others = {}
    if column is None:
        return np.ones(shape), others
    if isinstance(column, dict):
        ids = np.ones(shape)
        for number, flag in column.items():
            ids[source.read(flag, start, stop) > 0] = number
    else:
        ids = source.read(column, start, stop)
    if layout.ids != "petri":
        table = PDG if layout.ids == "pdg" else layout.ids
        translated = ids.copy()
        if layout.ids == "pdg":
            jets = ~np.isnan(ids) & ~np.isin(ids, list(PDG))
            translated[jets] = 1
            numbers, counts = np.unique(ids[jets], return_counts=True)
            others = {("id", number): n for number, n in zip(numbers.tolist(), counts.tolist(), strict=True)}
        for number, petri in table.items():
            translated[ids == number] = petri
        ids = translated
    if "charge" in values and isinstance(column, dict):  # flags that don't tell e+ from e-
        wrong = values["charge"] * np.where(np.isin(ids, POSITIVE_LEPTONS), 1, -1) < 0
        ids = np.select([wrong & (ids == number) for number in LEPTONS], list(LEPTONS.values()), ids)
    return ids, others


def find_particles(values, padding):
    """Return (n, T) which slots hold a particle: not all of its momentum is 0, NaN or `padding`."""
    momenta = [value for name, value in values.items() if name in KINEMATIC]
    return ~np.all([(value == 0) | np.isnan(value) | (value == padding) for value in momenta], 0)


def scale_units(values, event, present, layout, path):
    """Bring energies to GeV and angles to radians, in place; present (n, T): which slots hold a particle.

    Raises DataError where the phi of the particles, called degrees, fill 2 pi.
    """
    energies = {name: table for table in (values, event) for name in table if name.removeprefix("jet_") in ENERGIES}
    if "MET" in event:
        energies["MET"] = event
    for name, table in energies.items():
        table[name] = table[name] / (1000 if layout.energy_unit == "MeV" else 1)
    if layout.phi != "degrees":
        return
    phi = values["phi"][present] if "phi" in values else np.zeros(0)
    phi = phi[np.isfinite(phi)]
    if len(phi) >= MANY and 0.9 < np.ptp(phi) / (2 * np.pi) <= 1:
        raise DataError(f"{path}: phi in degrees fills 2 pi: are these radians?\nfix: without --phi degrees")
    for table, names in ((values, ANGLES), (event, ("MET_phi", "jet_phi"))):
        for name in names:
            if name in table:
                table[name] = np.radians(table[name])


def relative_to_absolute(values, event):
    """Add pT, eta and phi of particles that are only given relative to the jet; without a jet its pT is 1, in place."""
    absolute = dict(pT=("pT_rel", np.multiply, 1), eta=("eta_rel", np.add, 0), phi=("phi_rel", np.add, 0))
    for name, (part, function, neutral) in absolute.items():
        if part in values and name not in values and not {"px", "py", "pz"} <= values.keys():
            jet = event.get(f"jet_{name}")
            values[name] = function(values[part], neutral if jet is None else jet[:, None])
            if name == "phi":
                values[name] = wrap(values[name])


def missing_momentum(values, event):
    """Return the missing transverse momentum and its phi (n,): of the file, else minus the sum of the particles.

    Both are 0 where the columns of the particles don't give it.
    """
    if "MET" in event:
        return event["MET"], event.get("MET_phi", np.zeros(len(event["MET"])))
    if not {"px", "py"} <= values.keys():
        nothing = np.zeros(len(next(iter(values.values()))))
        return nothing, nothing
    px, py = -values["px"].sum(1), -values["py"].sum(1)
    return np.hypot(px, py), np.arctan2(py, px)


def relative(values, event):
    """Return pT, eta and phi relative to the jet; without one in the file it is the sum of the particles."""
    total = complete({name: values[name].sum(1) for name in ("E", "px", "py", "pz")})
    jet = {name: event.get(f"jet_{name}", total[name])[:, None] for name in ("pT", "eta", "phi")}
    with np.errstate(all="ignore"):
        shares = values["pT"] / jet["pT"]
    return dict(pT_rel=shares, eta_rel=values["eta"] - jet["eta"], phi_rel=wrap(values["phi"] - jet["phi"]))


def hardest(values, present, most):
    """Return (n, T) the slots of the hardest particles, at most `most`, by falling pT; without one as they stand."""
    T = min(most, max(1, present.sum(1).max(initial=0)))
    pt = np.nan_to_num(values.get("pT", np.zeros(present.shape)), nan=np.inf)  # NaN stays: its event is left out
    pt = np.where(present, pt, -np.inf)
    return np.argsort(-pt, 1, kind="stable")[:, :T]


def read_labels(source, layout, start, stop):
    """Return labels (n,) float64; NaN for a layout without."""
    if not layout.label:
        return np.full(stop - start, np.nan)
    columns = [source.read(name, start, stop) for name in layout.label]
    if len(columns) > 1 or source.is_ragged(layout.label[0]):
        columns = [np.stack([first(column) for column in columns], 1)]
    name = f"{source.path}: {', '.join(layout.label)}"
    return whole_labels(columns[0], stop - start, name).astype(np.float64)


# ---- the table and the file ------------------------------------------------------------------------------------------


def write(cfg, columns, counts):
    """Leave damaged events out, write the rest, and print the table."""
    rows = columns["rows"]
    good, dropped = count_damaged(damage(rows, cfg.features))
    worst = max(dropped, key=dropped.get, default="")
    if worst not in REMEDIES and worst != NO_OBJECT and 2 * dropped.get(worst, 0) > len(rows):
        raise DataError(
            f"{cfg.source[0]}: {dropped[worst]} of {len(rows)} events: {worst}\n"
            "fix: --order or a file for --columns, which say what each column is, see docs/data.md"
        )
    for reason, remedy in REMEDIES.items():
        if dropped.get(reason, 0) > MOST_DROPPED * len(rows):
            ids = rows[:, : slots(rows, cfg.features)]
            if reason == WRONG_ID and (ids % 1 != 0).any():
                remedy = "no whole numbers: are these ids?\nfix: an array (events, particles, columns) with --order"
            raise DataError(f"{cfg.source[0]}: {dropped[reason]} of {len(rows)} events: {reason}\n{remedy}")
    if not good.any():
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(
            f"{cfg.source[0]}: no event is left of {len(rows)}: {reasons}\n"
            "fix: a file for --columns, which says what each column is, see docs/data.md"
        )
    rows, labels, split = rows[good], columns["label"][good], columns["split"][good]
    files = columns["file"][good]
    del columns
    wrap_angles(rows, cfg.features)
    check_unit(rows, cfg.source[0], cfg.features)
    if np.isnan(labels).all():
        labels = files if len(cfg.source) > 1 and (split < 0).all() else None
        names = [Path(path).name for path in cfg.source] if labels is not None else []
    elif np.isnan(labels).any():
        raise DataError("some of the files have labels, others not\nfix: files of one kind")
    else:
        labels, names = labels.astype(np.int64), []
    splits = "as the file has them"
    if (split < 0).any():
        splits = "80, 10 and 10 % at random"
        split = split_rows(len(rows), cfg.seed)
    write_events(cfg.out, rows, labels, seed=cfg.seed, split=split, features=cfg.features)
    print_table(cfg, rows, labels, names, dropped, counts)
    sizes = ", ".join(f"{(split == i).sum()} {name}" for i, name in enumerate(SPLITS))
    say(f"{cfg.out}: {sizes} ({splits}); next: python train_ae.py --data {shlex.quote(cfg.out)}")


def print_table(cfg, rows, labels, names, dropped, counts):
    """Print how many events were read, kept and left out, the ranges of all columns, and what was cut or filled in."""
    T, features = slots(rows, cfg.features), cfg.features
    present = rows[:, :T] > 0
    print(f"{'events read':24}{len(rows) + sum(dropped.values()):>10}\n{'kept':24}{len(rows):>10}")
    for reason, count in dropped.items():
        print(f"{f'left out: {reason}':24}{count:>10}")
    print(f"{'column':12}{'lowest':>12}{'median':>12}{'highest':>12}")
    quantities = {"particles": present.sum(1), "MET": rows[:, T], "MET_phi": rows[:, T + 1]}
    quantities |= {name: objects(rows, features)[..., i][present] for i, name in enumerate(features)}
    for name, values in quantities.items():
        print(f"{name:12}" + "".join(f"{value:12.5g}" for value in (values.min(), np.median(values), values.max())))
    if labels is None:
        print("labels: none")
    else:
        values, numbers = np.unique(labels, return_counts=True)
        texts = [f"{value} {number}" for value, number in zip(values, numbers, strict=True)]
        if names:
            texts = [f"{text} ({names[value]})" for text, value in zip(texts, values, strict=True)]
        print(f"labels: {', '.join(texts)}")
    jets = {key[1]: n for key, n in counts.items() if key[0] == "id"}
    if jets:
        print(f"jets: particles of the numbers {', '.join(f'{number:g} ({n})' for number, n in sorted(jets.items()))}")
    if counts["cut_events"]:
        print(
            f"{counts['cut_events']} events have more than {cfg.max_particles} particles: the hardest are kept, "
            f"{counts['cut_particles']} are cut; --max_particles keeps more"
        )
    if counts["massless"] and "E" in features:
        print("E: of massless particles, since the file has neither E nor mass")
    if counts["summed"]:
        print("MET: minus the sum of the particles, since the file has none")
