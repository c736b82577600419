"""Files of rows (.parquet .arrow .csv .jsonl .txt .md .json, the last five also .gz) as tasks for several processes.

A task is (path, kind, first, content):
lines   the lines that begin between the bytes `first` and `content` of the file
block   `content` is the bytes of whole lines, `first` the number of the first line
group   row group `first` of a parquet file
values  `content` is a list of JSON values, `first` the number of the first one
csv     `content` is a list of (line, row)
A line of .txt is a row with the field "text" alone, and so is a whole file .md.
"""

import io
import json
import re
import shlex
from itertools import islice
from pathlib import Path

from data_utils.documents import (
    MAX_LINE_BYTES,
    TABLES,
    csv_rows,
    decode,
    describes,
    how_to_mend,
    import_pyarrow,
    open_parquet,
    open_text,
    read_text,
    suffix_of,
)
from data_utils.errors import DataError

LINES = (".jsonl", ".txt")
READ = (*TABLES, ".csv", *LINES, ".md", ".json")
SAVED_BESIDE = ("dataset_info.json", "state.json", "dataset_dict.json")  # by save_to_disk of Hugging Face, no rows
BLOCK_BYTES = 8 * 2**20
GROUP_ROWS = 512  # rows held as Python objects at a time
MAX_VALUE_CHARACTERS = 512 * 2**20


def find_files(source, most=0):
    """Return the files of a folder in sorted order (the first `most`, 0: all), or [source] if it is a file.

    Raises DataError if there is none, or if one is compressed with zstandard.
    """
    root = Path(source)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    visible = [p for p in paths if p == root or not any(part.startswith(".") for part in p.relative_to(root).parts)]
    zstandard = [path for path in visible if path.suffix == ".zst"]
    if zstandard:
        raise DataError(f"{zstandard[0]}: zstandard is not read\ntry: zstd -d --rm {shlex.quote(str(zstandard[0]))}")
    files = [path for path in visible if suffix_of(path) in READ and not _is_beside(path, root)]
    if not files:
        names = " ".join(READ)
        others = f"{len(visible)} other files" + (f", such as {visible[0].name}" if visible else "")
        raise DataError(
            f"no source in {root}: searched for {names}, the last five also .gz; {others}\nfix: text as one of these"
        )
    return files[:most] if most else files


def _is_beside(path, root):
    """Return whether a file in the folder `root` holds no rows."""
    saved = path.name in SAVED_BESIDE and any(path.parent.rglob("*.arrow"))
    return path != root and (saved or describes(path))


def split_tasks(files, block=BLOCK_BYTES):
    """Yield the tasks of the files, in order. They do not depend on the number of processes."""
    for path in files:
        suffix = suffix_of(path)
        if suffix in LINES and not (suffix == ".jsonl" and _is_spread_out(path)):
            with open_text(path) as file:  # also checks the encoding
                if path.suffix.lower() == ".gz":
                    number = 1
                    while lines := file.readlines(block):
                        content = b"".join(lines)
                        yield path, "block", number, content
                        number += content.count(b"\n")
                else:
                    size = path.stat().st_size
                    for start in range(0, size, block):
                        yield path, "lines", start, min(start + block, size)
        elif suffix == ".parquet":
            for group in range(open_parquet(path).num_row_groups):
                yield path, "group", group, None
        elif suffix == ".csv":
            remaining = csv_rows(path)
            while values := list(islice(remaining, GROUP_ROWS)):
                yield path, "csv", 0, values
        else:
            number = 1
            if suffix == ".md":
                remaining = iter([dict(text=read_text(path))])
            else:
                remaining = _arrow(path) if suffix == ".arrow" else _json(path)
            while values := list(islice(remaining, GROUP_ROWS)):
                yield path, "values", number, values
                number += len(values)


def _is_spread_out(path):
    """Return whether a .jsonl file holds one array or objects over several lines: its first line is a bracket."""
    with open_text(path) as file:
        first = file.readline(100).strip().removeprefix(b"\xef\xbb\xbf")
        return first in (b"[", b"{") and file.read(1) != b""


def rows(task, columns=None, parse=None):
    """Yield (place, row) of a task; a row is a dict, or a ValueError for a bad one. `where` makes a text of place.

    columns: read only these of a table, in any case; all if it has none of them. parse: turns a line of JSON into a
    row, instead of parse_line.
    """
    path, kind, first, content = task
    if kind == "group":
        table = open_parquet(path)
        names = table.schema_arrow.names
        if columns:
            names = [name for name in names if name in columns or name.lower() in columns] or names
        options = dict(row_groups=[first], columns=names, use_threads=False)
        try:
            batches = table.iter_batches(GROUP_ROWS, **options)
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: row group {first}: {str(e).splitlines()[0]}") from e
    elif kind == "csv":
        yield from content
    elif kind == "values":
        for number, value in enumerate(content, first):
            yield from ((number, row) for row in _each(_checked(value)))
    else:
        lines = _lines(path, first, content) if kind == "lines" else enumerate(io.BytesIO(content), first)
        parse = _text_row if suffix_of(path) == ".txt" else parse or parse_line
        yield from ((place, row) for place, line in lines if line.strip() for row in _each(parse(line)))


def where(task, place):
    """Return the place of a row as a text: "file:line", or the row group or value number in other files."""
    path, kind, first, _ = task
    if kind == "group":
        return f"{path}: row group {first}, row {place}"
    if kind == "values":
        return f"{path}: value {place}"
    if kind == "lines":
        with open(path, "rb") as file:
            left = place  # bytes before the line
            place = 1
            while left:
                block = file.read(min(left, 2**20))
                place += block.count(b"\n")
                left -= len(block)
    return f"{path}:{place}"


def parse_line(line):
    """Return the JSON object of a line of bytes, a list of them for an array, or a ValueError with the reason.

    A line of an old Mac, which ends at a carriage return, holds several: JSON has none inside a string.
    """
    parts = [part for part in line.split(b"\r") if part.strip()]
    if len(parts) > 1:
        return [row for part in parts for row in _each(parse_line(part))]
    try:
        text = decode(line)
    except ValueError as e:
        return e
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as e:  # deep nesting, integers of thousands of digits
        return ValueError(f"invalid JSON: {e}")


def _checked(value):
    """Return a row, the rows of an array, or a ValueError; an array of turns is one conversation."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return dict(messages=value) if all("role" in row or "from" in row for row in value) else value
    return value if isinstance(value, dict) else ValueError(f"expected an object, found {type(value).__name__}")


def _each(parsed):
    return parsed if isinstance(parsed, list) else (parsed,)


def _text_row(line):
    try:
        text = decode(line).rstrip("\r\n")
    except ValueError as e:
        return e
    return [{"text": part} for part in text.split("\r")]  # several lines of an old Mac


def _lines(path, start, end):
    """Yield (byte, line) of the lines that begin in start .. end; they end at b"\\n" only, since U+2028 is text."""
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        place = start and start - 1 + len(file.readline())  # skip a line that began before
        while place < end and (line := file.readline(MAX_LINE_BYTES + 1)):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}: line longer than {MAX_LINE_BYTES} bytes at byte {place}")
            yield place, line
            place += len(line)


def _json(path):
    """Yield the elements of a top-level array, or values that follow each other; holds about one of them at a time."""
    decoder = json.JSONDecoder()
    separators = re.compile(r"[\s,]*")
    text = ""  # what was read and not yet decoded
    at = 0
    in_array = None  # unknown before the first character
    ended = False  # the file
    number = 1  # of the value
    try:
        with open_text(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
            while True:
                at = separators.match(text, at).end()
                if in_array is None and at < len(text):
                    in_array = text[at] == "["
                    at += in_array
                    continue
                if (in_array and text[at : at + 1] == "]") or (ended and not in_array and at == len(text)):
                    return
                reason = None
                try:
                    value, end = decoder.raw_decode(text, at)
                except (ValueError, RecursionError) as e:
                    end = len(text)
                    reason = e
                if end == len(text) and not ended:  # the value may go on; doubling the text keeps the repeats few
                    more = file.read(max(2**20, len(text) - at))
                    text = text[at:] + more
                    at = 0
                    ended = not more
                    if len(text) <= MAX_VALUE_CHARACTERS:
                        continue
                    reason = f"longer than {MAX_VALUE_CHARACTERS} characters, or not JSON"
                if reason:
                    raise DataError(f"{path}: value {number}: {reason}")
                yield value
                at = end
                number += 1
    except UnicodeDecodeError as e:
        message = f"invalid UTF-8: {e.reason}"
        raise DataError(f"{path}: value {number} or later: {message}{how_to_mend(path, e.object)}") from e
    except (OSError, EOFError, ValueError) as e:
        raise DataError(f"{path}: value {number}: {e}") from e


def _arrow(path):
    """Yield the rows of an arrow file, in stream or file format."""
    arrow = import_pyarrow()
    try:
        with arrow.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = arrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                file.seek(0)
                batches = arrow.ipc.open_stream(file)
            for batch in batches:
                for start in range(0, batch.num_rows, GROUP_ROWS):
                    yield from batch.slice(start, GROUP_ROWS).to_pylist()
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: {str(e).splitlines()[0]}") from e
