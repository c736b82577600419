"""Open files of events of other programs: every column by its name, read in slices of events.

A column is anything that can be sliced by events: (N,) a number per event, (N, T) a number per particle, (N, T, F) a
block of columns, or a Ragged with as many numbers per event as it has particles.
"""

import csv
import difflib
import pickletools
import re
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError

DECIMALS = 10_000  # characters of a .csv file in which a decimal comma is looked for
LABELS = "y label labels target truth class is_signal is_signal_new signal".split()
RUNS = "run run_id runid run_number runnumber lumi lumi_block luminosityblock subrun file".split()
EVENT_IDS = ("event", "event_id", "eventid", "event_number", "eventnumber", "evt", "jet_id")


class Ragged:
    """Numbers or texts of which each event has its own count: flat (M,), offsets (N + 1,). NaN pads a slice."""

    def __init__(self, flat, counts):
        self.flat, self.offsets = np.asarray(flat), np.concatenate([[0], np.cumsum(counts)])
        self.shape = (len(counts), "any")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, events):
        offsets = self.offsets[events.start : events.stop + 1]
        counts = np.diff(offsets)
        dtype = object if self.flat.dtype.kind == "O" else np.float64
        padded = np.full((len(counts), max(counts, default=0)), np.nan, dtype)
        padded[np.arange(padded.shape[1]) < counts[:, None]] = self.flat[offsets[0] : offsets[-1]]
        return padded


class Lazy:
    """A column that `read(start, stop)` returns; the newest slice is kept, since several columns share it."""

    def __init__(self, read, shape):
        self.read, self.shape, self.slice, self.values = read, shape, None, None

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, events):
        if self.slice != (events.start, events.stop):
            self.values, self.slice = self.read(events.start, events.stop), (events.start, events.stop)
        return self.values


class Source:
    """A file of events: `columns` {name: column}; use it in a `with`. `aligned` has columns of equal length."""

    def __init__(self, path, columns, close=lambda: None):
        self.path, self.columns, self.close = path, columns, close

    def aligned(self):
        """Return the Source of those columns that are as long as most are, which is the number of events."""
        sizes = [len(column) for column in self.columns.values()]
        events = max(sizes, key=lambda size: (sizes.count(size), size), default=0)
        columns = {name: column for name, column in self.columns.items() if len(column) == events}
        return Source(self.path, columns, self.close)

    @property
    def events(self):
        return len(next(iter(self.columns.values())))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def is_ragged(self, name):
        """Return whether a column has its own count of numbers in each event."""
        return name in self.columns and self.columns[name].shape[-1] == "any"

    def width(self):
        """Return the most columns that a block has; 100 stands for a Ragged."""
        widths = [column.shape[1] for column in self.columns.values() if len(column.shape) > 1]
        return max((100 if width == "any" else width for width in widths), default=1)

    def describe(self):
        """Return the columns and their shapes in one line."""
        names = [f"{name} ({', '.join(map(str, column.shape))})" for name, column in self.columns.items()]
        return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"

    def read(self, text, start, stop):
        """Return float64 values of the events start to stop of a column as a layout names it.

        NAME is a column, NAME[2] the third entry of its last axis, NAME[0:2100:3] each third, and NAME_* the columns
        NAME_0, NAME_1 .. side by side. Raises DataError for a column that is not there.
        """
        events = slice(start, stop)
        if text in self.columns:
            return _floats(self.columns[text][events], text, self.path)
        if "*" in text:
            return np.stack([_floats(self.columns[n][events], n, self.path) for n in self.numbered(text)], 1)
        name, *index = re.fullmatch(r"(.*?)(?:\[(-?\d*)(:-?\d*)?(:-?\d*)?\])?", text, re.S).groups()
        if name not in self.columns or index[0] is None:
            lower = {column.lower(): column for column in self.columns}
            near = difflib.get_close_matches(name.lower(), lower, 1)
            hint = f" (did you mean {lower[near[0]]}?)" if near else ""
            raise DataError(f"{self.path}: no column {name}{hint}\ncolumns there: {self.describe()}")
        values = self.columns[name][events]
        parts = [int(part.lstrip(":")) if part and part != ":" else None for part in index]
        key = parts[0] if index[1] is None else slice(*parts)
        try:
            return _floats(values[..., key], text, self.path)
        except (IndexError, TypeError):
            raise DataError(f"{self.path}: {text}: {name} has the shape {self.columns[name].shape}") from None

    def numbered(self, text):
        """Return the columns that NAME_* stands for, in the order of their numbers."""
        pattern = re.compile(re.escape(text).replace(r"\*", r"(\d+)"))
        names = [(int(match[1]), name) for name in self.columns if (match := pattern.fullmatch(name))]
        if not names:
            raise DataError(f"{self.path}: no column {text}\ncolumns there: {self.describe()}")
        return [name for _, name in sorted(names)]


def _floats(values, name, path):
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} is {values.dtype}: expected numbers")
    return values.astype(np.float64)


def open_source(path, *, tree="", event_id="", labels=()):
    """Return the Source of a file, by its ending. tree: of a .root file. event_id: column of a .csv file.

    Columns of text are left out, but `labels` and those that are named as labels often are.

    Raises UsageError for another ending, DataError for a file that can't be read or lacks its package.
    """
    path = Path(path)
    openers = {
        ".npz": lambda: _npz(path),
        ".npy": lambda: _npy(path),
        ".h5": lambda: _hdf5(path),
        ".hdf5": lambda: _hdf5(path),
        ".parquet": lambda: _parquet(path, labels),
        ".root": lambda: _root(path, tree),
        ".csv": lambda: _csv(path, event_id, labels),
        ".tsv": lambda: _csv(path, event_id, labels),
    }
    opener = openers.get(path.suffix.lower())
    if not opener:
        raise UsageError(f"--source {path}: expected a file {' '.join(openers)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        source = opener()
    except ImportError as e:
        package = {"pyarrow.parquet": "pyarrow"}.get(e.name, e.name)
        raise DataError(f"{path}: needs the package {package}\ntry: pip install {package}") from None
    except (DataError, UsageError):
        raise
    except Exception as e:  # truncation and flipped bits raise a dozen types
        raise unreadable(path, e) from e
    if not source.columns:
        raise DataError(f"{path}: no column of numbers")
    return source


def unreadable(path, error):
    """Return the DataError of a file that can't be read."""
    reason = (str(error).splitlines() or [""])[0]
    hint = "\ntry: pip install hdf5plugin" if "filter" in reason or "plugin" in reason else ""
    return DataError(f"{path} can't be read: {type(error).__name__}: {reason}{hint}")


# ---- kinds of files --------------------------------------------------------------------------------------------------


def _npz(path):
    with np.load(path, allow_pickle=False) as file:
        columns = {}
        for name in file:
            try:
                array = file[name]
            except ValueError as e:  # Python objects
                if name.lower()[:1] in "xy":
                    raise DataError(f"{path}: {name}: {e}\nfix: lists of different lengths as .parquet") from e
                continue
            if array.dtype.names:
                columns |= {f"{name}/{field}": array[field] for field in array.dtype.names}
            elif array.ndim:
                columns[name] = array
    return Source(path, columns)


def _npy(path):
    return Source(path, dict(X=np.load(path, allow_pickle=False)))


def _hdf5(path):
    import h5py

    try:  # filters of other programs, such as blosc
        import hdf5plugin  # noqa: F401
    except ImportError:
        pass
    file = h5py.File(path, "r")
    columns, frames = {}, []

    def visit(name, item):
        group = name.rpartition("/")[0]
        if any(group == frame or group.startswith(f"{frame}/") for frame in frames):
            return
        if isinstance(item, h5py.Group):
            if "block0_values" in item or "table" in item and item["table"].dtype.names:
                frames.append(name)
                columns.update(_pandas(item, name))
        elif item.dtype.names:
            rows = Lazy(lambda start, stop: item[start:stop], item.shape)
            columns.update({f"{name}/{field}": _field(rows, field) for field in item.dtype.names})
        elif item.ndim:
            columns[name] = item

    file.visititems(visit)
    return Source(path, columns, file.close)


def _field(rows, field):
    """Return one field of a column of records."""
    return Lazy(lambda start, stop: rows[start:stop][field], rows.shape)


def _pandas(group, name):
    """Return the columns of a DataFrame that pandas wrote; one whose columns are numbered is one block, `name`."""
    columns = {}
    if "table" in group:
        table = group["table"]
        rows = Lazy(lambda start, stop: table[start:stop], table.shape)
        for field in table.dtype.names:
            if not field.startswith("values_block_"):
                columns[field] = _field(rows, field)
                continue
            names = _texts_in_pickle(table.attrs.get(f"{field}_kind", b""))
            block = _field(rows, field)
            block.shape = (len(table), *table.dtype[field].shape)
            columns |= _split(block, names, name if field.endswith("_0") else f"{name}/{field}")
        return columns
    for key in group:
        if match := re.fullmatch(r"block(\d+)_values", key):
            items = group.get(f"block{match[1]}_items")
            names = [] if items is None or items.dtype.kind not in "SO" else [_text(item) for item in items]
            block = group[key]
            shared = Lazy(lambda start, stop, block=block: block[start:stop], block.shape)
            columns |= _split(shared, names, name if match[1] == "0" else f"{name}/{key}")
    return columns


def _split(block, names, name):
    """Return {column: (N,)} of a block (N, F) whose columns have names; else the block itself."""
    if len(names) != block.shape[1]:
        return {name: block}
    length = (len(block),)
    return {n: Lazy(lambda start, stop, i=i: block[start:stop][:, i], length) for i, n in enumerate(names)}


def _texts_in_pickle(content):
    """Return the texts in a pickle, whose opcodes are read and never run."""
    content = bytes(content)
    if not content:
        return []
    texts = [value for _, value, _ in pickletools.genops(content) if isinstance(value, (str, bytes))]
    return [_text(text) for text in texts]


def _text(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _parquet(path, labels):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(path)

    def column(name):
        chunks = table.read([name]).column(0).combine_chunks()
        kind = chunks.type
        if pa.types.is_fixed_size_list(kind):
            return chunks.flatten().to_numpy(zero_copy_only=False).reshape(len(chunks), -1)
        if not pa.types.is_list(kind) and not pa.types.is_large_list(kind):
            return chunks.to_numpy(zero_copy_only=False)
        if pa.types.is_list(kind.value_type):
            raise DataError(f"{path}: {name} is {kind}: expected one list of numbers per event")
        counts = chunks.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return Ragged(chunks.flatten().to_numpy(zero_copy_only=False), counts)

    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    columns = {}
    for field in table.schema_arrow:
        inner = field.type if pa.types.is_dictionary(field.type) else getattr(field.type, "value_type", field.type)
        if any(test(inner) for test in numbers) or is_label(field.name, labels):
            columns[field.name] = Postponed(lambda name=field.name: column(name), inner is not field.type, table)
    return Source(path, columns, table.close)


class Postponed:
    """A column of a parquet file that is loaded when it is first sliced."""

    def __init__(self, load, ragged, table):
        self.load, self.column = load, None
        self.shape = (table.metadata.num_rows, "any")[: 1 + ragged]

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, events):
        if self.column is None:
            self.column = self.load()
        return self.column[events]


def _root(path, tree):
    import uproot

    file = uproot.open(path)
    trees = [name for name, kind in file.classnames(cycle=False).items() if kind in ("TTree", "ROOT::RNTuple")]
    if tree and tree not in trees or len(trees) != 1 and not tree:
        listing = ", ".join(trees) or "none"
        raise DataError(f"{path}: trees there: {listing}\nfix: the line `tree: NAME` in a file for --columns")
    tree = file[tree or trees[0]]

    def read(name, start, stop):
        values = tree[name].array(entry_start=start, entry_stop=stop, library="np")
        if values.dtype != object:
            return values
        counts = [len(value) for value in values]
        return Ragged(np.concatenate([*values, np.zeros(0)]), counts)[0 : len(counts)]

    columns = {}
    for name, branch in tree.items():
        kind = branch.typename
        if re.search(r"bool|int|float|double|char|short|long", kind) and not re.search("string|vector<.*vector", kind):
            ragged = "[" in kind or "vector" in kind
            shape = (tree.num_entries, "any")[: 1 + ragged]
            columns[name] = Lazy(lambda start, stop, name=name: read(name, start, stop), shape)
    return Source(path, columns, file.close)


def _csv(path, event_id, labels):
    import pandas as pd

    with open(path, encoding="utf-8-sig", newline="") as file:
        first, start = file.readline(), file.read(DECIMALS)
    separator = max(",;\t", key=first.count)
    decimal = "," if separator != "," and re.search(r"\d,\d", start) else "."
    header = next(csv.reader([first], delimiter=separator), [])
    if event_id and event_id not in header:
        raise DataError(f"{path}: no column {event_id}\ncolumns there: {', '.join(header)}")
    frame = pd.read_csv(path, encoding="utf-8-sig", sep=separator, decimal=decimal)
    frame.columns = [str(name).strip() for name in frame.columns]
    numbers = set(frame.select_dtypes(["number", "bool"]))
    texts = [name for name in frame if name not in numbers and is_label(name, labels)]
    for name in texts:
        frame[name] = frame[name].astype(object)
        if (empty := frame[name].isna()).any():
            raise DataError(f"{path}: line {empty.argmax() + 2}: no {name}")
    lower = {name.lower(): name for name in frame.columns}
    event_id = event_id or next((lower[name] for name in EVENT_IDS if name in lower), "")
    if not event_id:  # a row is an event
        return Source(path, {name: frame[name].to_numpy() for name in frame.columns})
    if (empty := frame[event_id].isna()).any():
        raise DataError(f"{path}: line {empty.argmax() + 2}: no {event_id}, which says of which event the particle is")
    keys = [event_id, *(name for name in frame if name.lower() in RUNS)]  # each run counts its events from 1 again
    codes = frame.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    columns = [name for name in frame if name not in keys and (name in numbers or name in texts)]
    if left := [name for name in frame if name not in columns and name not in keys]:
        print(f"{path}: not read, since they hold text: {', '.join(left)}")
    several = np.count_nonzero(np.diff(codes)) + 1 - len(counts)
    if several > 0:
        print(f"{path}: {several} times an event goes on after another began; its particles are joined")
    for name in columns:
        mixed = frame.groupby(codes)[name].nunique() > 1 if is_label(name, labels) else []
        if np.any(mixed):
            line = np.argmax(codes == np.argmax(mixed)) + 2
            remedy = "fix: a column `run` beside it, or event numbers that are used once"
            raise DataError(f"{path}: line {line}: the particles of one {event_id} have several {name}\n{remedy}")
    return Source(path, {name: Ragged(frame[name].to_numpy()[order], counts) for name in columns})


# ---- labels of text --------------------------------------------------------------------------------------------------


def is_label(name, labels):
    """Return whether a column is one of `labels`, or named as labels often are."""
    return name in labels or name.strip().lower() in LABELS


def number_labels(columns):
    """Number the texts in [(Source, column of labels)] in place, in the order of the alphabet over all of them.

    Raises DataError where some hold texts and others numbers.
    """
    texts = {}
    for i, (source, name) in enumerate(columns):
        column = source.columns.get(name, ())
        if len(column) and np.asarray(column[0:1]).dtype.kind in "OSU":
            values = np.asarray(column[0 : len(column)])
            values = values[:, 0] if values.ndim == 2 else values
            if empty := [number for number, value in enumerate(values) if value is None or value != value]:
                raise DataError(f"{source.path}: event {empty[0] + 1}: no {name}")
            texts[i] = [_text(value) for value in values]
    if not texts:
        return
    if len(texts) < len(columns):
        others = [columns[i] for i in range(len(columns)) if i not in texts]
        names = [f"{source.path}: {name}" for source, name in (columns[min(texts)], others[0])]
        raise DataError(f"{names[0]} holds text, {names[1]} numbers\nfix: texts or numbers in all files")
    classes, codes = np.unique(np.concatenate(list(texts.values())), return_inverse=True)
    ends = np.cumsum([len(values) for values in texts.values()])
    for (source, name), numbers in zip(columns, np.split(codes, ends[:-1]), strict=True):
        source.columns[name] = numbers
    print(f"{columns[0][1]}: {', '.join(f'{i} {text}' for i, text in enumerate(classes))}")
