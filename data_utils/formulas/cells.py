"""Read the columns of a table from a file: text with any separator, decimal mark and encoding, Excel, parquet.

M rows below the header. The csv module splits text, because it knows the line of each row; pandas is imported for
Excel and parquet alone.
"""

import csv
import difflib
import gzip
import io
import re
import shlex
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_utils.errors import DataError

MISSING = set("na n/a n.a. nan -nan <na> nat null none nil nd n.d. missing - -- --- − – — . .. ... ? *".split())
MISSING |= set("#n/a #na #div/0! #value! #ref! #num! #name? #null! 1.#qnan -1.#ind".split()) | {""}
COMMENTS = "#", "//", "% ", "!", "sep="  # "sep=;" is a hint for Excel
SEPARATORS = "\t", ";", "|", ",", " ", "  "  # an earlier one wins a tie; " " is any blanks, "  " two or more
LOOKALIKES = str.maketrans("−–﹣－\u00a0\u2007\u2009\u202f’", "----    '")  # of minus signs, blanks, apostrophes
CURRENCIES = "$€£¥ "  # before a number
NUMERIC = re.compile(r"[+-]?[.,]?\d[\d.,]*(?:[ ']\d{3})*[\d.,]*(?:[eEdD][+-]?\d+)?\s*%?")  # whatever its marks mean
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}(?:\1\d{3})*")  # 1.234 or 1,234,567: perhaps thousands
DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?|\d{1,2}:\d\d.*|\d{1,2}[ .-]+[^\W\d]+[ .-]+\d\d+.*")
UNNAMED = re.compile(r"|Unnamed: \d+")  # headers that pandas and R give to an index
NAME_UNIT = re.compile(r"(.+?)(?:\s*\[([^][]+)\]|\s+\(([^()]+)\)|,\s+(\S+)|\s+/\s+(\S+))")  # mass [kg], T / K
EXPECTED = "expected the names of the columns in the first line, below it 2 rows of numbers or more"


def _number(mark, group):
    """Return the pattern of a number with a decimal mark: sign, digits in groups of three, decimals, exponent, unit."""
    digits = rf"\d{{1,3}}(?P<group>[{group}])\d{{3}}(?:(?P=group)\d{{3}})*|\d+"
    number = rf"(?P<sign>[+-]?)(?=[{mark}]?\d)(?P<digits>{digits})?(?:[{mark}](?P<decimals>\d*))?"
    return re.compile(rf"{number}(?:[eEdD](?P<exponent>[+-]?\d+))?\s*(?P<unit>(?:[%‰°]|[^\W\d_])\S*|)")


NUMBER = {".": _number(".", ", '"), ",": _number(",", ". '")}


@dataclass
class Column:
    values: np.ndarray | None = None  # (M,) float64, nan where missing
    digits: np.ndarray | None = None  # (M,) half a unit of the last digit as written; 0 = unknown
    unit: str = ""
    fault: str = ""  # why the column holds no numbers
    wrong: tuple = ()  # line and cell of the first text in a column of numbers
    index: bool = False  # numbers the rows and has no name

    def varies(self, rows=True):
        values = self.values[np.isfinite(self.values) & rows]
        return len(values) < 2 or bool((values != values[0]).any())


def error(path, message, remedy, notes=()):
    """Return a DataError about a file: what was found, notes, a remedy that begins with try: or fix:."""
    return DataError("\n".join([f"{path}: {message}", *(f"  {note}" for note in notes), remedy]))


def split_unit(name):
    """Return the two parts of a header: mass [kg] -> mass, kg."""
    match = NAME_UNIT.fullmatch(name)
    return (match[1], next(filter(None, match.groups()[1:]))) if match else (name, "")


@dataclass
class NewRows:
    X: np.ndarray  # (M, D), nan where a number is missing
    names: list  # of all columns of the file
    rows: list  # of lists of str: its cells
    separator: str
    mark: str  # of decimals


def read_columns(path):
    """Return name -> Column of a file, the line of each row (M,), and notes of how it was read."""
    columns, _, _, lines, _, _, notes = _parsed(Path(path))
    return columns, lines, notes


def read_new_rows(path, wanted):
    """Return the NewRows of a file with the columns `wanted` of X, in this order, and perhaps others.

    Raises DataError for a file that can't be read, or that has no such columns of numbers.
    """
    columns, names, rows, _, separator, mark, _ = _parsed(Path(path), least=1)
    values = []
    for name in wanted:
        matches = [name] if name in columns else [o for o in columns if split_unit(o)[0] == split_unit(name)[0]]
        if len(matches) != 1 or columns[matches[0]].fault:
            message = f"no column {name} of numbers: the columns are {', '.join(columns)}"
            raise error(path, message, f"fix: a table with the columns {', '.join(wanted)}")
        values.append(columns[matches[0]].values)
    separator = separator if separator in (",", ";", "\t", "|") else ","
    return NewRows(np.stack(values, 1), names, rows, separator, mark if separator != "," else ".")


def _parsed(path, least=2):
    """Return name -> Column, all names, rows of cells, their lines, separator, decimal mark and notes of a file."""
    rows, lines, separator, notes = _read(path)
    rows, lines = _below_titles(path, rows, lines, notes, least)
    names, rows, lines = _header(path, rows, lines, separator)
    units = [""] * len(names)
    if _is_units(rows):
        units = ["" if _is_missing(cell) else cell.strip().strip("[]()") for cell in rows[0]]
        notes.append(f"line {lines[0]} is read as units: {', '.join(units)}")
        rows, lines = rows[1:], lines[1:]
    mark = _decimal_mark(path, rows, separator, notes)
    columns = {}
    for name, texts, unit in zip(names, zip(*rows, strict=True), units, strict=True):
        column = _parse(texts, mark, lines)
        values = column.values
        if not name and values is None and not any(map(str.strip, texts)):
            continue
        if UNNAMED.fullmatch(name) and values is not None:
            counts = np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all()
            column.index = bool(counts) and len(set(values)) == len(values)
        if not name and values is not None and not column.index:
            remedy = "fix: write its name into the first line, and delete lines above the names"
            raise error(path, f"a column has no name: {', '.join(names)}", remedy)
        if not name:
            name = next(name for name in ("index", "index_2", "index_3") if name not in {*names, *columns})
        if column.unit:
            first = next(text for text in texts if not _is_missing(text)).strip()
            value = values[np.isfinite(values)][0]
            notes.append(f"{name}: {first} is read as {value:g} with the unit {column.unit}")
        column.unit = unit or column.unit or split_unit(name)[1]
        if values is not None and not separator:
            column.digits[:] = 0.0
        columns[name] = column
    return columns, names, rows, lines, separator, mark, notes


# --- from bytes to rows of cells


def _read(path):
    """Return the rows of a file, lists of str, the line of each, the separator ("" = Excel or parquet) and notes."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as e:
        near = [] if path.exists() else difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
        remedy = f"try: --data {shlex.quote(str(path.with_name(near[0])))}" if near else "fix: --data FILE"
        raise error(path, getattr(e, "strerror", None) or e, remedy) from e
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1")):
        rows, notes = _binary_rows(path, raw)
        return rows, list(range(1, len(rows) + 1)), "", notes
    text, notes = _decode(path, raw)
    if re.match(r'\s*[\[{]\s*["{\[]', text):
        lines = bool(re.search(r"}\s*{", text))
        read = f"pandas.read_json({str(path)!r}, lines={lines})"
        code = f"import pandas; {read}.to_csv({path.stem + '.csv'!r}, index=False)"
        raise error(path, "expected a table, found JSON", f"try: python -c {shlex.quote(code)}")
    lines = re.sub("\r\n?", "\n", text).split("\n")
    comments = {i: line for i, line in enumerate(lines) if line.lstrip(' "').startswith(COMMENTS)}
    for i in comments:
        lines[i] = ""
    if "#" in text and "#" not in next(filter(str.strip, lines), ""):
        lines = [re.sub(r"\s#\s.*", "", line) for line in lines]  # remarks behind the cells
    separator = _separator(list(filter(str.strip, lines))[:100])
    reader, rows, numbers = _split(lines, separator), [], []
    try:
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                rows.append(row)
                numbers.append(reader.line_num)
    except csv.Error as e:
        raise error(path, f"line {reader.line_num}: {e}", "fix: look for a quotation mark without its pair") from e
    above = [i for i in comments if rows and i < numbers[0]]
    if above and any(map(_is_number, rows[0])):  # numpy.savetxt writes the names as a comment
        names = next(_split([comments[above[-1]].strip('#%!/" ')], separator), [])
        if len(names) == len(rows[0]) and not any(map(_is_number, names)):
            rows, numbers = [names, *rows], [above[-1] + 1, *numbers]
    return rows, numbers, separator, notes


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
            name = max(sheets, key=lambda name: (_numbers_in(sheets[name]), len(sheets[name]) > 0), default="")
            columns = [list(sheets[name][j]) for j in sheets[name]] if name else []
            if len(sheets) > 1:
                notes.append(f"sheet {name} is read, one of {', '.join(map(str, sheets))}")
    except ImportError as e:
        package = next((name for name in ("openpyxl", "xlrd", "odfpy", "pyarrow") if name in str(e)), "pandas")
        remedy = f"try: pip install {package}"
        raise error(path, f"{package} is missing, which reads this kind of file; csv needs none", remedy) from e
    except KeyError as e:
        raise error(
            path, "expected a table as text, Excel or parquet, found another archive", "fix: save it as csv"
        ) from e
    except Exception as e:  # pandas, openpyxl and pyarrow raise their own kinds for a damaged file
        raise error(path, (str(e).splitlines() or [type(e).__name__])[0], "fix: save the table as csv") from e
    texts = [["" if _is_missing(str(cell)) else str(cell) for cell in column] for column in columns]
    return list(map(list, zip(*texts, strict=True))), notes


def _numbers_in(sheet):
    """Return how many cells of a sheet are numbers."""
    return sum(isinstance(cell, (int, float)) and cell == cell for column in sheet for cell in sheet[column])


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
    raise error(path, "expected a table as text, Excel or parquet, found other bytes", "fix: save the table as csv")


def _split(lines, separator):
    """Return the csv reader of lines."""
    if separator == "  ":
        lines, separator = [re.sub(r"\s{2,}", "\t", line.strip()) for line in lines], "\t"
    if separator == " ":
        lines = [" ".join(line.split()) for line in lines]
    return csv.reader((f"{line}\n" for line in lines), delimiter=separator, skipinitialspace=True)


def _separator(lines):
    """Return the separator that makes the most lines equally wide and the most cells numbers."""
    scores = dict.fromkeys(SEPARATORS, 0.0)
    for separator in SEPARATORS:
        try:
            rows = list(_split(lines, separator))
        except csv.Error:
            continue
        cells = [cell for row in rows for cell in row]
        width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
        if width > 1:
            scores[separator] = count / len(rows) + sum(map(_is_number, cells)) / len(cells)
    return max(SEPARATORS, key=scores.get)


def _is_missing(cell):
    return cell.strip().casefold() in MISSING


def _is_number(cell):
    return NUMERIC.fullmatch(_plainer(cell)) is not None


def _plainer(cell):
    """Return a cell with ASCII minus signs and blanks, without a currency before its number."""
    return (cell if cell.isascii() else cell.translate(LOOKALIKES)).strip().lstrip(CURRENCIES)


def _all_numbers(row):
    return all(_is_number(cell) or _is_missing(cell) for cell in row)


def _below_titles(path, rows, lines, notes, least):
    """Return the rows and lines from the header on, less those that are empty or repeat it."""
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    top = next((i for i, row in enumerate(rows) if not _is_title(row, width)), 0)
    if any(map(any, rows[:top])):
        notes.append(f"skipped: lines {lines[0]} to {lines[top - 1]}, above the table")
    full = [i for i in range(top + 1, len(rows)) if rows[i] != rows[top] and not all(map(_is_missing, rows[i]))]
    if len(full) < len(rows) - top - 1:
        notes.append(f"rows skipped, which are empty or repeat the header: {len(rows) - top - 1 - len(full)}")
    if len(full) < least:
        raise error(path, f"rows below a header: {len(full)}; {EXPECTED}", "fix: a table with more rows")
    return [rows[i] for i in (top, *full)], [lines[i] for i in (top, *full)]


def _is_title(row, width):
    """Return whether a row of a table of some width holds one cell or none, but is no header such as `,y`."""
    filled = sum(map(bool, row))
    return filled == 0 or (filled == 1 < width and not len(row) == width == 2)


def _header(path, rows, lines, separator):
    """Return the names, the rows below them, all equally wide, and their lines."""
    names = [" ".join(name.replace("\ufeff", "").split()) for name in rows[0]]
    rows, lines = rows[1:], lines[1:]
    if separator in ("\t", " ") and all(len(row) == len(names) + 1 for row in rows):
        labels = [row[0] for row in rows]
        if len(set(labels)) == len(rows) and not all(_is_missing(row[-1]) for row in rows):
            names.insert(0, "")  # R heads no column for the names of rows
    for row, line in zip(rows, lines, strict=True):
        while len(row) > len(names) and _is_missing(row[-1]):  # a separator at the end
            row.pop()
        if len(row) != len(names):
            remedy = "fix: correct the line; a missing cell stays empty between its separators"
            if len(row) == 2 * len(names) and separator == ",":
                remedy = "fix: save the table with semicolons between its cells: the decimal mark seems to be a comma"
            raise error(path, f"line {line} has {len(row)} cells, the header {len(names)}: {', '.join(names)}", remedy)
    if any(map(_is_number, names)) and all(_is_value(name, [row[j] for row in rows]) for j, name in enumerate(names)):
        remedy = "fix: write their names above them"
        if separator and path.suffix != ".gz":
            header = separator.join([*(f"x{j + 1}" for j in range(len(names) - 1)), "y"])
            named = path.with_name(f"{path.stem}_named{path.suffix}")
            remedy = f"try: (echo {shlex.quote(header)}; cat {shlex.quote(str(path))}) > {shlex.quote(str(named))}"
        raise error(path, f"the first line holds values: expected the names of the {len(names)} columns", remedy)
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        message = f"several columns are named {', '.join(twice)}: {', '.join(names)}"
        raise error(path, message, "fix: give each column its own name in the first line")
    return names, rows, lines


def _is_value(name, below):
    """Return whether a cell of the first line belongs to the column below it instead of naming it."""
    return _all_numbers([name]) or bool(DATE.fullmatch(name)) or name in below or not any(map(_is_number, below[:20]))


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


def _decimal_mark(path, rows, separator, notes):
    """Return the decimal mark of a table, "." or ",", from the cells that tell it apart from one of thousands."""
    numbers = [_plainer(cell) for row in rows[:2000] for cell in row if _is_number(cell)]
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
    if not examples and (separator == "," or (separator == ";" and not points)):
        examples = {{",": ".", ";": ","}[separator]: commas[0]}
    if len(examples) != 1:
        seen = " and ".join(examples.values()) or f"{commas[0]}, whose comma may mark decimals or thousands"
        remedy = "fix: write numbers with a decimal point and without separators of thousands"
        raise error(path, f"the decimal mark can't be told from {seen}", remedy)
    (mark,) = examples
    meaning = "decimal mark" if mark == "," else "mark of thousands"
    notes.append(f"the comma in {commas[0]} is read as a {meaning}")
    return mark


def _parse(texts, mark, lines):
    """Return the Column of texts (M,) that stand in these lines of the file."""
    numbers = _plain(texts) if mark == "." else None
    if numbers is not None:
        return Column(*numbers)
    texts = list(map(_plainer, texts))
    texts = ["nan" if _is_missing(text) else text for text in texts]
    present = [i for i, text in enumerate(texts) if text != "nan"]
    if not present:
        return Column(fault="which is empty")
    if mark == "." or not any("." in text for text in texts):
        numbers = _plain([text.replace(mark, ".") for text in texts])
        if numbers is not None:
            return Column(*numbers)
    matches = [NUMBER[mark].fullmatch(texts[i]) for i in present]
    unit, count = Counter(match["unit"] if match else None for match in matches).most_common(1)[0]
    if unit is None or 2 * count < len(present) or (unit and count < len(present)):
        kind = "of dates or times" if DATE.fullmatch(texts[present[0]]) else "of text"
        if {text.casefold() for text in texts} <= {"true", "false", "yes", "no", "nan"}:
            kind = "of truth values"
        return Column(fault=f"{kind} as {texts[present[0]]!r}")
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
    exponents[scientific] = [int(text.lower().rpartition(b"e")[2]) for text in written[scientific]]
    is_digit = (characters >= ord("0")) & (characters <= ord("9"))
    behind_point = (np.cumsum(characters == ord("."), 1) > 0) & (np.cumsum(has_exponent, 1) == 0)
    unit = exponents - (is_digit & behind_point).sum(1)  # log10, as is `magnitude`
    usual = np.isfinite(values) & (values != 0)
    magnitude = np.floor(np.log10(np.abs(values), where=usual, out=np.zeros(len(values))))
    if usual.any():
        longest = (magnitude - unit)[usual].max()
        unit = np.minimum(unit, np.maximum(unit[usual].min(), magnitude - longest))
    return values, 0.5 * 10.0 ** np.minimum(unit, 300)  # 1e999 is infinite
