"""Read a user's table of measurements: text with any separator, decimal mark and encoding, Excel, parquet.

`read_table` reads a file right or raises an error with the line and the remedy. M rows, D columns x. The csv module
splits text, because it knows the line of each row; pandas is imported for Excel and parquet alone.
"""

import csv
import difflib
import gzip
import io
import re
import shlex
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_utils.errors import DataError, UsageError

MISSING = set("na n/a n.a. nan -nan <na> nat null none nil nd n.d. missing - -- --- − – — . .. ... ? *".split())
MISSING |= set("#n/a #na #div/0! #value! #ref! #num! #name? #null! 1.#qnan -1.#ind".split()) | {""}
COMMENTS = "#", "//", "% ", "sep="  # "sep=;" is a hint for Excel
SEPARATORS = "\t", ";", "|", ",", " ", "  "  # an earlier one wins a tie; " " is any blanks, "  " two or more
LOOKALIKES = str.maketrans("−–﹣－\u00a0\u2007\u2009\u202f’", "----    '")  # of minus signs, blanks, apostrophes
NUMERIC = re.compile(r"[+-]?[.,]?\d[\d.,]*(?:[ ']\d{3})*[\d.,]*(?:[eEdD][+-]?\d+)?\s*%?")  # whatever its marks mean
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}(?:\1\d{3})*")  # 1.234 or 1,234,567: perhaps thousands
DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?|\d{1,2}:\d\d.*|\d{1,2}[ .-]+[^\W\d]+[ .-]+\d\d+.*")
UNNAMED = re.compile(r"|Unnamed: \d+")  # headers that pandas and R give to an index
COUNTERS = {"index", "idx", "id", "row", "no", "no.", "nr", "nr.", "number", "#"}
NAME_UNIT = re.compile(r"(.+?)(?:\s*\[([^][]+)\]|\s+\(([^()]+)\)|,\s+(\S+)|\s+/\s+(\S+))")  # mass [kg], T / K
ERROR = r"(?:std[ _.]?(?:err|error|dev)?|stdev|err|errors?|sigma|σ|sd|sem|unc|uncert|uncertainty|±|\+/?-)"
UNCERTAIN = re.compile(rf"(.*?)[ _.-]*{ERROR}|{ERROR}[ _.-]*(.*)|u\((.*)\)")
DIFFERENCE = re.compile(r"(?:d|δ|delta_)(.+)")  # an uncertainty of y; of x it may well be a variable


def _number(mark, group):
    """Return the pattern of a number with a decimal mark: sign, digits in groups of three, decimals, exponent, unit."""
    digits = rf"\d{{1,3}}(?P<group>[{group}])\d{{3}}(?:(?P=group)\d{{3}})*|\d+"
    number = rf"(?P<sign>[+-]?)(?=[{mark}]?\d)(?P<digits>{digits})?(?:[{mark}](?P<decimals>\d*))?"
    return re.compile(rf"{number}(?:[eEdD](?P<exponent>[+-]?\d+))?\s*(?P<unit>(?:[%‰°]|[^\W\d_])\S*|)")


NUMBER = {".": _number(".", ", '"), ",": _number(",", ". '")}


@dataclass
class Table:
    X: np.ndarray  # (M, D) float64
    y: np.ndarray  # (M,)
    names: list  # of the columns of X, as the file writes them
    target: str = "y"
    sigma: np.ndarray | None = None  # (M,) uncertainty of y
    units: dict = field(default_factory=dict)  # name -> text, where the file says it
    digits_X: np.ndarray | None = None  # (M, D) half a unit of the last digit as written; 0 = unknown
    digits_y: np.ndarray | None = None  # (M,)
    notes: list = field(default_factory=list)  # lines to be said aloud: what is left out, how cells are read

    def __post_init__(self):
        if self.digits_X is None:
            self.digits_X, self.digits_y = np.zeros(self.X.shape), np.zeros(self.y.shape)


@dataclass
class Column:
    values: np.ndarray | None = None  # (M,) float64, nan where missing
    digits: np.ndarray | None = None  # (M,)
    unit: str = ""
    fault: str = ""  # why the column can't be used
    wrong: tuple = ()  # line and cell of the first text in a column of numbers
    index: bool = False  # numbers the rows and has no name

    def varies(self, rows):
        values = self.values[np.isfinite(self.values) & rows]
        return len(values) < 2 or bool((values != values[0]).any())


@dataclass
class Cells:
    names: list
    rows: list  # of lists of str
    lines: list  # the line of each row in the file
    units: list  # of the columns, from a row below the names
    separator: str  # "" of Excel and parquet
    notes: list


def from_arrays(X, y, names=None):
    """Return the Table of an array or DataFrame X (M, D) and y (M,). Names default to those of X, else x1, x2, ..."""
    if names is None:
        names = getattr(X, "columns", None)
    target = getattr(y, "name", None)
    y = np.asarray(y, np.float64).reshape(-1)
    X = np.asarray(X, np.float64).reshape(len(y), -1)
    names = [f"x{j + 1}" for j in range(X.shape[1])] if names is None else [str(name) for name in names]
    return Table(X, y, names, "y" if target is None else str(target))


def read_table(path, target="", columns=(), ignore=(), sigma=""):
    """Return the Table of a file.

    target: the column y, "" = the last one of numbers. columns: those of X, () = all others that vary. sigma: the
    uncertainty of y. Raises UsageError for a flag that no column fits, DataError for a file that can't be read.
    """
    cells = _read(Path(path))
    table, notes = _columns(path, cells), cells.notes
    chosen = list(dict.fromkeys(_find(path, table, "--columns", name) for name in columns))
    ignored = {_find(path, table, "--ignore", name) for name in ignore}
    sigma = _find(path, table, "--sigma", sigma) if sigma else ""
    if target:
        target = _find(path, table, "--target", target)
    else:
        target = _last_column(path, table, {*chosen, *ignored, sigma} - {""}, notes)
    needed = [target, sigma] if sigma else [target]
    uses = Counter([*chosen, *ignored, *needed])
    if max(uses.values()) > 1:
        remedy = "try: each column under one of --target, --columns, --ignore, --sigma"
        raise UsageError(f"column {max(uses, key=uses.get)} is named twice (y is {target})\n{remedy}")
    used = chosen or _other_columns(table, target, uses, notes)
    for name in [*used, *needed]:
        if table[name].wrong:
            line, cell = table[name].wrong
            remedy = f"correct it or empty the cell, or --ignore {shlex.quote(name)}"
            raise _error(path, f"line {line}, column {name}: {cell!r} is no number", remedy)
    used, rows = _complete_rows(table, used, needed, bool(chosen), notes)
    M = int(rows.sum())
    if M < len(rows):
        gaps = [name for name in [*used, *needed] if not np.isfinite(table[name].values).all()]
        notes.append(f"left out: {len(rows) - M} of {len(rows)} rows, missing or infinite in {', '.join(gaps)}")
    if not used:
        message = f"no column of numbers varies beside {target}: expected one x or more"
        raise _error(path, message, "--target NAME", notes)
    if M < 2:
        raise _error(path, f"{M} complete rows of numbers: expected 2 or more", "--ignore NAME", notes)
    if sigma and (table[sigma].values[rows] <= 0).any():
        line = cells.lines[np.flatnonzero(rows & (table[sigma].values <= 0))[0]]
        message = f"line {line}, column {sigma}: an uncertainty is above 0"
        raise _error(path, message, "empty the cell, and the row is left out")
    return Table(
        X=np.stack([table[name].values[rows] for name in used], 1),
        y=table[target].values[rows],
        names=used,
        target=target,
        sigma=table[sigma].values[rows] if sigma else None,
        units={name: table[name].unit for name in [*used, *needed] if table[name].unit},
        digits_X=np.stack([table[name].digits[rows] for name in used], 1),
        digits_y=table[target].digits[rows],
        notes=notes,
    )


@dataclass
class NewRows:
    X: np.ndarray  # (M, D), nan where a number is missing
    names: list  # of all columns of the file
    rows: list  # of lists of str: its cells
    separator: str
    mark: str  # of decimals


def read_columns(path, names):
    """Return the NewRows of a file with the columns `names` of X, in this order, and perhaps others.

    Raises DataError for a file that can't be read, or that has no such columns of numbers.
    """
    cells = _read(Path(path), least=1)
    table = _columns(path, cells)
    columns = []
    for name in names:
        matches = [name] if name in table else [other for other in table if _bare(other) == _bare(name)]
        if len(matches) != 1 or table[matches[0]].fault:
            raise _error(path, f"no column {name} of numbers: the columns are {', '.join(table)}",
                         f"a table with the columns {', '.join(names)}")  # fmt: skip
        columns.append(table[matches[0]].values)
    separator = cells.separator if cells.separator in (",", ";", "\t", "|") else ","
    mark = "," if separator != "," and _decimal_mark(path, cells) == "," else "."
    return NewRows(np.stack(columns, 1), cells.names, cells.rows, separator, mark)


def _error(path, message, remedy, notes=()):
    return DataError("\n".join([f"{path}: {message}", *(f"  {note}" for note in notes), f"try: {remedy}"]))


# --- which column is what


def _find(path, table, flag, name):
    """Return the column that a flag names, with its unit or without. All but --ignore need numbers."""
    matches = [name] if name in table else [other for other in table if _bare(other) == name]
    if len(matches) != 1:
        folded = {other.casefold(): other for other in table}
        near = difflib.get_close_matches(name.casefold(), folded, 1, 0)
        remedy = f"try: {flag} {shlex.quote(folded[near[0]])}"
        raise UsageError(f"{flag} {name}: the columns of {path} are {', '.join(table)}\n{remedy}")
    fault = table[matches[0]].fault
    if fault and flag != "--ignore":
        usable = [other for other in table if not table[other].fault] or ["NAME"]
        remedy = f"try: {flag} {shlex.quote(usable[-1])}"
        raise UsageError(f"{flag} {name}: expected a column of numbers, found one {fault}\n{remedy}")
    return matches[0]


def _bare(name):
    """Return a name without the unit that it carries: mass [kg] -> mass."""
    match = NAME_UNIT.fullmatch(name)
    return match[1] if match else name


def _uncertainty_of(name, table, target=""):
    """Return the column whose uncertainty `name` looks to be, "" for none. target "": y is not chosen yet."""
    if (table[name].values < 0).any():
        return ""
    by_name = {_bare(other).casefold(): other for other in table}
    folded = _bare(name).casefold()
    match, difference = UNCERTAIN.fullmatch(folded), DIFFERENCE.fullmatch(folded)
    if match:
        base = next(filter(None, match.groups()), "").strip(" _.-")
        return by_name.get(base) or (target or "y" if base in ("", "y") else "")
    of = by_name.get(difference[1].strip(" _"), "") if difference else ""
    return of if target in ("", of) else ""


def _last_column(path, table, taken, notes):
    """Return the last column of numbers that is no uncertainty: y where no flag says otherwise."""
    free = [name for name in table if not table[name].fault and name not in taken]
    if not free:
        faults = [f"{name} is {column.fault}" for name, column in table.items() if column.fault]
        raise _error(path, "no column of numbers for y", "a table with two columns of numbers or more", faults)
    plain = [name for name in free if not table[name].index and not _uncertainty_of(name, table)]
    if len(plain) == 1 and len(free) == 2 and free[0] == plain[0] and not taken:  # h, error: nothing else is left for x
        plain = free
    target = (plain or free)[-1]
    if target != list(table)[-1]:
        notes.append(f"y is {target}, the last column of numbers; for another try: --target NAME")
    return target


def _other_columns(table, target, uses, notes):
    """Return the columns that may be x and that no flag names; note those that are left out."""
    used, spare = [], {}
    for name, column in table.items():
        if name in uses:
            continue
        if column.fault:
            notes.append(f"left out: {name}, {column.fault}")
        elif column.index:
            spare[name] = "an index without a name"
        elif of := _uncertainty_of(name, table, target):
            spare[name] = f"which looks like the uncertainty of {of}"
        else:
            used.append(name)
    if spare and not any(table[name].wrong or table[name].varies(True) for name in used):
        name = max(spare, key=lambda name: table[name].index)
        notes.append(f"x is {name}, {spare.pop(name)}: no other column varies")
        used.append(name)
    for name, reason in spare.items():
        flags = ["--sigma", name] if reason.endswith(f"uncertainty of {target}") else ["--columns", *used, name]
        notes.append(f"left out: {name}, {reason}; to use it try: {shlex.join(flags)}")
    for name in used if len(used) > 1 else ():
        if name.casefold() in COUNTERS and (np.diff(table[name].values) == 1).all():
            notes.append(f"{name} numbers the rows and is used as x; to leave it out try: --ignore {shlex.quote(name)}")
    return used


def _complete_rows(table, used, needed, explicit, notes):
    """Return the columns x that vary and the rows (M,) in which all of them and `needed` are finite.

    Unless the columns are explicit, those are left out whose gaps would cost more than half of the rows.
    """
    used = list(used)
    base = np.all([np.isfinite(table[name].values) for name in needed], 0)
    while True:
        rows = np.all([base, *(np.isfinite(table[name].values) for name in used)], 0)
        constant = [name for name in used if not table[name].varies(base)] if base.sum() > 1 else []
        if not constant and not explicit and len(used) > 1 and rows.sum() < base.sum() / 2:
            name = max(used, key=lambda name: (~np.isfinite(table[name].values[base])).sum())
            gaps = int((~np.isfinite(table[name].values)).sum())
            reason = f"missing in {gaps} of {len(rows)} rows; to use it try: {shlex.join(['--columns', *used])}"
        else:
            if rows.sum() > 1:
                constant = constant or [name for name in used if not table[name].varies(rows)]
            if not constant:
                return used, rows
            name, reason = constant[0], "which is the same in all rows"
        used.remove(name)
        notes.append(f"left out: {name}, {reason}")


# --- from bytes to rows of cells


def _read(path, least=2):
    """Return the Cells of a file with `least` rows or more; raise DataError where it holds no table."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as e:
        near = [] if path.exists() else difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
        remedy = f"--data {shlex.quote(str(path.with_name(near[0])))}" if near else "--data FILE"
        raise _error(path, getattr(e, "strerror", None) or e, remedy) from e
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1")):
        rows, notes = _binary_rows(path, raw)
        return _header(path, rows, list(range(1, len(rows) + 1)), "", notes, least)
    text, notes = _decode(path, raw)
    lines = re.sub("\r\n?", "\n", text).split("\n")
    comments = [i for i, line in enumerate(lines) if line.lstrip(' "').startswith(COMMENTS)]
    bare = list(lines)
    for i in comments:
        bare[i] = ""
    if "#" in text and "#" not in next(filter(str.strip, bare), ""):
        bare = [re.sub(r"\s#\s.*", "", line) for line in bare]  # remarks behind the cells
    separator = _separator(list(filter(str.strip, bare))[:100])
    reader, rows, numbers = _split(bare, separator), [], []
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as e:
        raise _error(path, f"line {reader.line_num}: {e}", "look for a quotation mark without its pair") from e
    above = [i for i in comments if rows and i < numbers[0]]
    if above and _all_numbers(rows[0]):  # numpy.savetxt writes the names as a comment
        names = next(_split([lines[above[-1]].strip('#%/" ')], separator), [])
        if len(names) == len(rows[0]):
            rows, numbers = [names, *rows], [above[-1] + 1, *numbers]
    return _header(path, rows, numbers, separator, notes, least)


def _binary_rows(path, raw):
    """Return the rows of an Excel or parquet file as text, the header first, and notes."""
    notes = []
    try:
        import pandas

        if raw.startswith(b"PAR1"):
            frame = pandas.read_parquet(io.BytesIO(raw))
            columns = [[name, *frame[name]] for name in frame]
        else:
            sheets = pandas.read_excel(io.BytesIO(raw), sheet_name=None, header=None, dtype=object)
            name = next((name for name, sheet in sheets.items() if len(sheet)), "")
            columns = [list(sheets[name][j]) for j in sheets[name]] if name else []
            if len(sheets) > 1:
                notes.append(f"sheet {name} is read, one of {', '.join(map(str, sheets))}")
    except ImportError as e:
        package = next((name for name in ("openpyxl", "xlrd", "odfpy", "pyarrow") if name in str(e)), "pandas")
        remedy = f"pip install {package}, or save the table as csv"
        raise _error(path, f"{package} is missing, which reads this kind of file", remedy) from e
    except Exception as e:  # pandas, openpyxl and pyarrow raise their own kinds for a damaged file
        raise _error(path, (str(e).splitlines() or [type(e).__name__])[0], "save the table as csv") from e
    texts = [["" if _is_missing(str(cell)) else str(cell) for cell in column] for column in columns]
    return list(map(list, zip(*texts, strict=True))), notes


def _decode(path, raw):
    """Return the text of a file, and a note where it is no UTF-8."""
    encodings = ["utf-8-sig", "cp1252", "latin-1"]
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif 0 in raw[:4000]:  # every second byte of UTF-16 is 0 in a table of numbers
        encodings = ["utf-16-le" if raw[1:4000:2].count(0) > raw[:4000:2].count(0) else "utf-16-be"]
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, [f"read as {encoding}, because it is no UTF-8"] if encoding in encodings[1:] else []
    raise _error(path, "expected a table as text, Excel or parquet, found other bytes", "save the table as csv")


def _split(lines, separator):
    """Return the csv reader of lines."""
    if separator.isspace() and separator != "\t":
        lines = [re.sub(rf"\s{{{len(separator)},}}", "\t", line.strip()) for line in lines]
        separator = "\t"
    return csv.reader(lines, delimiter=separator, skipinitialspace=True)


def _separator(lines):
    """Return the separator that makes the most lines equally wide and the most cells numbers."""
    scores = {",": 0.0}
    for separator in SEPARATORS:
        try:
            rows = list(_split(lines, separator))
        except csv.Error:
            continue
        cells = [cell for row in rows for cell in row]
        width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
        if width > 1:
            scores[separator] = count / len(rows) + sum(map(_is_number, cells)) / len(cells)
    return max(sorted(scores, key=SEPARATORS.index), key=scores.get)


def _is_missing(cell):
    return cell.strip().casefold() in MISSING


def _is_number(cell):
    return NUMERIC.fullmatch(cell.strip().translate(LOOKALIKES)) is not None


def _all_numbers(row):
    return all(_is_number(cell) or _is_missing(cell) for cell in row)


def _header(path, rows, lines, separator, notes, least=2):
    """Return Cells from rows the first of which holds the names; raise DataError with the line that is wrong."""
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    top = 0
    while top < len(rows) - 1 and sum(map(bool, rows[top])) < min(2, width - (len(rows[top]) == width)):
        top += 1  # a title, or empty
    if any(map(any, rows[:top])):
        notes.append(f"skipped: lines {lines[0]} to {lines[top - 1]}, above the table")
    full = [i for i in range(top + 1, len(rows)) if rows[i] != rows[top] and not all(map(_is_missing, rows[i]))]
    if len(full) < len(rows) - top - 1:
        notes.append(f"skipped: {len(rows) - top - 1 - len(full)} rows that are empty or repeat the header")
    expected = f"expected the names of the columns in the first line and {least} rows of numbers or more"
    if len(full) < least:
        raise _error(path, f"{len(full)} rows below a header: {expected}", "a table with more rows")
    names = [" ".join(name.replace("\ufeff", "").split()) for name in rows[top]]
    rows, lines = [rows[i] for i in full], [lines[i] for i in full]
    labels = [row[0] for row in rows]
    if all(len(row) == len(names) + 1 for row in rows) and len(set(labels)) == len(rows):
        if labels[0] in ("0", "1") or not any(map(_is_number, labels)):
            names.insert(0, "")  # R heads no column for the names of rows
    for row, line in zip(rows, lines, strict=True):
        while len(row) > len(names) and _is_missing(row[-1]):  # a separator at the end
            row.pop()
        if len(row) != len(names):
            remedy = "correct the line; a missing cell stays empty between its separators"
            if len(row) == 2 * len(names) and separator == ",":
                remedy = "save the table with semicolons between its cells: the decimal mark seems to be a comma"
            raise _error(path, f"line {line} has {len(row)} cells, the header {len(names)}: {', '.join(names)}", remedy)
    recurring = [name != "" and any(row[j] == name for row in rows[:1000]) for j, name in enumerate(names)]
    if all(_all_numbers([name]) or DATE.fullmatch(name) or recurring[j] for j, name in enumerate(names)):
        remedy = "write their names above them"
        if separator and path.suffix != ".gz":
            header = separator.join([*(f"x{j + 1}" for j in range(len(names) - 1)), "y"])
            named = path.with_name(f"{path.stem}_named{path.suffix}")
            remedy = f"(echo {shlex.quote(header)}; cat {shlex.quote(str(path))}) > {shlex.quote(str(named))}"
        raise _error(path, f"the first line holds values: expected the names of the {len(names)} columns", remedy)
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        message = f"several columns are named {', '.join(twice)}: {', '.join(names)}"
        raise _error(path, message, "give each column its own name in the first line")
    units = [""] * len(names)
    if _is_units(rows):
        units = ["" if _is_missing(cell) else cell.strip().strip("[]()") for cell in rows[0]]
        notes.append(f"line {lines[0]} is read as units: {', '.join(units)}")
        rows, lines = rows[1:], lines[1:]
    return Cells(names, rows, lines, units, separator, notes)


def _is_units(rows):
    """Return whether the first row holds no number but 1, and a text above numbers."""
    if any(_is_number(cell) and cell.strip() != "1" for cell in rows[0]):
        return False
    for j, cell in enumerate(rows[0]):
        below = [row[j] for row in rows[1:20] if not _is_missing(row[j])]
        if below and all(map(_is_number, below)) and not _all_numbers([cell]):
            return True
    return False


# --- from cells to numbers


def _columns(path, cells):
    """Return name -> Column, with numbers or with the fault that keeps it from having some."""
    table, mark = {}, _decimal_mark(path, cells)
    for name, texts, unit in zip(cells.names, zip(*cells.rows, strict=True), cells.units, strict=True):
        column = _parse(texts, mark, cells.lines)
        values = column.values
        if not name and values is None and not any(map(str.strip, texts)):
            continue
        if UNNAMED.fullmatch(name) and values is not None:
            column.index = bool((values >= 0).all() and (values % 1 == 0).all() and len(set(values)) == len(values))
            if not name and not column.index:
                message = f"a column has no name: {', '.join(cells.names)}"
                raise _error(path, message, "write its name into the first line")
        if not name:
            name = next(name for name in ("index", "index_2", "index_3") if name not in {*cells.names, *table})
        if column.unit:
            first = next(text for text in texts if not _is_missing(text)).strip()
            cells.notes.append(f"{name}: {first} is read as a number with the unit {column.unit}")
        in_name = NAME_UNIT.fullmatch(name)
        column.unit = unit or column.unit or (next(filter(None, in_name.groups()[1:])) if in_name else "")
        if values is not None and not cells.separator:
            column.digits[:] = 0.0
        table[name] = column
    return table


def _decimal_mark(path, cells):
    """Return the decimal mark of a table, "." or ",", from the cells that tell it apart from one of thousands."""
    numbers = [cell.strip().translate(LOOKALIKES) for row in cells.rows[:2000] for cell in row if _is_number(cell)]
    commas = [number for number in numbers if "," in number]
    points = [number for number in numbers if "." in number]
    if not commas:
        return "."
    examples = {}
    for number in commas + points:
        mark, other = (",", ".") if number.rfind(",") > number.rfind(".") else (".", ",")
        grouped = GROUPED.fullmatch(re.sub(r"[eEdD].*|[\s%]", "", number))
        if grouped and number.count(mark) > 1:
            examples.setdefault(other, number)
        elif not grouped and number.count(mark) == 1:
            examples.setdefault(mark, number)
    if not examples and (cells.separator == "," or cells.separator == ";" and not points):
        examples = {{",": ".", ";": ","}[cells.separator]: commas[0]}
    if len(examples) != 1:
        seen = " and ".join(examples.values()) or f"{commas[0]}, whose comma may mark decimals or thousands"
        remedy = "write numbers with a decimal point and without separators of thousands"
        raise _error(path, f"the decimal mark can't be told from {seen}", remedy)
    (mark,) = examples
    meaning = "decimal mark" if mark == "," else "mark of thousands"
    cells.notes.append(f"the comma in {commas[0]} is read as a {meaning}")
    return mark


def _parse(texts, mark, lines):
    """Return the Column of texts (M,) that stand in these lines of the file."""
    parsed = _plain(texts) if mark == "." else None
    if parsed is not None:
        return Column(*parsed)
    texts = ["nan" if _is_missing(text) else text.strip() for text in texts]
    if mark == "." or not any("." in text for text in texts):
        parsed = _plain([text.replace(mark, ".") for text in texts])
    present = [i for i, text in enumerate(texts) if text != "nan"]
    if not present:
        return Column(fault="which is empty")
    if parsed is not None:
        return Column(*parsed)
    matches = [NUMBER[mark].fullmatch(texts[i].translate(LOOKALIKES)) for i in present]
    unit, count = Counter(match["unit"] if match else None for match in matches).most_common(1)[0]
    if unit is None or 2 * count < len(present) or (unit and count < len(present)):
        first = texts[present[0]]
        kind = "of dates or times" if DATE.fullmatch(first) else "of text"
        if {text.casefold() for text in texts} <= {"true", "false", "yes", "no", "nan"}:
            kind = "of truth values"
        return Column(fault=f"{kind} as {first!r}")
    wrong = ()
    for i, match in zip(present, matches, strict=True):
        if match and match["unit"] == unit:
            digits = re.sub(r"\D", "", match["digits"] or "0")
            texts[i] = f"{match['sign']}{digits}.{match['decimals'] or ''}e{match['exponent'] or 0}"
        else:
            wrong, texts[i] = wrong or (lines[i], texts[i]), "nan"
    return Column(*_plain(texts), unit, wrong=wrong)


def _plain(texts):
    """Return the values (M,) of numbers as Python writes them and half units of their last digits, or None.

    A writer that drops zeros at the end puts 3.96 beside 6.006. There the unit is the finest of the column, or the
    one that gives a number as many digits as the longest has, whichever is coarser.
    """
    try:
        written = np.array(texts, dtype="S")
        values = written.astype(np.float64)
    except ValueError:  # no number, or no ASCII
        return None
    characters = written.view(np.uint8).reshape(len(written), -1)
    if (characters == ord("_")).any():  # a number for Python alone
        return None
    has_exponent = (characters | 32) == ord("e")
    scientific = has_exponent.any(1)
    exponents = np.zeros(len(written))
    exponents[scientific] = [int(re.split(b"[eE]", text)[1]) for text in written[scientific]]
    is_digit = (characters >= ord("0")) & (characters <= ord("9"))
    behind_point = (np.cumsum(characters == ord("."), 1) > 0) & (np.cumsum(has_exponent, 1) == 0)
    unit = exponents - (is_digit & behind_point).sum(1)  # log10, as is `magnitude`
    usual = np.isfinite(values) & (values != 0)
    magnitude = np.floor(np.log10(np.abs(values), where=usual, out=np.zeros(len(values))))
    if usual.any():
        longest = (magnitude - unit)[usual].max()
        unit = np.minimum(unit, np.maximum(unit[usual].min(), magnitude - longest))
    return values, 0.5 * 10.0**unit
