"""Files of rows (.parquet .arrow .jsonl .json .txt, the last three also .gz) as tasks for several processes.

A task is (path, kind, first, content):
lines   the lines that begin between the bytes `first` and `content` of the file
block   `content` is the bytes of whole lines, `first` the number of the first line
group   row group `first` of a parquet file
values  `content` is a list of JSON values, `first` the number of the first one
A line of .txt is a row with the field "text" alone.
"""

import gzip
import io
import json
import re
from itertools import islice
from pathlib import Path

from data_utils.documents import MAX_LINE_BYTES
from data_utils.errors import DataError, UsageError

LINES, TABLES = (".jsonl", ".txt"), (".parquet", ".arrow")
BLOCK_BYTES = 8 * 2**20
GROUP_ROWS = 512  # rows held as Python objects at a time
MAX_VALUE_CHARACTERS = 512 * 2**20


def find_files(source, most=0):
    """Return the files of a folder in sorted order (the first `most`, 0: all), or [source] if it is a file.

    Raises DataError if there is none, or if one is compressed with zstandard.
    """
    root = Path(source)
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    visible = [p for p in paths if p == root or not any(part.startswith(".") for part in p.relative_to(root).parts)]
    zstandard = [path for path in visible if path.suffix == ".zst"]
    if zstandard:
        raise DataError(f"{zstandard[0]}: zstandard is not read\ntry: zstd -d --rm {zstandard[0]}")
    files = [path for path in visible if _suffix(path) in (*LINES, ".json") or path.suffix in TABLES]
    if not files:
        names = " ".join((*TABLES, *LINES, ".json"))
        raise DataError(
            f"no source in {root}: searched for {names}, the last three also .gz; {len(visible)} other files"
        )
    return files[:most] if most else files


def split_tasks(files, block=BLOCK_BYTES):
    """Yield the tasks of the files, in order. They do not depend on the number of processes."""
    for path in files:
        suffix = _suffix(path)
        if suffix in LINES and path.suffix != ".gz":
            size = path.stat().st_size
            for start in range(0, size, block):
                yield path, "lines", start, min(start + block, size)
        elif suffix in LINES:
            number = 1
            for content in _unpacked(path, block):
                yield path, "block", number, content
                number += content.count(b"\n")
        elif path.suffix == ".parquet":
            for group in range(_parquet(path).num_row_groups):
                yield path, "group", group, None
        else:
            number = 1
            remaining = _arrow(path) if path.suffix == ".arrow" else _json(path)
            while values := list(islice(remaining, GROUP_ROWS)):
                yield path, "values", number, values
                number += len(values)


def rows(task, columns=None, parse=None):
    """Yield (place, row) of a task; a row is a dict, or a ValueError for a bad one. `where` makes a text of place.

    columns: read only these of a table. parse: turns a line of JSON into a row, instead of parse_line.
    """
    path, kind, first, content = task
    if kind == "group":
        table = _parquet(path)
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        options = dict(row_groups=[first], columns=names, use_threads=False)
        try:
            if names:
                batches = table.iter_batches(GROUP_ROWS, **options)
                yield from enumerate(row for batch in batches for row in batch.to_pylist())
            else:
                yield from enumerate({} for _ in range(table.metadata.row_group(first).num_rows))
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: row group {first}: {str(e).splitlines()[0]}") from e
    elif kind == "values":
        for number, value in enumerate(content, first):
            yield number, _checked(value)
    else:
        lines = _lines(path, first, content) if kind == "lines" else enumerate(io.BytesIO(content), first)
        parse = _text_row if _suffix(path) == ".txt" else parse or parse_line
        yield from ((place, parse(line)) for place, line in lines if line.strip())


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
    """Return the JSON object of a line of bytes, or a ValueError with the reason."""
    try:
        return _checked(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as e:
        return ValueError(f"invalid UTF-8: {e.reason}")
    except (ValueError, RecursionError) as e:  # deep nesting, integers of thousands of digits
        return ValueError(f"invalid JSON: {e}")


def _checked(value):
    return value if isinstance(value, dict) else ValueError(f"expected an object, found {type(value).__name__}")


def _text_row(line):
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as e:
        return ValueError(f"invalid UTF-8: {e.reason}")


def _suffix(path):
    """Return the suffix before .gz; "" for a compressed table, which is not read."""
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return "" if suffix in TABLES and name != path.name else suffix


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


def _unpacked(path, block):
    """Yield blocks of complete lines of a .gz file."""
    try:
        with gzip.open(path) as file:
            while lines := file.readlines(block):
                yield b"".join(lines)
    except (OSError, EOFError) as e:
        raise DataError(f"{path}: {e}") from e


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
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
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
    except (OSError, EOFError, ValueError) as e:
        raise DataError(f"{path}: value {number}: {e}") from e


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UsageError("parquet and arrow need pyarrow\ntry: pip install pyarrow, or give .jsonl") from None
    return pyarrow


def _parquet(path):
    try:
        return _pyarrow().parquet.ParquetFile(path)
    except (OSError, ValueError) as e:  # pyarrow raises both
        raise DataError(f"{path}: {str(e).splitlines()[0]}") from e


def _arrow(path):
    """Yield the rows of an arrow file, in stream or file format."""
    arrow = _pyarrow()
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
