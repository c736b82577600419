"""Files of rows (.parquet .arrow .jsonl .json .txt, the last three also .gz) as tasks that processes can share.

A task is (path, kind, first, content): "lines" from byte `first` to byte `content`, "block" of lines as bytes from line
`first` on, "group" of a parquet file, "values" from number `first` on. A line of .txt is a row with only "text".
"""

import gzip
import io
import json
import re
from pathlib import Path

from data_utils.documents import MAX_LINE_BYTES
from data_utils.errors import DataError, UsageError

LINES, TABLES = (".jsonl", ".txt"), (".parquet", ".arrow")
BLOCK_BYTES = 8 * 2**20
GROUP_ROWS = 512  # held as Python objects at once
MAX_VALUE_CHARACTERS = 512 * 2**20


def find_files(source, most=0):
    """Return the files of a folder in sorted order (the first `most`, 0: all), or [source] when it is a file.

    Raises DataError when there is none, or one is packed with zstandard.
    """
    root = Path(source)
    found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    shown = [p for p in found if p == root or not any(part.startswith(".") for part in p.relative_to(root).parts)]
    packed = [p for p in shown if p.suffix == ".zst"]
    if packed:
        raise DataError(f"{packed[0]}: zstandard is not read\ntry: zstd -d --rm {packed[0]}")
    files = [p for p in shown if _suffix(p) in (*LINES, ".json") or p.suffix in TABLES]
    if not files:
        names = " ".join((*TABLES, *LINES, ".json"))
        raise DataError(f"no source in {root}: searched for {names}, the last three also .gz; {len(shown)} other files")
    return files[:most] if most else files


def split(files, block=BLOCK_BYTES):
    """Yield the tasks of the files, in order; the same for any number of processes."""
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
            number, values = 1, []
            for value in _arrow(path) if path.suffix == ".arrow" else _json(path):
                values.append(value)
                if len(values) == GROUP_ROWS:
                    yield path, "values", number, values
                    number, values = number + len(values), []
            if values:
                yield path, "values", number, values


def rows(task, columns=None, parse=None):
    """Yield (place, row) of a task: a dict, or a ValueError that says what is wrong; `where` makes a text of place.

    `columns`: of a table only these are read. `parse`: what makes a row of a line of JSON instead of parse_line.
    """
    path, kind, first, content = task
    if kind == "group":
        table = _parquet(path)
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        options = dict(row_groups=[first], columns=names, use_threads=False)
        try:
            found = (row for batch in table.iter_batches(GROUP_ROWS, **options) for row in batch.to_pylist())
            yield from enumerate(found if names else ({} for _ in range(table.metadata.row_group(first).num_rows)))
        except (OSError, ValueError) as e:
            raise DataError(f"{path}: row group {first}: {str(e).splitlines()[0]}") from e
    elif kind == "values":
        for number, value in enumerate(content, first):
            yield number, _checked(value)
    else:
        lines = _lines(path, first, content) if kind == "lines" else enumerate(io.BytesIO(content), first)
        read = _text if _suffix(path) == ".txt" else parse or parse_line
        yield from ((place, read(line)) for place, line in lines if line.strip())


def where(task, place):
    """Return "file:line" or what a table has instead."""
    path, kind, first, _ = task
    if kind == "group":
        return f"{path}: row group {first}, row {place}"
    if kind == "values":
        return f"{path}: value {place}"
    if kind == "lines":
        with open(path, "rb") as file:
            place, left = 1, place
            while left:
                block = file.read(min(left, 2**20))
                place, left = place + block.count(b"\n"), left - len(block)
    return f"{path}:{place}"


def parse_line(line):
    """Return the JSON object of one line of bytes, or a ValueError that says what is wrong."""
    try:
        return _checked(json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as e:
        return ValueError(f"invalid UTF-8: {e.reason}")
    except (ValueError, RecursionError) as e:  # nesting, and integers of thousands of digits
        return ValueError(f"invalid JSON: {e}")


def _checked(value):
    return value if isinstance(value, dict) else ValueError(f"expected an object, found {type(value).__name__}")


def _text(line):
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as e:
        return ValueError(f"invalid UTF-8: {e.reason}")


def _suffix(path):
    """Return the suffix before .gz, where that can be."""
    name = path.name.removesuffix(".gz")
    return Path(name).suffix if Path(name).suffix not in TABLES or name == path.name else ""


def _lines(path, start, end):
    """Yield (byte, line) of the lines that begin in start .. end; split at b"\\n" only: U+2028 is text."""
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        place = start and start - 1 + len(file.readline())  # of a line that began before
        while place < end and (line := file.readline(MAX_LINE_BYTES + 1)):
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}: line longer than {MAX_LINE_BYTES} bytes at byte {place}")
            yield place, line
            place += len(line)


def _unpacked(path, block):
    """Yield blocks of whole lines of a .gz file."""
    try:
        with gzip.open(path) as file:
            while lines := file.readlines(block):
                yield b"".join(lines)
    except (OSError, EOFError) as e:
        raise DataError(f"{path}: {e}") from e


def _json(path):
    """Yield the elements of a top-level array, or the values that follow each other; holds one of them at a time."""
    decoder, skipped, opened = json.JSONDecoder(), re.compile(r"[\s,]*"), gzip.open if path.suffix == ".gz" else open
    text, at, array, ended, number = "", 0, None, False, 1
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            while True:
                at = skipped.match(text, at).end()
                if array is None and at < len(text):
                    array = text[at] == "["
                    at += array
                    continue
                if (array and text[at : at + 1] == "]") or (ended and not array and at == len(text)):
                    return
                try:
                    (value, end), reason = decoder.raw_decode(text, at), None
                except (ValueError, RecursionError) as e:
                    end, reason = len(text), e
                if end == len(text) and not ended:  # the rest of the value may follow; doubled, so log times
                    more = file.read(max(2**20, len(text) - at))
                    text, at, ended = text[at:] + more, 0, not more
                    if len(text) <= MAX_VALUE_CHARACTERS:
                        continue
                    reason = f"longer than {MAX_VALUE_CHARACTERS} characters, or not JSON"
                if reason:
                    raise DataError(f"{path}: value {number}: {reason}")
                yield value
                at, number = end, number + 1
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
    except (OSError, ValueError) as e:  # pyarrow's errors are of both kinds
        raise DataError(f"{path}: {str(e).splitlines()[0]}") from e


def _arrow(path):
    """Yield the rows of a file in the stream or the file form."""
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
